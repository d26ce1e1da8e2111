"""A bounded queue that carries one request's results from the model's thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowmem.server.api_errors import ApiError

if TYPE_CHECKING:
    from lowmem.session import Response

LOGPROB_BYTES = 128
"""Approximate size of a token's text and log-probability, in memory or as JSON."""


@dataclass(frozen=True)
class Piece:
    """The next piece of answer number `part` (from 0) of a request."""

    part: int
    response: Response


@dataclass(frozen=True)
class End:
    """The end of the results: None if all answers are complete, else the error."""

    error: ApiError | None


Event = Piece | End


class Mailbox:
    """One thread puts, one coroutine takes. Waiting pieces of the same answer are merged."""

    def __init__(self, most_bytes: int) -> None:
        """most_bytes: approximate limit of the waiting data. Must be created on the event loop that takes."""
        self._most = most_bytes
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._lock = threading.Lock()
        self._waiting: list[Event] = []
        self._bytes = 0
        self._ended = False

    def put(self, piece: Piece) -> bool:
        """Add a piece. Returns False if the limit is reached or the mailbox has ended."""
        size = _size(piece.response)
        with self._lock:
            if self._ended or self._bytes + size > self._most:
                return False
            self._bytes += size
            last = self._waiting[-1] if self._waiting else None
            if isinstance(last, Piece) and last.part == piece.part:
                self._waiting[-1] = Piece(piece.part, _joined(last.response, piece.response))
                return True  # the reader has been woken for the previous piece
            self._waiting.append(piece)
        self._wake()
        return True

    def end(self, error: ApiError | None = None) -> None:
        """End the mailbox; only the first call has an effect."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._waiting.append(End(error))
        self._wake()

    async def take(self) -> list[Event]:
        """Wait for events and return all of them, at least one. The last event of a mailbox is an End."""
        events: list[Event] = []
        while not events:  # the event may belong to a piece that was taken already
            await self._filled.wait()
            self._filled.clear()
            with self._lock:
                events, self._waiting, self._bytes = self._waiting, [], 0
        return events

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._filled.set)
        except RuntimeError:  # the loop has been closed
            pass


def _joined(first: Response, second: Response) -> Response:
    logprobs = None if second.logprobs is None else (first.logprobs or ()) + second.logprobs
    return replace(second, text=first.text + second.text, logprobs=logprobs)


def _size(response: Response) -> int:
    entries = sum(1 + len(entry.top) for entry in response.logprobs or ())
    return len(response.text) + LOGPROB_BYTES * entries
