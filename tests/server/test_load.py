"""Concurrent requests: order, cancellation, queue and time limits, failures, stalled readers, shutdown."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from lowmem.generate.pace import LENGTHS
from lowmem.server import running
from lowmem.server.guard import GuardSettings
from tests.server.server_fixture import MODEL, PATIENCE, Live, eventually, live_server
from tests.server.test_api import QUESTION, answer_to, chat, user

ALICE, BOB = "alice-has-this-key", "bob-has-this-one"


@pytest.fixture(scope="module")
def shared() -> Iterator[Live]:
    """A server with a queue of three and two API keys."""
    with live_server(queue_limit=3, guard=GuardSettings(keys=(ALICE, BOB))) as live:
        yield live


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    yield shared
    shared.gate.open()
    eventually(lambda: not shared.worker.busy and shared.worker.waiting == 0)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@contextmanager
def held(live: Live, at: int = 0) -> Iterator[None]:
    """Hold the model after `at` tokens of the next answer for the duration of the context."""
    live.gate.close(at)
    try:
        yield
    finally:
        live.gate.open()


def queued(
    live: Live, threads: ThreadPoolExecutor, count: int, key: str = ALICE, **options: Any
) -> list[Future]:
    """Send requests that wait in this order behind one that is held."""
    futures = []
    for _ in range(count):
        before = live.worker.waiting
        futures.append(threads.submit(chat, live.client(key), **{"max_tokens": 2, **options}))
        eventually(lambda before=before: live.worker.waiting == before + 1)  # type: ignore[misc]
    return futures


def hold_one(live: Live, threads: ThreadPoolExecutor, key: str = ALICE) -> Future:
    """Send a request and hold the model in it."""
    future = threads.submit(chat, live.client(key), max_tokens=4)
    live.gate.wait_until_held()
    return future


def test_a_full_queue_refuses_with_429_and_a_time_to_wait(live: Live, threads: ThreadPoolExecutor) -> None:
    with held(live):
        waiting = [hold_one(live, threads), *queued(live, threads, 3)]
        with pytest.raises(openai.RateLimitError) as caught:
            chat(live.client(ALICE))
        assert caught.value.code == "queue_full"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert all(future.result(PATIENCE).usage.completion_tokens for future in waiting)
    assert chat(live.client(ALICE), max_tokens=2)  # there is room again


def test_a_client_that_fills_the_queue_does_not_block_others(live: Live, threads: ThreadPoolExecutor) -> None:
    with held(live):
        first = hold_one(live, threads)
        alices = queued(live, threads, 3)
        bobs = threads.submit(chat, live.client(BOB), max_tokens=2)
        with pytest.raises(openai.RateLimitError):
            alices[-1].result(PATIENCE)  # her last request was dropped to make room
        eventually(lambda: live.worker.waiting == 3)
    for future in (first, *alices[:2], bobs):
        assert future.result(PATIENCE).choices


def test_clients_take_turns(live: Live, threads: ThreadPoolExecutor) -> None:
    ended: list[str] = []

    def ask(key: str, name: str) -> None:
        chat(live.client(key), max_tokens=2)
        ended.append(name)

    with held(live):
        first = hold_one(live, threads)
        futures = []
        for key, name in ((ALICE, "a1"), (ALICE, "a2"), (BOB, "b1")):
            before = live.worker.waiting
            futures.append(threads.submit(ask, key, name))
            eventually(lambda before=before: live.worker.waiting == before + 1)  # type: ignore[misc]
        served: list[str] = []
        real = live.worker._queue.pop

        def pop() -> Any:
            ticket = real()
            served.append(ticket.client)
            return ticket

        live.worker._queue.pop = pop  # type: ignore[method-assign]
    for future in (first, *futures):
        future.result(PATIENCE)
    del live.worker._queue.pop
    assert served == ["key 1", "key 2", "key 1"]
    assert sorted(ended) == ["a1", "a2", "b1"]


def cancelled(live: Live) -> int:
    return live.worker.counts.cancelled


def test_disconnecting_from_a_stream_ends_the_generation(live: Live) -> None:
    before = live.worker.counts
    with held(live, at=5):
        stream = chat(live.client(ALICE), stream=True, max_tokens=800)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        live.gate.wait_until_held()
        stream.response.close()
        eventually(lambda: "left" in "".join(live.log[-2:]))
    eventually(lambda: cancelled(live) == before.cancelled + 1)
    assert live.worker.counts.tokens - before.tokens <= 6  # of 800
    assert chat(live.client(ALICE)).choices[0].message.content == answer_to(QUESTION)


def test_disconnecting_before_a_whole_answer_ends_the_generation(live: Live) -> None:
    before = live.worker.counts
    with held(live, at=5):
        with pytest.raises(openai.APITimeoutError):
            chat(live.client(ALICE, timeout=1.0), max_tokens=800)
        eventually(lambda: " 499 " in "".join(live.log[-2:]))
    eventually(lambda: cancelled(live) == before.cancelled + 1)
    assert live.worker.counts.tokens - before.tokens <= 6


def test_disconnecting_during_the_prefill_ends_it(live: Live) -> None:
    """The engine keeps the part already prefilled, and later answers the same prompt correctly."""
    before = live.worker.counts
    with held(live, at=0):
        with pytest.raises(openai.APITimeoutError):
            chat(live.client(ALICE, timeout=1.0), QUESTION * 60, max_tokens=30)
        eventually(lambda: " 499 " in "".join(live.log[-2:]))
    eventually(lambda: cancelled(live) == before.cancelled + 1)
    assert live.worker.counts.tokens == before.tokens
    assert chat(live.client(ALICE)).choices[0].message.content == answer_to(QUESTION)


def test_a_client_that_disconnects_in_the_queue_is_not_served(
    live: Live, threads: ThreadPoolExecutor
) -> None:
    with held(live):
        first = hold_one(live, threads)
        before = live.worker.counts
        with pytest.raises(openai.APITimeoutError):
            chat(live.client(ALICE, timeout=1.0), max_tokens=800)
        eventually(lambda: live.worker.waiting == 0)
        assert cancelled(live) == before.cancelled + 1
    assert first.result(PATIENCE).usage.completion_tokens == 4
    eventually(lambda: live.worker.counts.answers == before.answers + 1)
    assert live.worker.counts.tokens - before.tokens == 4


def test_an_error_in_the_model_fails_only_one_answer(live: Live, threads: ThreadPoolExecutor) -> None:
    with held(live, at=3):
        failing = threads.submit(chat, live.client(ALICE))
        live.gate.wait_until_held()
        others = queued(live, threads, 2, max_tokens=24)
        live.gate.fault = ValueError("a secret prompt")
    with pytest.raises(openai.InternalServerError) as caught:
        failing.result(PATIENCE)
    assert caught.value.code == "internal_error" and "secret" not in str(caught.value)
    for future in others:
        assert future.result(PATIENCE).choices[0].message.content == answer_to(QUESTION)
    assert any("ValueError" in line for line in live.log)
    assert live.worker.counts.failed >= 1


def test_an_error_during_a_stream_is_sent_as_an_event(live: Live) -> None:
    with held(live, at=6):
        stream = chat(live.client(ALICE), stream=True)
        got = next(iter(stream))
        live.gate.wait_until_held()
        live.gate.fault = RuntimeError("x")
    assert got.choices[0].delta.role == "assistant"
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "internal_error"


def test_the_time_limit_ends_an_answer_as_max_tokens_does(threads: ThreadPoolExecutor) -> None:
    with live_server(time_limit=2.0) as live:
        live.gate.close(at=8)
        whole = threads.submit(chat, live.client(), max_tokens=500)
        live.gate.wait_until_held()
        # A request that waits or is in its prefill has no text to return.
        with pytest.raises(openai.InternalServerError) as caught:
            chat(live.client(max_retries=5))
        assert caught.value.status_code == 503 and caught.value.code == "time_limit"
        (choice,) = whole.result(PATIENCE).choices
        assert choice.finish_reason == "length"
        assert choice.message.content and answer_to(QUESTION).startswith(choice.message.content)
        live.gate.open()
        eventually(lambda: not live.worker.busy)
        assert live.worker.counts.tokens <= 9 and live.worker.counts.cancelled == 2
        live.gate.close(at=8)
        chunks = list(chat(live.client(), max_tokens=500, stream=True, n=2))
        reasons = [
            (c.choices[0].index, c.choices[0].finish_reason) for c in chunks if c.choices[0].finish_reason
        ]
        assert reasons == [(0, "length"), (1, "length")]
        live.gate.open()
        eventually(lambda: sum("time_limit" in line for line in live.log) == 3)
        eventually(lambda: not live.worker.busy)
        assert chat(live.client()).choices[0].message.content == answer_to(QUESTION)


def test_a_stalled_reader_is_disconnected_and_blocks_no_one(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is closed after a timeout. The model does not wait for it, and no output accumulates."""
    monkeypatch.setattr(running, "STALLED_SECONDS", 1.0)
    fields = {"model": MODEL, "messages": user(QUESTION), "temperature": 0, "max_tokens": 900}
    logged = {"stream": True, "logprobs": True, "top_logprobs": 20}  # more than a kilobyte per token
    body = json.dumps({**fields, **logged}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {BOB}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    host, port = live.url.removeprefix("http://").split(":")
    before = live.worker.counts
    with held(live, at=700), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(head.encode() + body)
        eventually(lambda: "left key 2" in "".join(live.log[-1:]))
    eventually(lambda: cancelled(live) == before.cancelled + 1)
    assert live.worker.counts.tokens - before.tokens <= 700 + 1 + LENGTHS[-1]  # a step and its draft
    assert chat(live.client(ALICE)).choices[0].message.content == answer_to(QUESTION)


def test_idle_connections_are_closed(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "STALLED_SECONDS", 0.2)
    host, port = live.url.removeprefix("http://").split(":")
    for beginning in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"):
        with socket.create_connection((host, int(port)), PATIENCE) as client:
            client.sendall(beginning)
            assert client.recv(1000) == b""


def test_connections_beyond_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "MOST_CONNECTIONS", 2)
    with live_server() as live:
        host, port = live.url.removeprefix("http://").split(":")
        first, second = (socket.create_connection((host, int(port)), PATIENCE) for _ in range(2))
        with first, second:
            eventually(lambda: len(live.server.server_state.connections) == 2)
            with socket.create_connection((host, int(port)), PATIENCE) as third:
                assert third.recv(10) == b""


def test_shutdown_finishes_running_requests_and_refuses_waiting_ones(threads: ThreadPoolExecutor) -> None:
    with live_server() as live:
        live.gate.close(at=5)
        begun = threads.submit(chat, live.client(), n=2, seed=1)
        live.gate.wait_until_held()
        waiting = threads.submit(chat, live.client(max_retries=3))
        eventually(lambda: live.worker.waiting == 1)
        with httpx.Client() as kept:  # a connection that is already open
            assert kept.get(f"{live.url}/health").status_code == 200
            live.server.should_exit = True
            with pytest.raises(openai.InternalServerError) as caught:
                waiting.result(PATIENCE)
        assert caught.value.code == "shutting_down" and caught.value.status_code == 503
        live.gate.open()
        assert len(begun.result(PATIENCE).choices) == 2
        eventually(lambda: _refused(live.url))


def _refused(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return True
    return False


def test_shutdown_has_a_time_limit(threads: ThreadPoolExecutor) -> None:
    with live_server(shutdown_seconds=0.5) as live:
        live.gate.close(at=5)
        stream = chat(live.client(), stream=True, max_tokens=500)
        next(iter(stream))
        live.gate.wait_until_held()
        live.server.should_exit = True
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "shutting_down"


def test_health_reports_shutdown() -> None:
    with live_server() as live, httpx.Client() as kept:
        assert kept.get(f"{live.url}/health").json() == {"status": "ok"}
        live.worker.close()
        answer = kept.get(f"{live.url}/health")
        assert answer.status_code == 503 and answer.json() == {"status": "shutting down"}
        with pytest.raises(openai.InternalServerError) as caught:
            chat(live.client())
        assert caught.value.code == "shutting_down"


def test_answers_at_once_are_those_of_one_after_the_other() -> None:
    """Eight clients on three slots, with several answers each, cached prefixes and seeds."""
    questions = [f"{name} = [1, 2, 3]\nprint(" for name in ("a", "b", "total", "names")] * 2

    def ask(live: Live, number: int) -> list[str]:
        answer = live.client().completions.create(
            model=MODEL, prompt=questions[number], max_tokens=12, n=2, seed=number, temperature=number % 2
        )
        return [choice.text for choice in answer.choices]

    with live_server() as live:
        expected = [ask(live, number) for number in range(8)]
    with live_server(slots=3) as live, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: ask(live, number), range(8))) == expected
        assert live.worker.slots == 3 and live.worker.counts.answers == 16
