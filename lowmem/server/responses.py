"""OpenAI's /v1/responses: its request, as the chat request that it means.

A request's fields are those of /v1/chat/completions, but for the tables here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lowmem.server.api_errors import ApiError, invalid, short
from lowmem.server.fields import CHAT, Accepted, Refused, check_others
from lowmem.server.protocol import (
    MOST_MESSAGES,
    ChatMessage,
    ChatRequest,
    ContentPart,
    Limit,
    SamplingFields,
    Text,
)

RESPONSES = "/v1/responses"
_HERE = (RESPONSES,)
_RESEND = "Send the whole conversation in input"
_ROLES = ("system", "developer", "user", "assistant")

REFUSED = (
    Refused(("previous_response_id", "conversation"), "a conversation that is kept", _RESEND, routes=_HERE),
    Refused(("prompt",), "a prompt that is kept", "Send it in input and instructions", routes=_HERE),
    Refused(("background",), "an answer to ask for later", neutral=(False,), routes=_HERE),
    Refused(("tools",), "tools", "Use /v1/chat/completions", routes=_HERE),
    Refused(("tool_choice",), "a forced tool", neutral=("auto", "none"), routes=_HERE),
    Refused(
        ("text",),
        "structured output",
        "Use /v1/chat/completions",
        ({"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"}),
        _HERE,
    ),
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
    Accepted(("max_tool_calls", "parallel_tool_calls"), "limit calls of `tools`", _HERE),
    Accepted(("stream_options",), "the usage is in the last event", _HERE),
)
"""`store` is accepted too, though nothing is kept."""


class InputItem(BaseModel):
    """A message of a conversation. `responses` refuses items of other types."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: Text | None = None
    role: Text | None = None
    content: Text | Annotated[list[ContentPart | Text], Field(max_length=MOST_MESSAGES)] | None = None


class ResponsesRequest(SamplingFields):
    """The body of POST /v1/responses."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_MESSAGES)]
    """A question, or a conversation."""
    instructions: Text | None = None
    """A system text before the conversation."""
    max_output_tokens: Limit | None = None
    metadata: dict[str, Any] | None = None
    """Returned with the response."""


_NOT_HERE = ("n", "max_tokens", "n_predict", "stream_options")
"""Fields of other routes that the schema inherits."""


def as_chat(request: ResponsesRequest, ignored: Collection[str] = ()) -> ChatRequest:
    """The chat request that a request means. Raises ApiError for one that asks for something else.

    ignored: names of fields that pass.
    """
    others: dict[str, Any] = {name: getattr(request, name) for name in _NOT_HERE}
    _check(others | (request.model_extra or {}), ignored)
    if request.max_output_tokens == 0:
        raise invalid("max_output_tokens is 0. Ask for at least one token", "max_output_tokens")
    if isinstance(request.input, str):
        messages = [ChatMessage(role="user", content=request.input)]
    else:
        messages = [_message(item, at) for at, item in enumerate(request.input)]
    if request.instructions:
        messages.insert(0, ChatMessage(role="system", content=request.instructions))
    fields = {name: getattr(request, name) for name in SamplingFields.model_fields if name not in _NOT_HERE}
    return ChatRequest(messages=messages, max_completion_tokens=request.max_output_tokens, **fields)


def as_asked(error: ApiError, request: ResponsesRequest) -> ApiError:
    """An error about the chat request, with the names of this one's fields."""
    if error.param is None or not error.param.startswith("messages"):
        return error
    before = 1 if request.instructions else 0

    def renamed(text: str) -> str:
        return re.sub(r"messages\[(\d+)\]", lambda found: f"input[{int(found.group(1)) - before}]", text)

    message = renamed(error.message)
    if error.code == "context_length_exceeded":
        message = message.replace("messages", "input")
    param = "input" if error.param == "messages" else renamed(error.param)
    return ApiError(
        error.status, message, kind=error.kind, param=param, code=error.code, headers=error.headers
    )


def _check(fields: Mapping[str, Any], ignored: Collection[str]) -> None:
    refused = {name: row for row in REFUSED for name in row.names}
    accepted = {name for row in ACCEPTED for name in row.names}
    rest = {}
    for name, value in fields.items():
        row = refused.get(name)
        if row is not None and name not in ignored and not row.asks_nothing(value):
            raise row.error(name)
        if row is None and name not in accepted:
            rest[name] = value
    check_others(rest, CHAT, ignored)


def _message(item: InputItem, at: int) -> ChatMessage:
    if item.type not in (None, "message"):
        raise invalid(
            f"an item of type {short(item.type)!r} is not supported. Send messages",
            f"input[{at}].type",
            "unsupported_content",
        )
    if item.role not in _ROLES:
        raise invalid(f"input[{at}].role must be one of {', '.join(_ROLES)}", f"input[{at}].role")
    return ChatMessage.model_validate({"role": item.role, "content": item.content})
