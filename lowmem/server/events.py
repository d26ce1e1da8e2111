"""How an API writes answers, whole or as server-sent events: the contract, and OpenAI's chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lowmem.server.answers import DONE, Choice, Shape, event
from lowmem.server.api_errors import ApiError

if TYPE_CHECKING:
    from lowmem.session import TokenLogprob


class Writer(Protocol):
    """Writes the answers of one request. Events are bytes, none or several at a time."""

    def opened(self, choice: Choice) -> bytes:
        """The events that precede an answer's text."""

    def text(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        """The events with text and new parts of calls; `choice` has the figures so far."""

    def closed(self, choice: Choice) -> bytes:
        """The events that end an answer."""

    def ended(self, choices: Sequence[Choice], figures: dict[str, Any]) -> bytes:
        """The events that end the stream. figures: OpenAI's `usage`."""

    def failed(self, error: ApiError) -> bytes:
        """The events of an error after the start of the stream."""

    def whole(self, choices: Sequence[Choice], figures: dict[str, Any]) -> object:
        """The complete response, as JSON."""


class Chunks:
    """OpenAI's chunks: one event for each, then the usage if it is asked for, then [DONE]."""

    def __init__(self, shape: Shape, include_usage: bool) -> None:
        self._shape, self._include_usage = shape, include_usage

    def opened(self, choice: Choice) -> bytes:
        opening = self._shape.opening(choice)
        return event(opening) if opening else b""

    def text(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        parts = choice.calls[choice.sent :]
        choice.sent = len(choice.calls)
        words = event(self._shape.chunk(choice, text, logprobs)) if text or logprobs else b""
        return words + b"".join(event(self._shape.call(choice, part)) for part in parts)

    def closed(self, choice: Choice) -> bytes:
        return event(self._shape.closing(choice))

    def ended(self, choices: Sequence[Choice], figures: dict[str, Any]) -> bytes:
        return (event(self._shape.usage(figures)) if self._include_usage else b"") + DONE

    def failed(self, error: ApiError) -> bytes:
        return event(error.body())

    def whole(self, choices: Sequence[Choice], figures: dict[str, Any]) -> object:
        return self._shape.whole(choices, figures)
