"""The queue, the mailbox and the worker in isolation, with a scripted session."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, LowmemError
from lowmem.server.api_errors import ApiError, time_is_up
from lowmem.server.fair_queue import FairQueue
from lowmem.server.mailbox import End, Mailbox, Piece
from lowmem.server.worker import Continuation, Hole, Ticket, Worker
from lowmem.session import Response, TokenLogprob

PARAMS = SamplingParams()


def response(text: str, count: int = 1, reason: Any = None, logprobs: Any = None) -> Response:
    return Response(text, reason, 3, 0, count, 0.1, 10.0, logprobs=logprobs)


def test_clients_are_served_in_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.push(item[0], item)
    assert len(queue) == 6
    assert [queue.pop() for _ in range(6)] == ["a1", "b1", "c1", "a2", "c2", "a3"]
    with pytest.raises(IndexError):
        queue.pop()


def test_remaining_answers_come_after_other_clients_and_before_the_next_request() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "b1"):
        queue.push(item[0], item)
    assert queue.pop() == "a1"
    queue.push_front("a", "a1 again")
    assert [queue.pop() for _ in range(3)] == ["b1", "a1 again", "a2"]


def test_only_the_longest_line_is_cut_to_make_room() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "b1"):
        queue.push(item[0], item)
    assert queue.crowded_out("a") is None and queue.crowded_out("b") is None
    assert queue.crowded_out("c") == "a2"
    assert queue.crowded_out("c") is None  # one request each: no client is over its share
    assert [queue.pop(), queue.pop()] == ["a1", "b1"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
def test_the_queue_loses_nothing_and_keeps_each_clients_order(steps: list[tuple[str, bool]]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    given_out, waiting = [], []
    for number, (client, takes) in enumerate(steps):
        queue.push(client, (client, number))
        waiting.append((client, number))
        if takes:
            given_out.append(queue.pop())
        if number % 7 == 5 and waiting[-1] not in given_out:
            assert queue.remove(client, (client, number))
            assert not queue.remove(client, (client, number))
            waiting.pop()
    while len(queue):
        given_out.append(queue.pop())
    for client in "abc":
        assert [item for item in given_out if item[0] == client] == [i for i in waiting if i[0] == client]


def test_waiting_pieces_are_merged_without_loss() -> None:
    async def story() -> None:
        box = Mailbox(10_000)
        chance = TokenLogprob("a", -1.0, ())
        assert box.put(Piece(0, response("a", 1, logprobs=(chance,))))
        assert box.put(Piece(0, response("b", 2, logprobs=(chance, chance))))
        assert box.put(Piece(1, response("c", 1)))
        box.end()
        box.end(time_is_up(1))  # the first end is kept
        assert not box.put(Piece(1, response("late", 2)))
        joined, other, end = await box.take()
        assert joined == Piece(0, response("ab", 2, logprobs=(chance,) * 3))
        assert other == Piece(1, response("c", 1)) and end == End(None)

    asyncio.run(story())


def test_a_full_mailbox_accepts_again_once_emptied() -> None:
    async def story() -> None:
        box = Mailbox(100)
        assert box.put(Piece(0, response("x" * 60)))
        assert not box.put(Piece(0, response("x" * 60)))
        assert len(await box.take()) == 1
        assert box.put(Piece(0, response("x" * 60)))
        logged = tuple(TokenLogprob("a", -1.0, (("a", -1.0),) * 20) for _ in range(1))
        assert not box.put(Piece(0, response("x", logprobs=logged)))

    asyncio.run(story())


def test_a_put_from_another_thread_wakes_the_reader() -> None:
    async def story() -> list[str]:
        box = Mailbox(10_000)

        def put() -> None:
            for number in range(500):
                assert box.put(Piece(0, response(f"{number} ")))
            box.end()

        threading.Thread(target=put).start()
        texts = []
        while True:
            events = await asyncio.wait_for(box.take(), 60)
            assert events
            texts += [entry.response.text for entry in events if isinstance(entry, Piece)]
            if isinstance(events[-1], End):
                return texts

    assert "".join(asyncio.run(story())) == "".join(f"{number} " for number in range(500))


class Repacking:
    """Idle-time work in `left` pieces."""

    def __init__(self, left: int) -> None:
        self.left, self.done = left, 0
        self.before: Callable[[], None] = lambda: None

    def __bool__(self) -> bool:
        return self.left > 0

    def run_one(self) -> None:
        if self.left:
            self.left, self.done = self.left - 1, self.done + 1
            self.before()


class ScriptedAnswer:
    """Gives one word each time that the engine has advanced."""

    def __init__(self, session: Scripted) -> None:
        self.session, self.sequence = (
            session,
            SimpleNamespace(new_tokens=0, drafted_tokens=0, accepted_tokens=0),
        )

    def ready(self) -> Iterator[Response]:
        self.sequence.new_tokens += 1
        if self.session.fault is not None:
            raise self.session.fault
        words, count = self.session.words, self.sequence.new_tokens
        yield response(words[count - 1], count, "stop" if count == len(words) else None)

    def close(self) -> None:
        self.session.closed += 1


class Scripted:
    """A session that answers with one word of `answer` per token, and records requests and closed answers."""

    def __init__(self, answer: str = "one two three", slots: int = 1) -> None:
        self.words = answer.split()
        self.asked: list[Any] = []
        self.closed = 0
        self.fault: Exception | None = None
        self.before: Callable[[int], None] = lambda ident: None
        self.advanced = 0
        cache = SimpleNamespace(slots=(None,) * slots)
        self.engine = SimpleNamespace(repacking=Repacking(0), cache=cache, advance=self._advance)

    def begin(self, ids: Sequence[int], params: SamplingParams, **options: bool) -> ScriptedAnswer:
        self.asked.append(ids[0])
        self.before(ids[0])
        return ScriptedAnswer(self)

    def begin_hole(self, prefix: str, suffix: str, params: SamplingParams, **options: Any) -> ScriptedAnswer:
        self.asked.append((prefix, suffix))
        raise InvalidRequestError("there is no text", "Give some")

    def _advance(self) -> None:
        self.advanced += 1


def works(*idents: int) -> list[Continuation]:
    return [Continuation((ident,), PARAMS) for ident in idents]


async def drained(ticket: Ticket) -> tuple[dict[int, str], ApiError | None]:
    """The texts of a ticket's answers, and its final error or None."""
    texts: dict[int, str] = {}
    while True:
        for entry in await asyncio.wait_for(ticket.mailbox.take(), 60):
            if isinstance(entry, End):
                return texts, entry.error
            texts[entry.part] = texts.get(entry.part, "") + entry.response.text


def with_worker(session: Scripted, story: Any, **options: Any) -> None:
    worker = Worker(lambda: session, **options)  # type: ignore[arg-type, return-value]
    worker.start()

    async def run() -> None:
        await story(worker)

    try:
        asyncio.run(run())
    finally:
        worker.abandon()
        assert worker.join(60)


def test_answers_are_streamed_and_counted() -> None:
    session = Scripted()

    async def story(worker: Worker) -> None:
        texts, error = await drained(worker.submit("a", works(1, 2)))
        assert texts == {0: "onetwothree", 1: "onetwothree"} and error is None
        assert worker.counts.answers == 2 and worker.counts.tokens == 6
        assert session.closed == 2

    with_worker(session, story)


def test_many_answers_of_one_request_do_not_delay_others() -> None:
    """Each answer takes one turn of the queue."""
    session = Scripted()
    gate = threading.Event()
    session.before = lambda ident: gate.wait(60) and None  # type: ignore[func-returns-value]

    async def story(worker: Worker) -> None:
        tickets = [
            worker.submit("a", works(1, 2, 3)),
            worker.submit("a", works(4)),
            worker.submit("b", works(11, 12)),
        ]
        gate.set()
        for ticket in tickets:
            assert (await drained(ticket))[1] is None
        assert session.asked == [1, 11, 2, 12, 3, 4]

    with_worker(session, story)


def test_a_request_stopped_in_the_queue_is_never_started() -> None:
    session = Scripted()
    gate = threading.Event()
    session.before = lambda ident: gate.wait(60) and None  # type: ignore[func-returns-value]

    async def story(worker: Worker) -> None:
        first, second = worker.submit("a", works(1)), worker.submit("a", works(2))
        worker.stop(second, time_is_up(5))
        gate.set()
        assert (await drained(first))[1] is None
        _, error = await drained(second)
        assert error is not None and error.code == "time_limit"
        assert session.asked == [1] and worker.counts.cancelled == 1

    with_worker(session, story)


def test_a_running_request_stops_at_the_next_token_and_is_closed() -> None:
    session = Scripted("word " * 1000)
    began = threading.Event()
    gate = threading.Event()

    def before(ident: int) -> None:
        began.set()
        gate.wait(60)

    session.before = before

    async def story(worker: Worker) -> None:
        ticket = worker.submit("a", works(1, 2))
        assert began.wait(60)
        worker.stop(ticket)
        gate.set()
        assert (await drained(ticket))[1] is None
        assert (await drained(worker.submit("a", works(3))))[1] is None
        assert session.asked == [1, 3] and session.closed == 2
        assert worker.counts.tokens == 1000  # none from the first answer, which was stopped in its prefill

    with_worker(session, story)


def test_an_answer_that_is_not_read_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.server.worker.MOST_UNREAD_BYTES", 100)
    session = Scripted("word " * 1000)

    async def story(worker: Worker) -> None:
        ticket = worker.submit("a", works(1))
        other = worker.submit("b", works(2))
        while worker.counts.cancelled < 2:
            await asyncio.sleep(0.01)
        texts, error = await drained(ticket)
        assert error is not None and error.code == "unread"
        assert len(texts[0]) <= 100
        await drained(other)
        assert session.closed == 2

    with_worker(session, story)


def test_errors_are_reported_and_affect_only_their_request() -> None:
    session = Scripted()
    reported: list[BaseException] = []

    async def story(worker: Worker) -> None:
        session.fault = ValueError("inside")
        _, error = await drained(worker.submit("a", works(1)))
        assert error is not None and (error.status, error.code) == (500, "internal_error")
        assert "inside" not in error.message and str(reported[0]) == "inside"
        session.fault = LowmemError("the model's output is not finite", "Check it")
        _, error = await drained(worker.submit("a", works(1)))
        assert error is not None and (error.status, error.code) == (500, "model_error")
        assert "not finite" in error.message
        _, error = await drained(worker.submit("a", [Hole("", "", PARAMS)]))
        assert error is not None and error.status == 400 and "Give some" in error.message
        session.fault = None
        assert (await drained(worker.submit("a", works(1))))[0] == {0: "onetwothree"}
        assert worker.counts.failed == 2 and worker.counts.answers == 1 and len(reported) == 2

    with_worker(session, story, report=reported.append)


def test_a_load_error_is_raised_to_the_caller() -> None:
    def fail() -> Any:
        raise InvalidRequestError("no such model")

    with pytest.raises(InvalidRequestError, match="no such model"):
        Worker(fail).start()


def test_shutdown_refuses_waiting_requests_and_completes_running_ones() -> None:
    session = Scripted()
    began, gate = threading.Event(), threading.Event()

    def before(ident: int) -> None:
        began.set()
        gate.wait(60)

    session.before = before

    async def story(worker: Worker) -> None:
        first, second = worker.submit("a", works(1, 2)), worker.submit("b", works(3))
        assert began.wait(60)
        worker.close()
        with pytest.raises(ApiError) as caught:
            worker.submit("c", works(4))
        assert caught.value.code == "shutting_down"
        gate.set()
        texts, error = await drained(first)
        assert error is None and len(texts) == 2
        _, error = await drained(second)
        assert error is not None and error.code == "shutting_down"
        assert session.asked == [1, 2]
        assert worker.join(60)

    with_worker(session, story)


def test_weights_are_repacked_while_idle_and_a_request_waits_for_at_most_one() -> None:
    session = Scripted()
    session.engine.repacking = Repacking(1000)
    began, go_on = threading.Event(), threading.Event()

    def piece() -> None:
        began.set()
        assert go_on.wait(60)

    session.engine.repacking.before = piece
    done: list[int] = []
    session.before = lambda ident: done.append(session.engine.repacking.done)

    async def story(worker: Worker) -> None:
        assert await asyncio.to_thread(began.wait, 60)
        ticket = worker.submit("a", works(1))
        go_on.set()
        assert (await drained(ticket))[0] == {0: "onetwothree"}
        while session.engine.repacking.left:
            await asyncio.sleep(0.01)

    with_worker(session, story)
    assert done == [1] and session.engine.repacking.done == 1000


def test_a_repacking_error_is_reported_and_the_worker_continues() -> None:
    session, reported = Scripted(), list[BaseException]()
    session.engine.repacking = Repacking(2)

    def piece() -> None:
        raise RuntimeError("no such panel")

    session.engine.repacking.before = piece

    async def story(worker: Worker) -> None:
        while session.engine.repacking.left:
            await asyncio.sleep(0.01)
        assert (await drained(worker.submit("a", works(1))))[0] == {0: "onetwothree"}

    with_worker(session, story, report=reported.append)
    assert [str(error) for error in reported] == ["no such panel"] * 2


def test_answers_in_other_slots_go_on_together() -> None:
    """Three words of four answers in two slots: the engine advances six times."""
    session = Scripted(slots=2)
    gate = threading.Event()
    session.before = lambda ident: gate.wait(60) and None  # type: ignore[func-returns-value]

    async def story(worker: Worker) -> None:
        tickets = [
            worker.submit("a", works(1, 2)),
            worker.submit("b", works(3)),
            worker.submit("c", works(4)),
        ]
        gate.set()
        for ticket in tickets:
            assert (await drained(ticket))[1] is None
        assert session.asked == [1, 3, 4, 2] and session.advanced == 6
        assert worker.counts.answers == 4 and worker.running == 0

    with_worker(session, story)


def test_an_error_in_one_answer_ends_its_request_alone() -> None:
    session = Scripted("word " * 1000, slots=3)
    faulty = threading.Event()

    class Faulty(ScriptedAnswer):
        def ready(self) -> Iterator[Response]:
            if faulty.is_set():
                raise LowmemError("the model's output is not finite", "Check it")
            return super().ready()

    begin = session.begin
    session.begin = lambda ids, params, **options: (  # type: ignore[method-assign]
        Faulty(session) if ids[0] == 2 else begin(ids, params, **options)
    )

    async def story(worker: Worker) -> None:
        bad, good = worker.submit("a", works(1, 2)), worker.submit("b", works(3))
        while worker.running < 3:
            await asyncio.sleep(0)
        faulty.set()
        assert (await drained(bad))[1] is not None
        assert (await drained(good))[1] is None
        assert worker.counts.failed == 1 and worker.counts.answers == 1 and worker.counts.cancelled == 1

    with_worker(session, story)
