"""Writes OpenAI's response objects and their typed events, of /v1/responses."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowmem.server.answers import Choice, to_json
from lowmem.server.api_errors import ApiError

if TYPE_CHECKING:
    from lowmem.server.responses import ResponsesRequest
    from lowmem.session import TokenLogprob

_PLACE = {"output_index": 0, "content_index": 0}


class ResponseWriter:
    """Writes the one answer of a request, as a message of the assistant."""

    def __init__(self, model: str, request: ResponsesRequest) -> None:
        self._id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._model, self._request = model, request
        self._created = int(time.time())
        self._sent: list[str] = []  # the text so far
        self._events = 0  # written so far

    def opened(self, choice: Choice) -> bytes:
        empty = self._response("in_progress", [], None)
        return b"".join(
            (
                self._event("response.created", response=empty),
                self._event("response.in_progress", response=empty),
                self._event(
                    "response.output_item.added", output_index=0, item=self._message("in_progress", [])
                ),
                self._event("response.content_part.added", item_id=self._item, part=_part(""), **_PLACE),
            )
        )

    def text(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        if not text:
            return b""
        self._sent.append(text)
        return self._event(
            "response.output_text.delta", item_id=self._item, delta=text, logprobs=[], **_PLACE
        )

    def closed(self, choice: Choice) -> bytes:
        text = "".join(self._sent)
        message = self._message(_status(choice), [_part(text)])
        return b"".join(
            (
                self._event(
                    "response.output_text.done", item_id=self._item, text=text, logprobs=[], **_PLACE
                ),
                self._event("response.content_part.done", item_id=self._item, part=_part(text), **_PLACE),
                self._event("response.output_item.done", output_index=0, item=message),
            )
        )

    def ended(self, choices: Sequence[Choice], figures: dict[str, Any]) -> bytes:
        response = self._ended(choices[0], "".join(self._sent), figures)
        return self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> bytes:
        response = self._response("failed", [], None)
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=response)

    def whole(self, choices: Sequence[Choice], figures: dict[str, Any]) -> object:
        return self._ended(choices[0], "".join(choices[0].pieces), figures)

    def _ended(self, choice: Choice, text: str, figures: dict[str, Any]) -> dict[str, Any]:
        status = _status(choice)
        return self._response(status, [self._message(status, [_part(text)])], figures)

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
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": _usage(figures) if figures else None,
        }

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._item,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return b"event: " + kind.encode() + b"\ndata: " + to_json(data) + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(choice: Choice) -> str:
    return "completed" if choice.finish_reason == "stop" else "incomplete"


def _usage(figures: dict[str, Any]) -> dict[str, Any]:
    cached = figures["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": figures["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},  # the second bills writes
        "output_tokens": figures["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": figures["total_tokens"],
    }
