"""The thread that owns the model: it loads it and answers one request after the other.

The event loop submits a request and reads its results from the ticket's mailbox. Requests wait in a bounded
queue in which clients take turns; a request for several answers takes one turn for each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, LowmemError
from lowmem.server.api_errors import ApiError, failed, invalid_request, queue_full, shutting_down, too_slow
from lowmem.server.echo import echo_prompt
from lowmem.server.fair_queue import FairQueue
from lowmem.server.holes import fill_hole
from lowmem.server.lines import NO_LIMITS, LineLimits
from lowmem.server.mailbox import Mailbox, Piece

if TYPE_CHECKING:
    from lowmem.prompts import Snippet
    from lowmem.session import Response, Session

MOST_UNREAD_BYTES = 16 << 20
"""A client that leaves more than this unread is dropped."""


@dataclass(frozen=True)
class Continuation:
    """A prompt to continue."""

    ids: tuple[int, ...]
    params: SamplingParams
    scored: bool = False
    """The log-probabilities of the prompt come before those of the answer."""
    answered: bool = True
    """False: the prompt alone is asked for."""


@dataclass(frozen=True)
class Hole:
    """A gap between two texts to fill in."""

    prefix: str
    suffix: str
    params: SamplingParams
    snippets: tuple[Snippet, ...] | None = None
    """Text of other files; see `Session.fill_in`."""
    limits: LineLimits = NO_LIMITS
    """What ends the answer at the end of a line."""
    answered: bool = True
    """False: the prompt is read into the KV cache, and the answer is empty."""


Work = Continuation | Hole


@dataclass(eq=False)
class Ticket:
    """A submitted request."""

    client: str
    works: tuple[Work, ...]
    """One item per answer."""
    mailbox: Mailbox
    """Receives the answers."""
    arrived: float = field(default_factory=time.monotonic)
    next_part: int = 0
    """Number of the next answer."""
    stopped: bool = False
    """The remaining answers are no longer needed."""


@dataclass(frozen=True)
class Counts:
    """What the worker has done so far."""

    answers: int = 0
    """Completed answers."""
    cancelled: int = 0
    """Answers stopped because their client left, was too slow, or exceeded the time limit."""
    failed: int = 0
    """Answers that ended in an internal error."""
    tokens: int = 0
    """Generated tokens, including those of cancelled answers."""


class _Unwanted(Exception):
    """The answer is no longer needed."""


class Worker:
    """The model's thread and its queue. All methods may be called from any thread."""

    def __init__(
        self,
        open_session: Callable[[], Session],
        *,
        queue_limit: int = 32,
        report: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """open_session: called in the model's thread. queue_limit: most waiting requests. report: receives
        internal errors."""
        self.queue_limit = queue_limit
        self.counts = Counts()
        self.current: Response | None = None
        """The last piece of the current answer, or of the previous one."""
        self._open_session = open_session
        self._report = report
        self._session: Session | None = None
        self._failure: BaseException | None = None
        self._opened = threading.Event()
        self._changed = threading.Condition()
        self._queue: FairQueue[Ticket] = FairQueue()
        self._serving: Ticket | None = None
        self._closed = False
        self._seconds_per_answer = 1.0  # a running mean
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> Session:
        """Start the thread and wait until the model is loaded; raises the error of loading."""
        self._thread.start()
        self._opened.wait()
        if self._failure is not None:
            raise self._failure
        return self.session

    @property
    def session(self) -> Session:
        """The model's session, for reading its properties; only the model's thread generates with it."""
        assert self._session is not None, "the worker has not been started"
        return self._session

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        with self._changed:
            return len(self._queue)

    @property
    def busy(self) -> bool:
        """Whether an answer is being generated."""
        return self._serving is not None

    @property
    def closed(self) -> bool:
        """Whether the worker refuses new requests."""
        return self._closed

    def check_room(self, client: str) -> None:
        """Raise ApiError if a request of this client would be refused now."""
        with self._changed:
            if self._closed:
                raise shutting_down()
            if len(self._queue) >= self.queue_limit and not self._queue.would_crowd_out(client):
                raise queue_full(self._wait())

    def submit(self, client: str, works: Sequence[Work]) -> Ticket:
        """Queue a request; must be called on the event loop. Raises ApiError if the queue is full or closed.

        In a full queue, the last request of the client with the most requests gives way, if that is fairer.
        """
        ticket = Ticket(client, tuple(works), Mailbox(MOST_UNREAD_BYTES))
        with self._changed:
            if self._closed:
                raise shutting_down()
            if len(self._queue) >= self.queue_limit:
                other = self._queue.crowded_out(client)
                if other is None:
                    raise queue_full(self._wait())
                other.stopped = True
                other.mailbox.end(queue_full(self._wait()))
            self._queue.push(client, ticket)
            self._changed.notify()
        return ticket

    def stop(self, ticket: Ticket, error: ApiError | None = None) -> None:
        """Cancel a ticket: remove it from the queue, or end its generation at the next token.

        error: ends its mailbox, unless that has ended already.
        """
        ticket.stopped = True
        ticket.mailbox.end(error)
        with self._changed:
            if self._queue.remove(ticket.client, ticket):
                self.counts = replace(self.counts, cancelled=self.counts.cancelled + 1)

    def close(self) -> None:
        """Refuse new and waiting requests; requests that have started continue."""
        with self._changed:
            self._closed = True
            for ticket in self._queue.clear():
                if ticket.next_part:
                    self._queue.push(ticket.client, ticket)
                else:
                    ticket.stopped = True
                    ticket.mailbox.end(shutting_down())
            self._changed.notify()

    def abandon(self) -> None:
        """Close, and cancel the requests that have started."""
        self.close()
        with self._changed:
            begun = [*self._queue.clear(), *([self._serving] if self._serving else [])]
            self._changed.notify()
        for ticket in begun:
            self.stop(ticket, shutting_down())

    def join(self, timeout: float) -> bool:
        """Wait for the thread to end after `close`; returns whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._session = self._open_session()
        except BaseException as error:  # `start` raises it in the waiting thread
            self._failure = error
            return
        finally:
            self._opened.set()
        while (ticket := self._next()) is not None:
            self._serve(self._session, ticket)

    def _next(self) -> Ticket | None:
        """Wait for the next request; None once the worker is closed and the queue is empty."""
        engine = self.session.engine
        while True:
            with self._changed:
                self._serving = None
                if not self._queue and not self._closed and not engine.repacking:
                    self._changed.wait()
                if self._queue:
                    self._serving = self._queue.pop()
                    return self._serving
                if self._closed:
                    return None
            try:
                engine.repacking.run_one()  # while no request is waiting
            except Exception as error:
                self._report(error)

    def _serve(self, session: Session, ticket: Ticket) -> None:
        """Generate the next answer of a ticket. An error ends this ticket only."""
        start = time.monotonic()
        part, ticket.next_part = ticket.next_part, ticket.next_part + 1
        tokens = 0

        def goes_on(*_: int) -> None:
            if ticket.stopped:
                raise _Unwanted

        def count() -> None:
            nonlocal tokens
            tokens += 1
            goes_on()

        error: ApiError | None = None
        counted = {"answers": 0, "cancelled": 0, "failed": 0}
        try:
            goes_on()
            with _closing(_responses(session, ticket.works[part], goes_on, count)) as pieces:
                for response in pieces:
                    self.current = response
                    if not ticket.mailbox.put(Piece(part, response)):
                        raise _Unwanted
            counted["answers"] = 1
        except _Unwanted:
            counted["cancelled"] = 1
            error = too_slow()  # ignored if the mailbox has ended for another reason
        except InvalidRequestError as caught:
            error = invalid_request(caught)
        except Exception as caught:
            counted["failed"] = 1
            error = self._explained(caught)
        with self._changed:
            self.counts = Counts(
                **{name: getattr(self.counts, name) + value for name, value in counted.items()},
                tokens=self.counts.tokens + tokens,
            )
            self._seconds_per_answer += 0.2 * (time.monotonic() - start - self._seconds_per_answer)
            if error is None and not ticket.stopped and ticket.next_part < len(ticket.works):
                self._queue.push_front(ticket.client, ticket)
                return
        ticket.mailbox.end(error)

    def _explained(self, error: Exception) -> ApiError:
        self._report(error)
        if isinstance(error, LowmemError):  # for example, output that is not finite
            return ApiError(500, str(error), kind="server_error", code="model_error")
        return failed()

    def _wait(self) -> int:
        """Seconds after which a client should try again."""
        return max(1, min(60, round(self._seconds_per_answer)))


def _responses(
    session: Session, work: Work, on_prefill: Callable[[int, int], None], on_token: Callable[[], None]
) -> Iterator[Response]:
    """The pieces of one answer."""
    if isinstance(work, Hole):
        return fill_hole(session, work, on_prefill, on_token)
    if not work.scored and work.answered:
        return session.continue_ids(work.ids, work.params, on_prefill=on_prefill, on_token=on_token)
    return echo_prompt(session, work, on_prefill, on_token)


@contextmanager
def _closing(pieces: Iterator[Response]) -> Iterator[Iterator[Response]]:
    """Close the generator when the loop over it ends, so that the engine is free at once."""
    try:
        yield pieces
    finally:
        if isinstance(pieces, Generator):
            pieces.close()
