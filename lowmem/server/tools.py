"""What a request's tools ask of the model: how they are shown, and whether a call is forced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.config import Grammar
from lowmem.loading.loader import LoadedModel
from lowmem.models.call_formats import CallFormat, call_format
from lowmem.models.template import chosen_template, render_template
from lowmem.server.api_errors import ApiError, invalid, short
from lowmem.server.calls import CallParser
from lowmem.server.protocol import ChatRequest
from lowmem.text.grammar_process import WHITESPACE

_PLAIN = CallFormat("")
"""How a model that knows no format is made to write a call: as JSON, which is the whole answer."""


@dataclass(frozen=True)
class ToolUse:
    """How the tools of one request are used."""

    tools: tuple[dict[str, Any], ...] = ()
    """Those that the model may see."""
    forced: tuple[dict[str, Any], ...] = ()
    """One of these must be called; none: the model decides."""
    format: CallFormat | None = None
    """How the model writes calls; None: it answers in words."""
    shown: bool = False
    """The chat template shows tools; otherwise `described` does."""
    parallel: bool = True
    """More than one call in an answer is allowed."""
    named: bool = False
    """The format writes names in front of [ARGS], which is a special token."""

    @property
    def described(self) -> str:
        """A system text with the tools, for a template that does not show them; "" where none is needed."""
        if self.shown or not self.forced:
            return ""
        lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in self.forced]
        return "\n".join(
            (
                "You can call these functions:",
                *lines,
                'Answer with a call in JSON: {"name": "function name", "arguments": {…}}',
            )
        )

    @property
    def opening(self) -> str:
        """What the prompt ends with, so that the model goes on with a call."""
        return self._written.opening if self.forced else ""

    @property
    def grammar(self) -> Grammar | None:
        """The grammar of a forced call."""
        if not self.forced:
            return None
        written = self._written
        calls, rules = [], []
        for at, tool in enumerate(self.forced):
            function = tool["function"]
            head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{written.arguments}": '
            schema = {"type": "object", **(function.get("parameters") or {}), "x-guidance": WHITESPACE}
            calls.append(f'{_literal(head)} arguments_{at} "}}"')
            rules.append(f"arguments_{at}: %json {json.dumps(schema, ensure_ascii=False)}")
        one = " | ".join(calls)
        start = f'start: "[" ({one}) "]"' if written.listed else f"start: {one}"
        return Grammar.lark("\n".join((start, *rules)))

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer, so that a second call is not even begun."""
        alone = self.format is not None and not self.parallel and not self.forced
        return (self.format.closing,) if self.format and alone and self.format.closing else ()

    def parser(self) -> CallParser | None:
        """What finds the calls in an answer, or None for an answer in words."""
        names = [str(_function(tool).get("name")) for tool in self.tools]
        if self.forced:
            return CallParser(self._written, names, forced=True)
        return None if self.format is None else CallParser(self.format, names, parallel=self.parallel)

    @property
    def _written(self) -> CallFormat:
        """The format of a forced call: special tokens cannot be part of it."""
        return _PLAIN if self.format is None or self.named else self.format


def tools_of(loaded: LoadedModel, request: ChatRequest) -> ToolUse:
    """The tools of a request. Raises ApiError for a choice of tools that cannot be obeyed."""
    choice = request.tool_choice or "auto"
    tools = tuple(request.tools or ())
    if choice == "none":
        return ToolUse()
    older = tuple({"type": "function", "function": function} for function in request.functions or ())
    forced = _forced(choice, tools)
    template = None if loaded.dialogue is not None else loaded.tokenizer.chat_template
    shown = bool(template) and bool(tools) and _shows(loaded, tools)
    text = str(chosen_template(loaded.tokenizer, list(tools))) if shown else ""
    return ToolUse(
        (*tools, *older),
        forced,
        call_format(text),
        shown,
        parallel=request.parallel_tool_calls is not False,
        named="[ARGS]" in text,
    )


def check_function(function: Mapping[str, Any], where: str, param: str | None = None) -> None:
    """Raise ApiError unless a function has a name, and its parameters are an object or left out.

    where: its place in the request. param: the field that the error names; the one at fault if None.
    """
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise invalid(f"{where}.name is missing. Send the name of a function", param or f"{where}.name")
    if not isinstance(function.get("parameters") or {}, dict):
        where = f"{where}.parameters"
        raise invalid(f"{where} is not a JSON Schema. Send an object", param or where)


def _forced(choice: object, tools: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """The tools of which one must be called."""
    if choice == "auto":
        return ()
    if not tools:
        raise invalid("tool_choice needs tools. Send at least one", "tool_choice")
    for at, tool in enumerate(tools):
        check_function(_function(tool), f"tools[{at}].function", "tools")
    if choice == "required":
        return tools
    named = (
        choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    )
    if not isinstance(named, Mapping):
        raise _unsupported(choice)
    found = tuple(tool for tool in tools if tool["function"]["name"] == named.get("name"))
    if not found:
        raise invalid(
            f"tool_choice names {short(str(named.get('name')))!r}, which is not in tools", "tool_choice"
        )
    return found


def _unsupported(choice: object) -> ApiError:
    return invalid(
        f"tool_choice {short(str(choice))} is not supported by this server. "
        'Use "auto", "none", "required" or {"type": "function", "function": {"name": "…"}}',
        "tool_choice",
        "unsupported_parameter",
    )


def _shows(loaded: LoadedModel, tools: tuple[dict[str, Any], ...]) -> bool:
    """Whether the model's chat template shows tools to the model."""
    names = [str(_function(tool).get("name")) for tool in tools]
    message = {"role": "user", "content": "x"}
    try:
        text = render_template(loaded.tokenizer, [message], tools=list(tools), add_generation_prompt=True)
    except Exception:  # the template may raise anything
        return False
    return all(name in text for name in names)


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, Mapping) else {}


def _literal(text: str) -> str:
    """A text in Lark's syntax."""
    return json.dumps(text, ensure_ascii=False)
