"""OpenAI's /v1/responses: its request, as the chat request that it means.

A request's fields are those of /v1/chat/completions, but for the tables here. Tools are written flat there,
and calls and their results are items of the conversation instead of parts of messages.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lowmem.server.api_errors import ApiError, invalid, short
from lowmem.server.fields import CHAT, Accepted, Refused, check_others
from lowmem.server.protocol import (
    MOST_MESSAGES,
    ChatMessage,
    ChatRequest,
    ContentPart,
    FunctionCall,
    Limit,
    SamplingFields,
    Text,
    ToolCall,
)
from lowmem.server.tools import check_function
from lowmem.server.variants import Flag, NothingIsUnset

RESPONSES = "/v1/responses"
_HERE = (RESPONSES,)
_RESEND = "Send the whole conversation in input"
_ROLES = ("system", "developer", "user", "assistant")

REFUSED = (
    Refused(("previous_response_id", "conversation"), "a conversation that is kept", _RESEND, routes=_HERE),
    Refused(("prompt",), "a prompt that is kept", "Send it in input and instructions", routes=_HERE),
    Refused(("background",), "an answer to ask for later", neutral=(False,), routes=_HERE),
    Refused(
        ("include",),
        "more in the response",
        neutral=(["reasoning.encrypted_content"],),
        routes=_HERE,
    ),
    Refused(("truncation", "context_management"), "a shortened prompt", "Shorten it", ("disabled",), _HERE),
    Refused(("top_logprobs",), "log-probabilities", "Use /v1/chat/completions", (0,), _HERE),
    Refused(("messages",), "a dialogue", "Send it in input", routes=_HERE),
    Refused(("max_tokens", "n_predict"), "a limit of the answer", "Use max_output_tokens", routes=_HERE),
    Refused(("max_completion_tokens",), "a limit of the answer", "Use max_output_tokens", routes=_HERE),
    Refused(("n",), "several answers", "Send a request for each", (1,), _HERE),
)
ACCEPTED = (
    Accepted(("max_tool_calls",), "limits calls of OpenAI's own tools", _HERE),
    Accepted(("stream_options",), "the usage is in the last event", _HERE),
)
"""`store` is accepted too, though nothing is kept."""


Parts = Annotated[list[ContentPart | Text], Field(max_length=MOST_MESSAGES)]


class InputItem(BaseModel):
    """A message, a call of a tool or its result. `responses` refuses items of other types."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: Text | None = None
    """"message", "function_call" or "function_call_output"."""
    role: Text | None = None
    content: Text | Parts | None = None
    call_id: Text | None = None
    name: Text | None = None
    arguments: Text | None = None
    """Of a call: JSON."""
    output: Text | Parts | None = None
    """Of a result."""


class ResponsesRequest(SamplingFields):
    """The body of POST /v1/responses."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_MESSAGES)]
    """A question, or a conversation."""
    instructions: Text | None = None
    """A system text before the conversation."""
    max_output_tokens: Limit | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MOST_MESSAGES)] | None = None
    """Functions: `{"type": "function", "name": "…", "parameters": {…}}`."""
    tool_choice: Annotated[Text | dict[str, Any] | None, NothingIsUnset] = None
    """"auto", "none", "required" or `{"type": "function", "name": "…"}`."""
    parallel_tool_calls: Flag | None = None
    """false: at most one call in an answer."""
    text: Annotated[dict[str, Any] | None, NothingIsUnset] = None
    """`{"format": {"type": "json_schema", "name": "…", "schema": {…}}}`, or of type "json_object"."""
    metadata: dict[str, Any] | None = None
    """Returned with the response."""


_NOT_HERE = ("n", "max_tokens", "n_predict", "stream_options")
"""Fields of other routes that the schema inherits."""


def as_chat(request: ResponsesRequest, ignored: Collection[str] = ()) -> ChatRequest:
    """The chat request that a request means. Raises ApiError for one that asks for something else.

    ignored: names of fields that pass.
    """
    others: dict[str, Any] = {name: getattr(request, name) for name in _NOT_HERE}
    check_others(others | (request.model_extra or {}), CHAT, ignored, first=(*REFUSED, *ACCEPTED))
    if request.max_output_tokens == 0:
        raise invalid("max_output_tokens is 0. Ask for at least one token", "max_output_tokens")
    if isinstance(request.input, str):
        messages = [ChatMessage(role="user", content=request.input)]
    else:
        messages = [message for message, _ in _messages(request.input)]
    if request.instructions:
        messages.insert(0, ChatMessage(role="system", content=request.instructions))
    fields = {name: getattr(request, name) for name in SamplingFields.model_fields if name not in _NOT_HERE}
    if (asked := _format(request.text or {}, ignored)) is not None:
        if fields["response_format"]:
            raise invalid(
                "text.format cannot be combined with response_format. Leave one of them out", "text"
            )
        fields["response_format"] = asked
    return ChatRequest(
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        tools=[_tool(tool, at) for at, tool in enumerate(request.tools or ())] or None,
        tool_choice=_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        **fields,
    )


def as_asked(error: ApiError, request: ResponsesRequest) -> ApiError:
    """An error about the chat request, with the names of this one's fields."""
    if error.param == "response_format" and request.text:
        message = error.message.replace("response_format.json_schema", "text.format")
        return _with(error, message.replace("response_format", "text.format"), "text")
    if error.param == "tool_choice":
        return _with(error, error.message.replace(_CHAT_CHOICE, _OUR_CHOICE), error.param)
    if error.param is None or not error.param.startswith("messages"):
        return error
    places = [at for _, at in _messages(request.input)] if not isinstance(request.input, str) else [0]
    places = [0, *places] if request.instructions else places

    def renamed(text: str) -> str:
        return re.sub(r"messages\[(\d+)\]", lambda found: f"input[{places[int(found.group(1))]}]", text)

    message = renamed(error.message)
    if error.code == "context_length_exceeded":
        message = message.replace("messages", "input")
    return _with(error, message, "input" if error.param == "messages" else renamed(error.param))


_CHAT_CHOICE = '{"type": "function", "function": {"name": "…"}}'
_OUR_CHOICE = '{"type": "function", "name": "…"}'


def _with(error: ApiError, message: str, param: str) -> ApiError:
    return ApiError(
        error.status, message, kind=error.kind, param=param, code=error.code, headers=error.headers
    )


def _messages(items: Sequence[InputItem]) -> list[tuple[ChatMessage, int]]:
    """The items as messages, each with the place of its first item; calls join the assistant's."""
    messages: list[tuple[ChatMessage, int]] = []
    for at, item in enumerate(items):
        kind = item.type or "message"
        if kind == "function_call":
            call = _call(item, at)
            if not messages or messages[-1][0].role != "assistant":
                messages.append((ChatMessage(role="assistant"), at))
            message, _ = messages[-1]
            message.tool_calls = [*(message.tool_calls or ()), call]
        elif kind == "function_call_output":
            messages.append((_result(item, at), at))
        elif kind == "message":
            messages.append((_message(item, at), at))
        else:
            raise invalid(
                f"an item of type {short(kind)!r} is not supported. Send messages, calls and their outputs",
                f"input[{at}].type",
                "unsupported_content",
            )
    return messages


def _message(item: InputItem, at: int) -> ChatMessage:
    if item.role not in _ROLES:
        raise invalid(f"input[{at}].role must be one of {', '.join(_ROLES)}", f"input[{at}].role")
    return ChatMessage.model_validate({"role": item.role, "content": item.content})


def _call(item: InputItem, at: int) -> ToolCall:
    if not item.name:
        raise invalid(f"input[{at}].name is missing. Send the name of the function", f"input[{at}].name")
    return ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))


def _result(item: InputItem, at: int) -> ChatMessage:
    for name in ("call_id", "output"):
        if getattr(item, name) is None:
            raise invalid(f"input[{at}].{name} is missing", f"input[{at}].{name}")
    return ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id)


def _tool(tool: Mapping[str, Any], at: int) -> dict[str, Any]:
    """A tool in the form of /v1/chat/completions. Raises ApiError unless it is a function with a name."""
    if tool.get("type") != "function":
        kind = short(str(tool.get("type")))
        raise invalid(
            f"a tool of type {kind!r} is not supported by this server. Send functions",
            f"tools[{at}].type",
            "unsupported_parameter",
        )
    check_function(tool, f"tools[{at}]")
    return {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(text: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any] | None:
    """What `text` asks for, as a response_format; None if nothing."""
    check_others({name: value for name, value in text.items() if name != "format"}, CHAT, ignored)
    given = text.get("format")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise invalid("text.format is not an object", "text")
    if given.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": given.get("schema")}}
    return dict(given)
