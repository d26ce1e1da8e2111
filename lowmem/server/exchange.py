"""From a request's work to its answer: queued, watched, and sent whole or as a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from lowmem.server.answers import DONE, Choice, Shape, event, to_json, usage
from lowmem.server.api_errors import ApiError, time_is_up
from lowmem.server.mailbox import End, Piece
from lowmem.server.metrics import Metrics, Note, note_of
from lowmem.server.reading import Asked
from lowmem.server.worker import Ticket, Worker

CLIENT_LEFT = 499
"""In log and metrics: nobody is there to be answered."""


class Exchange:
    """Brings requests to the worker, and what comes back to their clients."""

    def __init__(self, worker: Worker, metrics: Metrics, time_limit: float) -> None:
        """`time_limit`: seconds from a request's arrival to the end of its last answer."""
        self._worker, self._metrics, self._time_limit = worker, metrics, time_limit

    async def answer(
        self, request: Request, asked: Asked, shape: Shape, *, choices: int, stream: bool, include_usage: bool
    ) -> HttpResponse:
        """The answer to a request, or the beginning of a stream of it. ApiError as long as nothing is sent.

        `choices`: answers a prompt.
        """
        note = note_of(request.scope)
        ticket = self._worker.submit(note.client, asked.works)
        run = _Run(
            shape, [Choice(at, echo, asked.answer_starts) for at, echo in enumerate(asked.echoes)], choices
        )
        batches = self._batches(request.receive, ticket, run, note)
        try:
            if stream:
                first = await anext(batches)  # an error up to here is an error of HTTP
                return EventStream(_events(first, batches, run, include_usage), batches.aclose)
            async for batch in batches:
                for piece in batch:
                    text, logprobs = run.choices[piece.part].add(piece.response)
                    run.choices[piece.part].pieces.append(text)
                    run.choices[piece.part].logprobs.extend(logprobs or ())
        except BaseException:
            await batches.aclose()
            raise
        return HttpResponse(to_json(shape.whole(run.choices, run.figures)), media_type="application/json")

    async def _batches(
        self, receive: Receive, ticket: Ticket, run: _Run, note: Note
    ) -> AsyncGenerator[list[Piece], None]:
        """What comes for a ticket, until its end; raises ApiError for an end that is none.

        Whatever ends this generator ends the ticket. The time limit ends answers that have begun as
        max_tokens does, since what is there is of use.
        """
        loop = asyncio.get_running_loop()
        begun = False
        left = self._time_limit - (time.monotonic() - note.start)
        timer = loop.call_later(left, self._worker.stop, ticket, time_is_up(self._time_limit))
        watch = asyncio.create_task(_until_gone(receive, lambda: self._worker.stop(ticket, _left())))
        try:
            while True:
                events = await ticket.mailbox.take()
                pieces = [entry for entry in events if isinstance(entry, Piece)]
                if pieces and not begun:
                    begun = True
                    self._metrics.first_token(time.monotonic() - note.start)
                if pieces:
                    yield pieces
                for piece in pieces:
                    if piece.response.finish_reason:
                        self._metrics.pace(piece.response.tokens_per_second)
                if isinstance(end := events[-1], End):
                    if end.error is not None and not (begun and end.error.code == "time_limit"):
                        note.reason = end.error.code or "left"
                        raise end.error
                    note.reason = "time_limit" if end.error else run.reasons
                    for choice in run.choices:
                        choice.cut = True  # those that have no reason of their own by now
                    return
        finally:
            timer.cancel()
            watch.cancel()
            self._worker.stop(ticket)
            run.fill(note)


@dataclass
class _Run:
    """A request's answers while they grow."""

    shape: Shape
    choices: list[Choice]
    choices_a_prompt: int

    @property
    def figures(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return usage(self.choices, self.choices_a_prompt)

    @property
    def reasons(self) -> str:
        """Why the answers ended, each reason once."""
        return ",".join(sorted({choice.finish_reason or "" for choice in self.choices}))

    def fill(self, note: Note) -> None:
        """Tell the note how many tokens there were."""
        figures = self.figures
        note.prompt_tokens, note.new_tokens = figures["prompt_tokens"], figures["completion_tokens"]
        note.cached_tokens = figures["prompt_tokens_details"]["cached_tokens"]


class EventStream(HttpResponse):
    """Server-sent events; when the response ends, however it does, so do the events."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], end: Callable[[], Awaitable[None]]) -> None:
        """`end` is called when no more events are wanted, also if none ever was."""
        super().__init__(headers={"Cache-Control": "no-cache, no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send; waits while the client reads slowly."""
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            await self._events.aclose()
            await self._end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(
    first: list[Piece], rest: AsyncGenerator[list[Piece], None], run: _Run, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """All events of a stream, those that are ready together as one."""
    yield b"".join(_written(first, run))
    try:
        async for batch in rest:
            yield b"".join(_written(batch, run))
    except ApiError as error:
        yield event(error.body())  # the status is long sent
        return
    cut = [choice for choice in run.choices if choice.last is None or not choice.last.finish_reason]
    for choice in cut:
        yield b"".join([*_opened(choice, run), event(run.shape.closing(choice))])
    if include_usage:
        yield event(run.shape.usage(run.figures))
    yield DONE


def _written(pieces: Sequence[Piece], run: _Run) -> list[bytes]:
    """The events of some pieces."""
    data: list[bytes] = []
    for piece in pieces:
        choice = run.choices[piece.part]
        data += _opened(choice, run)
        text, logprobs = choice.add(piece.response)
        if text or logprobs:
            data.append(event(run.shape.chunk(choice, text, logprobs)))
        if piece.response.finish_reason:
            data.append(event(run.shape.closing(choice)))
    return data


def _opened(choice: Choice, run: _Run) -> list[bytes]:
    """The event before a choice's first, if there is one and nothing has come yet."""
    opening = run.shape.opening(choice) if choice.last is None else None
    return [event(opening)] if opening else []


async def _until_gone(receive: Receive, then: Callable[[], None]) -> None:
    """Call `then` when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    then()


def _left() -> ApiError:
    return ApiError(CLIENT_LEFT, "the client has left", code="left")
