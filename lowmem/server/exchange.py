"""Queues a request, watches it, and sends its answer complete or as a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from lowmem.server.answers import Choice, to_json, usage
from lowmem.server.api_errors import ApiError, time_is_up
from lowmem.server.events import Writer
from lowmem.server.mailbox import End, Piece
from lowmem.server.metrics import Metrics, Note, note_of
from lowmem.server.reading import Asked
from lowmem.server.worker import Ticket, Worker

if TYPE_CHECKING:
    from lowmem.session import TokenLogprob

CLIENT_LEFT = 499
"""The status in log and metrics if the client has disconnected."""


class Exchange:
    """Passes requests to the worker and answers to the clients."""

    def __init__(self, worker: Worker, metrics: Metrics, time_limit: float) -> None:
        """time_limit: seconds from the arrival of a request to the end of its last answer."""
        self._worker, self._metrics, self._time_limit = worker, metrics, time_limit

    async def answer(
        self, request: Request, asked: Asked, writer: Writer, *, choices: int, stream: bool
    ) -> HttpResponse:
        """The response to a request, complete or streamed. choices: answers per prompt.

        Raises ApiError if the request fails before anything has been sent.
        """
        note = note_of(request.scope)
        ticket = self._worker.submit(note.client, asked.works)
        answers = [
            Choice(at, echo, asked.answer_starts, parser=asked.parser())
            for at, echo in enumerate(asked.echoes)
        ]
        run = _Run(writer, answers, choices)
        batches = self._batches(request.receive, ticket, run, note)
        try:
            if stream:
                first = await anext(batches)  # an error before the first piece still gets its own HTTP status
                return EventStream(_events(first, batches, run), batches.aclose)
            async for batch in batches:
                for piece in batch:
                    text, logprobs = run.choices[piece.part].add(piece.response)
                    run.choices[piece.part].pieces.append(text)
                    run.choices[piece.part].logprobs.extend(logprobs or ())
        except BaseException:
            await batches.aclose()
            raise
        for choice in run.unfinished():
            choice.pieces.append(choice.finish())
        return HttpResponse(to_json(writer.whole(run.choices, run.figures)), media_type="application/json")

    async def _batches(
        self, receive: Receive, ticket: Ticket, run: _Run, note: Note
    ) -> AsyncGenerator[list[Piece], None]:
        """Yield the pieces of a ticket until it ends; raises ApiError if it fails.

        The ticket is stopped when this generator ends. The time limit ends answers that have started in the
        same way as max_tokens, so that the client keeps their text.
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
                        self._metrics.decode_speed(piece.response.tokens_per_second)
                if isinstance(end := events[-1], End):
                    if end.error is not None and not (begun and end.error.code == "time_limit"):
                        note.reason = end.error.code or "left"
                        raise end.error
                    note.reason = "time_limit" if end.error else run.reasons
                    for choice in run.choices:
                        choice.cut = True  # ignored by choices that have a finish_reason
                    return
        finally:
            timer.cancel()
            watch.cancel()
            self._worker.stop(ticket)
            run.fill(note)


@dataclass
class _Run:
    """The answers of a request during generation."""

    writer: Writer
    choices: list[Choice]
    choices_per_prompt: int

    @property
    def figures(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return usage(self.choices, self.choices_per_prompt)

    @property
    def reasons(self) -> str:
        """The finish_reasons of the answers, each once."""
        return ",".join(sorted({choice.finish_reason or "" for choice in self.choices}))

    def unfinished(self) -> list[Choice]:
        """The answers that the time limit has cut."""
        return [choice for choice in self.choices if choice.last is None or not choice.last.finish_reason]

    def fill(self, note: Note) -> None:
        """Write the token counts into the note."""
        figures = self.figures
        note.prompt_tokens, note.new_tokens = figures["prompt_tokens"], figures["completion_tokens"]
        note.cached_tokens = figures["prompt_tokens_details"]["cached_tokens"]


class EventStream(HttpResponse):
    """A response of server-sent events. The generator of events is closed when the response ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], end: Callable[[], Awaitable[None]]) -> None:
        """end: called once the response has ended, even if no event was sent."""
        super().__init__(headers={"Cache-Control": "no-cache, no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; waits for a client that reads slowly."""
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
    first: list[Piece], rest: AsyncGenerator[list[Piece], None], run: _Run
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; events that are ready at the same time are joined."""
    yield b"".join(_written(first, run))
    try:
        async for batch in rest:
            yield b"".join(_written(batch, run))
    except ApiError as error:
        yield run.writer.failed(error)  # the status has been sent already
        return
    for choice in run.unfinished():
        yield _opened(choice, run) + _more(choice, choice.finish(), None, run) + run.writer.closed(choice)
    yield run.writer.ended(run.choices, run.figures)


def _written(pieces: Sequence[Piece], run: _Run) -> list[bytes]:
    """The events of some pieces."""
    data: list[bytes] = []
    for piece in pieces:
        choice = run.choices[piece.part]
        data.append(_opened(choice, run))
        text, logprobs = choice.add(piece.response)
        data.append(_more(choice, text, logprobs, run))
        if piece.response.finish_reason:
            data.append(run.writer.closed(choice))
    return data


def _more(choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None, run: _Run) -> bytes:
    """The events of words, and of calls that have not been sent."""
    if not text and not logprobs and choice.sent == len(choice.calls):
        return b""
    return run.writer.text(choice, text, logprobs)


def _opened(choice: Choice, run: _Run) -> bytes:
    """The opening events of a choice, if they are still to be sent."""
    return run.writer.opened(choice) if choice.last is None else b""


async def _until_gone(receive: Receive, then: Callable[[], None]) -> None:
    """Call `then` when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
    then()


def _left() -> ApiError:
    return ApiError(CLIENT_LEFT, "the client has disconnected", code="left")
