"""What one request gets back, on its way from the model's thread to the event loop, within a bound."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowmem.server.api_errors import ApiError

if TYPE_CHECKING:
    from lowmem.session import Response

LOGPROB_BYTES = 128
"""About what a token's text and log-probability take, as values or as JSON."""


@dataclass(frozen=True)
class Piece:
    """The next text of one of a request's answers, which are counted from 0."""

    part: int
    response: Response


@dataclass(frozen=True)
class End:
    """No more comes: all answers are whole (None), or the error says what went wrong."""

    error: ApiError | None


Event = Piece | End


class Mailbox:
    """One thread puts, one coroutine takes. Neighbouring pieces of an answer become one while they wait."""

    def __init__(self, most_bytes: int) -> None:
        """`most_bytes`: what may wait, about; to be made on the event loop that takes."""
        self._most = most_bytes
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._lock = threading.Lock()
        self._waiting: list[Event] = []
        self._bytes = 0
        self._ended = False

    def put(self, piece: Piece) -> bool:
        """Add a piece; False when too much waits already, or nobody waits for it any more."""
        size = _size(piece.response)
        with self._lock:
            if self._ended or self._bytes + size > self._most:
                return False
            self._bytes += size
            last = self._waiting[-1] if self._waiting else None
            if isinstance(last, Piece) and last.part == piece.part:
                self._waiting[-1] = Piece(piece.part, _joined(last.response, piece.response))
                return True  # whoever takes has been woken for the one before
            self._waiting.append(piece)
        self._wake()
        return True

    def end(self, error: ApiError | None = None) -> None:
        """Nothing comes any more; the first end counts."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._waiting.append(End(error))
        self._wake()

    async def take(self) -> list[Event]:
        """All that has come since the last time, at least one; an End is the last of all."""
        events: list[Event] = []
        while not events:  # it may have been woken for what was taken already
            await self._filled.wait()
            self._filled.clear()
            with self._lock:
                events, self._waiting, self._bytes = self._waiting, [], 0
        return events

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._filled.set)
        except RuntimeError:  # the loop has been closed: nobody takes any more
            pass


def _joined(first: Response, second: Response) -> Response:
    logprobs = None if second.logprobs is None else (first.logprobs or ()) + second.logprobs
    return replace(second, text=first.text + second.text, logprobs=logprobs)


def _size(response: Response) -> int:
    entries = sum(1 + len(entry.top) for entry in response.logprobs or ())
    return len(response.text) + LOGPROB_BYTES * entries
