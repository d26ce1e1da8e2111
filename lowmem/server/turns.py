"""Messages of a chat request → token ids, also an agent's: calls of tools, their results, late system texts.

A chat template gets the messages as transformers would hand them over. Where it refuses such a message, or
leaves its text out, as a template without tools does, and for StarChat's own dialogue, the messages are
written out plainly: a call as a sentence of the assistant, a result and a late system text as the user's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lowmem.errors import InvalidRequestError
from lowmem.loading.loader import LoadedModel
from lowmem.models.dialogue import Message
from lowmem.models.template import apply_template, render_template
from lowmem.models.turns import Call, Turn, plain
from lowmem.prompts import encode_prompt, template_refused
from lowmem.server.api_errors import ApiError, invalid, invalid_request, short
from lowmem.server.protocol import ChatMessage, ChatRequest, ToolCall

_TEXT_PARTS = ("text", "input_text", "output_text")
_SYNONYMS = {"developer": "system", "function": "tool"}
_PREFILL = ("prefix", "partial")
"""How some APIs mark an assistant's message as the beginning of the answer."""
_RESERVED = ("messages", "role", "tools", "documents", "add_generation_prompt", "continue_final_message")
# transformers' own arguments of apply_chat_template; the template never sees them.
_ARGUMENTS = re.compile(
    "conversation|chat_template|tokenize|padding|truncation|max_length|return_.*|tokenizer_kwargs|sanitize.*"
)


def read_turns(messages: Sequence[ChatMessage]) -> list[Turn]:
    """The messages as turns, leading system texts joined. Raises ApiError for content that is not text."""
    turns: list[Turn] = []
    names: dict[str | None, str] = {}  # of the tools that were called, by the id of the call
    for at, message in enumerate(messages):
        _check_prefill(message, at)
        role = _SYNONYMS.get(message.role, message.role)
        calls = _calls(message) if role == "assistant" else ()
        names |= {call.id: call.name for call in calls}
        name = message.name or (names.get(message.tool_call_id) if role == "tool" else None)
        turn = Turn(
            role,
            _content(message, at),
            calls,
            name,
            message.tool_call_id,
            message.reasoning_content,
            bare=message.content is None,
        )
        if role == "system" and len(turns) == 1 and turns[0].role == "system":
            turns[0] = replace(turns[0], content=f"{turns[0].content}\n\n{turn.content}")
        else:
            turns.append(turn)
    return turns


def encode_turns(loaded: LoadedModel, request: ChatRequest, system: str = "") -> list[int]:
    """The token ids of a request's messages, up to where the answer begins.

    system: goes behind the system text. Raises ApiError for messages that the model's template refuses, and
    arguments that it does not use.
    """
    turns = _with_system(read_turns(request.messages), system)
    template = None if loaded.dialogue is not None else loaded.tokenizer.chat_template
    options = _template_arguments(request, template)
    if (tools := _tools(request)) is not None:
        options["tools"] = tools
    try:
        if template:
            return _by_template(loaded, turns, options)
        if loaded.dialogue is None:
            return encode_prompt(loaded, _only_question(turns), raw=True)
        return encode_prompt(loaded, plain(turns))
    except InvalidRequestError as error:
        raise invalid_request(error, "messages") from error


def _with_system(turns: list[Turn], text: str) -> list[Turn]:
    """The turns with a text at the end of the system message, which is added where there is none."""
    if not text:
        return turns
    if turns[0].role != "system":
        return [Turn("system", text), *turns]
    return [replace(turns[0], content=f"{turns[0].content}\n\n{text}"), *turns[1:]]


def _by_template(loaded: LoadedModel, turns: Sequence[Turn], options: dict[str, Any]) -> list[int]:
    """The ids of the turns in the model's chat template: as they are, or else written out plainly."""
    written = plain(turns)
    attempts = [[_plain_dict(message) for message in written]]
    if written[0].role == "system" and len(written) > 1:  # some templates have no system message
        attempts.append([_plain_dict(message) for message in _without_system(written)])
    late = any(turn.role == "system" for turn in turns[1:])
    if late or any(turn.needs_template for turn in turns):
        filled = [replace(turn, bare=False) for turn in turns]  # some templates need an empty content
        known = next((given for given in (turns, filled) if _knows(loaded, given, options)), ())
        attempts = [*([[turn.for_template() for turn in known]] if known else []), *attempts]
    options = {**options, "add_generation_prompt": True, "sanitize_control_tokens": True}
    failure = None
    for messages in attempts:
        try:
            return apply_template(loaded.tokenizer, messages, **options)
        except InvalidRequestError:  # the tokenizer's
            raise
        except Exception as error:  # the template may raise anything
            failure = failure or error
    assert failure is not None
    raise template_refused(failure) from failure


def _knows(loaded: LoadedModel, turns: Sequence[Turn], options: dict[str, Any]) -> bool:
    """Whether the model's chat template writes out tools' results, calls and late system texts."""
    signs = [f"sign{at}of{len(turns)}" for at in range(len(turns))]
    probes = [
        replace(
            turn,
            content=sign if turn.role in ("system", "tool") else turn.content,
            calls=tuple(replace(call, name=sign) for call in turn.calls),
        )
        for turn, sign in zip(turns, signs, strict=True)
    ]
    try:
        text = render_template(
            loaded.tokenizer,
            [probe.for_template() for probe in probes],
            add_generation_prompt=True,
            **options,
        )
    except Exception:  # the template may raise anything
        return False
    return all(
        sign in text
        for turn, sign in zip(turns, signs, strict=True)
        if turn.calls or turn.role in ("system", "tool")
    )


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with the text of the first, a system message, at the start of the user's first."""
    system, first, *rest = messages
    if first.role != "user":
        return [replace(system, role="user"), first, *rest]
    return [replace(first, content=f"{system.content}\n\n{first.content}"), *rest]


def _plain_dict(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _calls(message: ChatMessage) -> tuple[Call, ...]:
    entries = list(message.tool_calls or ())
    if message.function_call is not None:
        entries.append(ToolCall(function=message.function_call))
    found = []
    for entry in entries:
        given = entry.function.arguments
        text = given if isinstance(given, str) else json.dumps(given or {})
        found.append(Call(entry.function.name, text, entry.id))
    return tuple(found)


def _check_prefill(message: ChatMessage, at: int) -> None:
    """Raise ApiError for a message that the answer is asked to continue."""
    for name in _PREFILL:
        if (message.model_extra or {}).get(name):
            raise invalid(
                f"{name} is not supported by this server. "
                "Write the dialogue as text, and send it to /v1/completions",
                f"messages[{at}].{name}",
                "unsupported_parameter",
            )


def _content(message: ChatMessage, at: int) -> str:
    if message.content is None:
        if message.role in ("assistant", "tool", "function"):
            return ""
        raise invalid(f"messages[{at}].content is missing. Send text", f"messages[{at}].content")
    if isinstance(message.content, str):
        return message.content
    texts: list[str] = []
    for number, part in enumerate(message.content):
        if isinstance(part, str):
            texts.append(part)
            continue
        text = part.refusal if part.type == "refusal" else part.text if part.type in _TEXT_PARTS else None
        if text is None:
            raise invalid(
                f"a content part of type {short(part.type)!r} is not supported. Send text",
                f"messages[{at}].content[{number}]",
                "unsupported_content",
            )
        texts.append(text)
    return "".join(texts)


def _tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the template may show to the model."""
    if request.tool_choice == "none":
        return None
    older = [{"type": "function", "function": function} for function in request.functions or ()]
    return [*(request.tools or ()), *older] or None


def _template_arguments(request: ChatRequest, template: object) -> dict[str, Any]:
    """`chat_template_kwargs`. Raises ApiError for an argument that the template does not use."""
    given = request.chat_template_kwargs or {}
    for name in given:
        known = isinstance(template, str | Mapping) and re.search(rf"\b{re.escape(name)}\b", str(template))
        if not known or name in _RESERVED or _ARGUMENTS.fullmatch(name):
            raise _unused(name)
    return dict(given)


def _unused(name: str) -> ApiError:
    return invalid(
        f"the model's chat template does not use {short(name)!r} of chat_template_kwargs. Leave it out",
        "chat_template_kwargs",
        "unsupported_parameter",
    )


def _only_question(turns: Sequence[Turn]) -> str:
    """The text of the only user message, for a model without a chat template."""
    if [turn.role for turn in turns] != ["user"]:
        raise invalid(
            "this model has no chat template. Send a single user message, or use /v1/completions",
            "messages",
        )
    return turns[0].content
