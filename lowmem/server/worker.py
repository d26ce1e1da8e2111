"""The thread that owns the model: it loads it and answers several requests at once.

The event loop submits a request and reads its results from the ticket's mailbox. Requests wait in a bounded
queue in which clients take turns; a request for several answers takes one turn for each. An answer takes a
slot of the engine and leaves it at its end, between two pieces of the engine's work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, LowmemError
from lowmem.server.api_errors import ApiError, failed, invalid_request, queue_full, shutting_down, too_slow
from lowmem.server.fair_queue import FairQueue
from lowmem.server.lines import NO_LIMITS, LineLimits, Lines, limited
from lowmem.server.mailbox import Mailbox, Piece

if TYPE_CHECKING:
    from lowmem.answer import Answer, Response
    from lowmem.prompts import Snippet
    from lowmem.session import Session

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
    running: int = 0
    """Answers that are being generated."""
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
    drafted: int = 0
    """Tokens that were drafted for them."""
    accepted: int = 0
    """Drafted tokens that were right."""


class _Unwanted(Exception):
    """The answer is no longer needed."""


@dataclass(eq=False)
class _Running:
    """An answer that is being generated."""

    ticket: Ticket
    part: int
    """Its number in the ticket."""
    start: float
    answer: Answer | None = None
    """None before it has begun."""
    lines: Lines | None = None
    """Where its lines end it."""


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
        self._running: list[_Running] = []
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
    def running(self) -> int:
        """Number of answers that are being generated."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether an answer is being generated."""
        return bool(self._running)

    @property
    def slots(self) -> int:
        """Answers at once, at most."""
        return len(self.session.engine.cache.slots)

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
            begun = {*self._queue.clear(), *(running.ticket for running in self._running)}
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
        while self._admit():
            try:
                self._session.engine.advance()
            except Exception as error:
                for running in list(self._running):
                    self._end(running, error)
            for running in list(self._running):
                self._deliver(running)

    def _admit(self) -> bool:
        """Begin answers while slots are free; waits for one if none runs. False: closed, and all is done."""
        engine = self.session.engine
        while True:
            begun: list[_Running] = []
            with self._changed:
                while len(self._running) < self.slots and self._queue:
                    ticket = self._queue.pop()
                    running = _Running(ticket, ticket.next_part, time.monotonic())
                    ticket.next_part, ticket.running = ticket.next_part + 1, ticket.running + 1
                    if ticket.next_part < len(ticket.works):
                        self._queue.push_front(ticket.client, ticket)
                    self._running.append(running)
                    begun.append(running)
                if not self._running:
                    if self._closed and not self._queue:
                        return False
                    if not engine.repacking:
                        self._changed.wait()
            for running in begun:
                self._begin(running)
            if self._running:
                return True
            if not begun and engine.repacking:
                try:
                    engine.repacking.run_one()  # while no request is waiting
                except Exception as error:
                    self._report(error)

    def _begin(self, running: _Running) -> None:
        work, session = running.ticket.works[running.part], self.session
        try:
            if running.ticket.stopped:
                raise _Unwanted
            if isinstance(work, Continuation):
                running.answer = session.begin(
                    work.ids, work.params, scored=work.scored, answered=work.answered
                )
                return
            running.lines = Lines(work.limits) if work.limits else None
            running.answer = session.begin_hole(
                work.prefix, work.suffix, work.params, snippets=work.snippets, answered=work.answered
            )
        except Exception as error:
            self._end(running, error)

    def _deliver(self, running: _Running) -> None:
        """Pass on what there is of an answer; its last piece ends it, and an error ends its ticket."""
        ticket, answer = running.ticket, running.answer
        assert answer is not None
        try:
            if ticket.stopped:
                raise _Unwanted
            for piece in answer.ready():
                response = piece if running.lines is None else limited(piece, running.lines)
                if response is None:
                    continue
                self.current = response
                if not ticket.mailbox.put(Piece(running.part, response)):
                    raise _Unwanted
                if response.finish_reason:
                    self._end(running, None)
                    return
        except Exception as error:
            self._end(running, error)

    def _end(self, running: _Running, error: Exception | None) -> None:
        """Free an answer's slot, count it, and end its ticket with the last answer or with an error."""
        ticket, answer, told = running.ticket, running.answer, self._told(error)
        tokens = drafted = accepted = 0
        if answer is not None:
            sequence = answer.sequence
            tokens, drafted, accepted = sequence.new_tokens, sequence.drafted_tokens, sequence.accepted_tokens
            answer.close()
        unwanted = isinstance(error, _Unwanted)
        broken = told is not None and not unwanted and not isinstance(error, InvalidRequestError)
        with self._changed:
            self._running.remove(running)
            ticket.running -= 1
            counts = self.counts
            self.counts = Counts(
                answers=counts.answers + (error is None),
                cancelled=counts.cancelled + unwanted,
                failed=counts.failed + broken,
                tokens=counts.tokens + tokens,
                drafted=counts.drafted + drafted,
                accepted=counts.accepted + accepted,
            )
            self._seconds_per_answer += 0.2 * (time.monotonic() - running.start - self._seconds_per_answer)
            if error is not None:
                ticket.stopped = True
                self._queue.remove(ticket.client, ticket)
            elif ticket.running or ticket.next_part < len(ticket.works):
                return
        ticket.mailbox.end(told)

    def _told(self, error: Exception | None) -> ApiError | None:
        """What the client is told; internal errors are reported."""
        if error is None:
            return None
        if isinstance(error, _Unwanted):
            return too_slow()  # ignored if the mailbox has ended for another reason
        if isinstance(error, InvalidRequestError):
            return invalid_request(error)
        self._report(error)
        if isinstance(error, LowmemError):  # for example, output that is not finite
            return ApiError(500, str(error), kind="server_error", code="model_error")
        return failed()

    def _wait(self) -> int:
        """Seconds after which a client should try again."""
        return max(1, min(60, round(self._seconds_per_answer / self.slots)))
