"""A server's process: readiness, an early end, signals, and children that must not stay behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowmem.engines.process import EngineEnded, Interrupts, ServerProcess, reachable
from lowmem.errors import InvalidRequestError
from tests.engines import stand_in

PATIENCE = 60.0
Made = tuple[ServerProcess, Interrupts, Path]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    servers: list[ServerProcess] = []

    def starting(mode: str, **environment: str) -> Made:
        port, interrupts, record = free_port(), Interrupts(), tmp_path / "record"
        server = ServerProcess(("127.0.0.1", port), tmp_path / "log", interrupts)
        servers.append(server)
        words = [sys.executable, stand_in.__file__, "--host", "127.0.0.1", "--port", str(port)]
        server.start(words, {"STAND_IN": mode, "STAND_IN_RECORD": str(record), **environment})
        return server, interrupts, record

    yield starting
    for server in servers:
        server.stop(0)


def read(record: Path) -> Any:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            return json.loads(record.read_text())
        except (OSError, ValueError):
            time.sleep(0.05)
    raise AssertionError("the stand-in did not start")


def test_it_is_ready_when_it_says_so_and_ends_with_its_children(start: Any) -> None:
    server, _, record = start("ready", STAND_IN_SECONDS="1")
    seconds: list[float] = []
    assert server.wait_until_ready(seconds.append) and seconds[-1] >= 0.5
    found = read(record)
    assert server.health() == 200 and alive(found["child"])
    assert server.stop(5)
    assert server.code == 0 and not alive(found["child"]) and server.health() is None


def test_the_keys_of_our_own_server_are_not_handed_on(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_API_KEY", "0123456789abcdef")
    _, _, record = start("ready")
    assert "LOWMEM_API_KEY" not in read(record)["environment"]


def test_an_early_end_is_noticed(start: Any) -> None:
    server, _, record = start("refuses")
    with pytest.raises(EngineEnded):
        server.wait_until_ready(lambda seconds: None)
    assert server.code == 1 and "bits=3" in server.log.read_text()
    server.stop(0)
    assert not alive(read(record)["child"])


def test_an_end_while_it_serves_is_noticed(start: Any) -> None:
    server, _, _ = start("dies")
    assert server.wait_until_ready(lambda seconds: None)
    with pytest.raises(EngineEnded):
        server.watch(lambda line: None)


def test_a_signal_ends_the_wait_and_a_second_one_the_patience(start: Any) -> None:
    server, interrupts, record = start("never")
    with interrupts.caught():
        pid = os.getpid()
        threading.Timer(1, os.kill, (pid, signal.SIGINT)).start()
        assert server.wait_until_ready(lambda seconds: None) is False
        threading.Timer(0.5, os.kill, (pid, signal.SIGTERM)).start()
        begin = time.monotonic()
        assert server.stop(600) is False
        assert time.monotonic() - begin < PATIENCE
    assert not alive(read(record)["child"]) and server.code == -signal.SIGKILL


def test_one_that_ignores_the_signal_is_killed(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.engines.process.LAST_WORDS", 0.2)
    server, _, record = start("stubborn")
    assert server.wait_until_ready(lambda seconds: None)
    assert server.stop(0.2) and server.code == -signal.SIGKILL and not alive(read(record)["child"])


def test_a_change_of_health_is_told_once(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.engines.process.LOOK", 0.01)
    server, interrupts, _ = start("ready")
    assert server.wait_until_ready(lambda seconds: None)
    answers = [200, 503, 503, 200, 200]
    told: list[str] = []

    def health() -> int:
        if len(answers) == 1:
            interrupts.count = 1
        return answers.pop(0)

    monkeypatch.setattr(server, "health", health)
    server.watch(told.append)
    assert len(told) == 2 and "no longer" in told[0] and "again" in told[1]


def test_a_program_that_cannot_be_run_is_one_line(tmp_path: Path) -> None:
    server = ServerProcess(("127.0.0.1", 1), tmp_path / "log", Interrupts())
    with pytest.raises(InvalidRequestError, match="cannot run"):
        server.start([str(tmp_path / "nothing")], {})
    assert server.stop(0)


def test_any_address_is_asked_at_this_machine() -> None:
    assert [reachable(host) for host in ("0.0.0.0", "::", "10.1.2.3")] == ["127.0.0.1", "::1", "10.1.2.3"]
