"""Builds OpenAI's response objects, complete or in chunks, from pieces of answers. Pure functions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lowmem.server.calls import CallDelta, CallParser

if TYPE_CHECKING:
    from lowmem.session import Response, TokenLogprob

_LEAST_LOGPROB = -9999.0  # replaces -infinity, which JSON lacks
_REASONS = {"stop": "stop", "length": "length", "context": "length"}


@dataclass
class Choice:
    """One answer, as far as it has been generated."""

    index: int
    echo: str = ""
    """Text to put before the answer."""
    trim: bool = False
    """Drop a line end at the start of the answer: it belongs to the dialogue template."""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Response | None = None
    """The latest piece, which has the latest figures."""
    cut: bool = False
    """The time limit ended the answer."""
    written: int = 0
    """Characters of the tokens whose log-probabilities have been sent."""
    parser: CallParser | None = None
    """Finds calls of tools in the answer."""
    calls: list[CallDelta] = field(default_factory=list)
    """The parts of calls so far."""
    sent: int = 0
    """How many of them have been sent."""

    def add(self, response: Response) -> tuple[str, tuple[TokenLogprob, ...] | None]:
        """Take the next piece; returns the text and log-probabilities to send for it."""
        text, logprobs = response.text, response.logprobs
        if self.trim and text:
            self.trim = False
            if text.startswith("\n"):
                text = text[1:]
                if logprobs and logprobs[0].text == "\n":
                    logprobs = logprobs[1:]
        if self.last is None:
            text = self.echo + text
        self.last = response
        if self.parser is not None:
            text, calls = self.parser.push(text)
            self.calls += calls
            if response.finish_reason:
                text += self.finish()
        return text, logprobs

    def finish(self) -> str:
        """The words that were held as the possible start of a call, at the end of the answer."""
        if self.parser is None:
            return ""
        text, calls = self.parser.finish()
        self.calls += calls
        return text

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's finish_reason; "length" if the time limit ended the answer, None before its end."""
        if self.last is None or self.last.finish_reason is None:
            return "length" if self.cut else None
        reason = _REASONS[self.last.finish_reason]
        return "tool_calls" if self.calls and reason == "stop" else reason


def usage(choices: Sequence[Choice], choices_per_prompt: int) -> dict[str, Any]:
    """OpenAI's `usage`: tokens of the prompts, each counted once, and of all answers.

    Answers that have not started do not count. If several answers continue one prompt, `cached_tokens` is
    that of the first.
    """
    firsts = [choice.last for choice in choices[::choices_per_prompt] if choice.last]
    prompt = sum(last.prompt_tokens for last in firsts)
    new = sum(choice.last.new_tokens for choice in choices if choice.last)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(last.cached_tokens for last in firsts)},
    }


class Shape(Protocol):
    """How one of the API's two routes writes answers."""

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The chunk that precedes an answer's text, or None."""

    def chunk(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """A chunk with text."""

    def call(self, choice: Choice, part: CallDelta) -> dict[str, Any]:
        """A chunk with a part of a call."""

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk with the finish_reason."""

    def usage(self, figures: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the usage."""

    def whole(self, choices: Sequence[Choice], figures: dict[str, Any]) -> dict[str, Any]:
        """The complete response."""


class _Envelope:
    def __init__(self, prefix: str, kind: str, model: str, include_usage: bool) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._kind, self._model, self._include_usage = kind, model, include_usage
        self._created = int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _chunk(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._object(kind, choices)
        if self._include_usage:
            chunk["usage"] = None  # OpenAI sends null in every chunk but the last
        return chunk


class ChatShape(_Envelope):
    """/v1/chat/completions."""

    def __init__(self, model: str, include_usage: bool = False) -> None:
        super().__init__("chatcmpl", "chat.completion", model, include_usage)

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return self._delta(choice, {"role": "assistant", "content": "" if choice.parser is None else None})

    def chunk(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        return self._delta(choice, {"content": text}, logprobs)

    def call(self, choice: Choice, part: CallDelta) -> dict[str, Any]:
        function = {"name": part.name} if part.name is not None else {}
        begun = {"id": part.id, "type": "function"} if part.id is not None else {}
        call = {"index": part.index, **begun, "function": {**function, "arguments": part.arguments}}
        return self._delta(choice, {"tool_calls": [call]})

    def closing(self, choice: Choice) -> dict[str, Any]:
        return self._delta(choice, {}, reason=choice.finish_reason)

    def usage(self, figures: dict[str, Any]) -> dict[str, Any]:
        return {**self._object("chat.completion.chunk", []), "usage": figures}

    def whole(self, choices: Sequence[Choice], figures: dict[str, Any]) -> dict[str, Any]:
        entries = [
            {
                "index": choice.index,
                "message": _message(choice),
                "logprobs": _chat_logprobs(_logged(choice)),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self._object("chat.completion", entries), "usage": figures}

    def _delta(
        self,
        choice: Choice,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        entry = {
            "index": choice.index,
            "delta": delta,
            "logprobs": _chat_logprobs(logprobs),
            "finish_reason": reason,
        }
        return self._chunk("chat.completion.chunk", [entry])


class CompletionShape(_Envelope):
    """/v1/completions."""

    def __init__(self, model: str, include_usage: bool = False) -> None:
        super().__init__("cmpl", "text_completion", model, include_usage)

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return None

    def chunk(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        entry = self._entry(choice, text, _completion_logprobs(logprobs, choice.written), None)
        choice.written += sum(len(token.text) for token in logprobs or ())
        return self._chunk("text_completion", [entry])

    def call(self, choice: Choice, part: CallDelta) -> dict[str, Any]:
        raise AssertionError("calls of tools belong to chats")

    def closing(self, choice: Choice) -> dict[str, Any]:
        return self._chunk("text_completion", [self._entry(choice, "", None, choice.finish_reason)])

    def usage(self, figures: dict[str, Any]) -> dict[str, Any]:
        return {**self._object("text_completion", []), "usage": figures}

    def whole(self, choices: Sequence[Choice], figures: dict[str, Any]) -> dict[str, Any]:
        entries = [
            self._entry(
                choice, "".join(choice.pieces), _completion_logprobs(_logged(choice), 0), choice.finish_reason
            )
            for choice in choices
        ]
        return {**self._object("text_completion", entries), "usage": figures}

    def _entry(
        self, choice: Choice, text: str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _message(choice: Choice) -> dict[str, Any]:
    """The message of an answer, with the calls in it."""
    text = "".join(choice.pieces)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    calls: list[dict[str, Any]] = []
    for part in choice.calls:
        if part.name is not None:
            function = {"name": part.name, "arguments": ""}
            calls.append({"id": part.id, "type": "function", "function": function})
        calls[part.index]["function"]["arguments"] += part.arguments
    if calls:
        message |= {"content": text or None, "tool_calls": calls}
    return message


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event. It is pure ASCII, so no client can take a part of it for a line end."""
    return b"data: " + to_json(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def to_json(data: object) -> bytes:
    """JSON in ASCII."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).encode("ascii")


def _logged(choice: Choice) -> list[TokenLogprob] | None:
    """The log-probabilities of an answer, or None if the request did not ask for them."""
    return choice.logprobs if choice.last is not None and choice.last.logprobs is not None else None


def _chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    content = [
        {
            **_token(entry.text, entry.logprob or 0.0),
            "top_logprobs": [_token(text, logprob) for text, logprob in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # The text of an incomplete character is U+FFFD, so its bytes are unknown.
    data = None if "\ufffd" in text else list(text.encode("utf-8"))
    return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": data}


def _completion_logprobs(logprobs: Sequence[TokenLogprob] | None, start: int) -> dict[str, Any] | None:
    """`start`: characters of the answer before these tokens."""
    if logprobs is None:
        return None
    offsets = []
    for entry in logprobs:
        offsets.append(start)
        start += len(entry.text)
    return {
        "tokens": [entry.text for entry in logprobs],
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [_best(entry) for entry in logprobs],
        "text_offset": offsets,
    }


def _best(entry: TokenLogprob) -> dict[str, float] | None:
    """The most likely tokens and the chosen one, as in OpenAI's API; None where there is nothing to choose.

    Several tokens may have the same text, that of an incomplete character: the most likely one counts.
    """
    if entry.logprob is None:
        return None
    found: dict[str, float] = {}
    for text, logprob in (*entry.top, (entry.text, entry.logprob)):
        found.setdefault(text, max(logprob, _LEAST_LOGPROB))
    return found


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)
