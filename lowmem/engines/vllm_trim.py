"""Drop the line end at the start of StarChat's answers, as our own server does: it belongs to the template.

vLLM imports this file beside vllm_door.py, so only Python's standard library is used.
"""

from __future__ import annotations

import json
from typing import Any

PATH = "/v1/chat/completions"
"""The route whose answers are trimmed."""


class Trimmed:
    """An ASGI `send` that trims a chat's answer, whole or streamed."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self._start: Any = None
        self._kind = ""
        self._held = b""
        self._seen: set[int] = set()  # the choices whose text has begun

    async def __call__(self, message: Any) -> None:
        """Send a message of the response."""
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message["headers"]}
            self._kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0]
            if self._kind == "application/json":
                self._start = message  # its length is not known yet
            else:
                await self._send(message)
        elif self._kind == "text/event-stream":
            await self._send({**message, "body": self._events(message)})
        elif self._start is not None:
            self._held += message.get("body", b"")
            if not message.get("more_body"):
                await self._whole()
        else:
            await self._send(message)

    async def _whole(self) -> None:
        body = self._changed(self._held, "message") or self._held
        headers = [
            (name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"
        ]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _events(self, message: Any) -> bytes:
        """The events that are complete, each with its text trimmed."""
        *events, self._held = (self._held + message.get("body", b"")).split(b"\n\n")
        if not message.get("more_body"):
            events, self._held = [*events, self._held], b""
            return b"\n\n".join(map(self._event, events))
        return b"".join(self._event(event) + b"\n\n" for event in events)

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {"):
            return event
        changed = self._changed(event.removeprefix(b"data: "), "delta")
        return event if changed is None else b"data: " + changed

    def _changed(self, text: bytes, key: str) -> bytes | None:
        """The JSON object with trimmed choices; None if nothing changes. key: where a choice has its text."""
        try:
            found = json.loads(text)
            choices = found.get("choices") or []
            changed = [self._trim(choice, choice[key], key) for choice in choices]
        except (ValueError, AttributeError, KeyError, TypeError):
            return None
        return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() if any(changed) else None

    def _trim(self, choice: Any, part: Any, key: str) -> bool:
        content, index = part.get("content"), choice.get("index", 0)
        if not content or index in self._seen:
            return False
        self._seen.add(index)
        if not content.startswith("\n"):
            return False
        part["content"] = content[1:]
        tokens = (choice.get("logprobs") or {}).get("content")
        if tokens and tokens[0].get("token") == "\n":
            del tokens[0]
        return True
