"""Writes OpenAI's response objects and their typed events, of /v1/responses."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lowmem.server.answers import Choice, to_json
from lowmem.server.api_errors import ApiError
from lowmem.server.calls import CallDelta

if TYPE_CHECKING:
    from lowmem.server.responses import ResponsesRequest
    from lowmem.session import TokenLogprob


@dataclass
class _Item:
    """One item of an answer: a message, or a call of a tool."""

    index: int
    call: CallDelta | None = None
    """The first part of the call; None for a message."""
    parts: list[str] = field(default_factory=list)
    """The text, or the arguments, as far as they have come."""
    status: str = "in_progress"
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{'msg' if self.call is None else 'fc'}_{uuid.uuid4().hex}"

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def as_json(self) -> dict[str, Any]:
        """OpenAI's object; the content of a message that has just begun is still missing."""
        common = {"id": self.id, "status": self.status}
        if self.call is not None:
            named = {"call_id": self.call.id, "name": self.call.name, "arguments": self.text}
            return {**common, "type": "function_call", **named}
        content = [] if self.status == "in_progress" else [_part(self.text)]
        return {**common, "type": "message", "role": "assistant", "content": content}


class ResponseWriter:
    """Writes the one answer of a request: a message of the assistant, and calls of tools."""

    def __init__(self, model: str, request: ResponsesRequest) -> None:
        self._id = f"resp_{uuid.uuid4().hex}"
        self._model, self._request = model, request
        self._created = int(time.time())
        self._items: list[_Item] = []
        self._events = 0  # written so far

    def opened(self, choice: Choice) -> bytes:
        empty = self._response("in_progress", [], None)
        return self._event("response.created", response=empty) + self._event(
            "response.in_progress", response=empty
        )

    def text(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        written = self._more_text(text) if text else b""
        parts = choice.calls[choice.sent :]
        choice.sent = len(choice.calls)
        return written + b"".join(self._more_call(part) for part in parts)

    def closed(self, choice: Choice) -> bytes:
        begun = b"" if self._items else self._begin(_Item(0))  # an answer without a word is an empty message
        return begun + self._end(_status(choice))

    def ended(self, choices: Sequence[Choice], figures: dict[str, Any]) -> bytes:
        status = _status(choices[0])
        return self._event(f"response.{status}", response=self._whole(status, figures))

    def failed(self, error: ApiError) -> bytes:
        response = self._response("failed", [], None)
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=response)

    def whole(self, choices: Sequence[Choice], figures: dict[str, Any]) -> object:
        (choice,) = choices
        self.text(choice, "".join(choice.pieces), None)
        self.closed(choice)
        return self._whole(_status(choice), figures)

    def _more_text(self, text: str) -> bytes:
        begun = b""
        if not self._items or self._items[-1].call is not None:
            begun = self._begin(_Item(len(self._items)))
        item = self._items[-1]
        item.parts.append(text)
        return begun + self._event_of("response.output_text.delta", item, delta=text, logprobs=[])

    def _more_call(self, part: CallDelta) -> bytes:
        begun = self._begin(_Item(len(self._items), part)) if part.name is not None else b""
        if not part.arguments:
            return begun
        item = self._items[-1]
        item.parts.append(part.arguments)
        return begun + self._event_of("response.function_call_arguments.delta", item, delta=part.arguments)

    def _begin(self, item: _Item) -> bytes:
        """End the item before, which is complete, and open another."""
        written = self._end("completed") if self._items else b""
        self._items.append(item)
        written += self._event("response.output_item.added", output_index=item.index, item=item.as_json())
        if item.call is None:
            written += self._event_of("response.content_part.added", item, part=_part(""))
        return written

    def _end(self, status: str) -> bytes:
        item = self._items[-1]
        item.status = status
        if item.call is None:
            done = self._event_of("response.output_text.done", item, text=item.text, logprobs=[])
            done += self._event_of("response.content_part.done", item, part=_part(item.text))
        else:
            done = self._event_of(
                "response.function_call_arguments.done", item, name=item.call.name, arguments=item.text
            )
        return done + self._event("response.output_item.done", output_index=item.index, item=item.as_json())

    def _whole(self, status: str, figures: dict[str, Any]) -> dict[str, Any]:
        return self._response(status, [item.as_json() for item in self._items], figures)

    def _response(
        self, status: str, output: list[dict[str, Any]], figures: dict[str, Any] | None
    ) -> dict[str, Any]:
        request = self._request
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": request.text or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": _usage(figures) if figures else None,
        }

    def _event_of(self, kind: str, item: _Item, **fields: Any) -> bytes:
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        if item.call is None:
            place["content_index"] = 0
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return b"event: " + kind.encode() + b"\ndata: " + to_json(data) + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish_reason == "length" else "completed"


def _usage(figures: dict[str, Any]) -> dict[str, Any]:
    cached = figures["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": figures["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},  # the second bills writes
        "output_tokens": figures["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": figures["total_tokens"],
    }
