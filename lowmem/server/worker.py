"""One thread owns the model: it loads it, and answers one request after the other.

The event loop submits a request and takes what comes from its ticket's mailbox. Requests wait in a bounded
queue in which clients take turns; a request for several answers has one turn for each.
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
from lowmem.server.fair_queue import FairQueue
from lowmem.server.mailbox import Mailbox, Piece

if TYPE_CHECKING:
    from lowmem.session import Response, Session

MOST_UNREAD_BYTES = 16 << 20
"""Of an answer that its client has not read; a client that is further behind is dropped."""


@dataclass(frozen=True)
class Continuation:
    """Token ids that are to be continued."""

    ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Hole:
    """Two texts between which something is missing."""

    prefix: str
    suffix: str
    params: SamplingParams


Work = Continuation | Hole


@dataclass(eq=False)
class Ticket:
    """A request on its way: what is to be generated, and where the answers go.

    client: whose turn it takes. arrived: time.monotonic(). next_part: the answer that comes next. stopped:
    nobody wants it any more.
    """

    client: str
    works: tuple[Work, ...]
    mailbox: Mailbox
    arrived: float = field(default_factory=time.monotonic)
    next_part: int = 0
    stopped: bool = False


@dataclass(frozen=True)
class Counts:
    """What the worker has done so far.

    Answers: whole, given up because nobody wanted them any more, and failed by a fault of ours. tokens:
    generated, those of answers that were given up included.
    """

    answers: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0


class _Unwanted(Exception):
    """The answer is not wanted any more."""


class Worker:
    """The model's thread, and the queue before it. All methods may be called from any thread."""

    def __init__(
        self,
        open_session: Callable[[], Session],
        *,
        queue_limit: int = 32,
        report: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """`open_session` is called in the model's thread. `queue_limit`: requests that may wait.
        `report` hears of faults of ours."""
        self.queue_limit = queue_limit
        self.counts = Counts()
        self.current: Response | None = None
        """The last piece of the answer that is being written, or was last."""
        self._open_session = open_session
        self._report = report
        self._session: Session | None = None
        self._failure: BaseException | None = None
        self._opened = threading.Event()
        self._changed = threading.Condition()
        self._queue: FairQueue[Ticket] = FairQueue()
        self._serving: Ticket | None = None
        self._closed = False
        self._seconds_an_answer = 1.0  # a running mean
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> Session:
        """Start the thread and wait for the model; raises what loading it raised."""
        self._thread.start()
        self._opened.wait()
        if self._failure is not None:
            raise self._failure
        return self.session

    @property
    def session(self) -> Session:
        """The model's session; to be read only, its answers are this thread's."""
        assert self._session is not None, "the worker has not been started"
        return self._session

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        with self._changed:
            return len(self._queue)

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return self._serving is not None

    @property
    def closed(self) -> bool:
        """Whether nothing is accepted any more."""
        return self._closed

    def check_room(self, client: str) -> None:
        """Raises ApiError if a request of this client would be refused now; nothing is submitted."""
        with self._changed:
            if self._closed:
                raise shutting_down()
            if len(self._queue) >= self.queue_limit and not self._queue.would_crowd_out(client):
                raise queue_full(self._wait())

    def submit(self, client: str, works: Sequence[Work]) -> Ticket:
        """Queue a request; to be called on the event loop. Raises ApiError: the queue is full, or closed.

        In a full queue the last request of whoever has most there makes room, if that is fairer.
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
        """Nobody wants the rest: it leaves the queue, or its generation ends at the next token.

        `error` is what its mailbox ends with, unless that has ended.
        """
        ticket.stopped = True
        ticket.mailbox.end(error)
        with self._changed:
            if self._queue.remove(ticket.client, ticket):
                self.counts = replace(self.counts, cancelled=self.counts.cancelled + 1)

    def close(self) -> None:
        """Accept nothing more, and refuse what waits; what has begun goes on."""
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
        """As `close`, and end what has begun."""
        self.close()
        with self._changed:
            begun = [*self._queue.clear(), *([self._serving] if self._serving else [])]
            self._changed.notify()
        for ticket in begun:
            self.stop(ticket, shutting_down())

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end, which follows `close`; whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._session = self._open_session()
        except BaseException as error:  # `start` raises it in the thread that waits
            self._failure = error
            return
        finally:
            self._opened.set()
        while (ticket := self._next()) is not None:
            self._serve(self._session, ticket)

    def _next(self) -> Ticket | None:
        """The request whose turn it is, once there is one; None when there will be none."""
        engine = self.session.engine
        while True:
            with self._changed:
                self._serving = None
                if not self._queue and not self._closed and not engine.unsettled:
                    self._changed.wait()
                if self._queue:
                    self._serving = self._queue.pop()
                    return self._serving
                if self._closed:
                    return None
            try:
                engine.settle_one()  # while nobody asks
            except Exception as error:
                self._report(error)

    def _serve(self, session: Session, ticket: Ticket) -> None:
        """The next answer of a ticket; whatever goes wrong is this ticket's end and nobody else's."""
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
            error = too_slow()  # unless the mailbox has ended, and says why
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
            self._seconds_an_answer += 0.2 * (time.monotonic() - start - self._seconds_an_answer)
            if error is None and not ticket.stopped and ticket.next_part < len(ticket.works):
                self._queue.push_front(ticket.client, ticket)
                return
        ticket.mailbox.end(error)

    def _explained(self, error: Exception) -> ApiError:
        self._report(error)
        if isinstance(error, LowmemError):  # the model's output is not finite, say
            return ApiError(500, str(error), kind="server_error", code="model_error")
        return failed()

    def _wait(self) -> int:
        """Seconds until the queue has gone on by a few requests, about."""
        return max(1, min(60, round(self._seconds_an_answer)))


def _responses(
    session: Session, work: Work, on_prefill: Callable[[int, int], None], on_token: Callable[[], None]
) -> Iterator[Response]:
    """The pieces of one answer."""
    if isinstance(work, Hole):
        return session.fill_in(
            work.prefix, work.suffix, work.params, on_prefill=on_prefill, on_token=on_token
        )
    return session.continue_ids(work.ids, work.params, on_prefill=on_prefill, on_token=on_token)


@contextmanager
def _closing(pieces: Iterator[Response]) -> Iterator[Iterator[Response]]:
    """Whatever ends the loop over the pieces frees the engine at once."""
    try:
        yield pieces
    finally:
        if isinstance(pieces, Generator):
            pieces.close()
