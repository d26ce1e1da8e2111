"""The rounds of `lowmem bench latency` and the processes that measure: in which order, and what becomes of
failures and interrupts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lowmem.benchmarks.common.lineup import Lineup, line_up
from lowmem.benchmarks.common.processes import converse
from lowmem.benchmarks.latency import rounds as latency_rounds
from lowmem.benchmarks.latency.measure import (
    Entry,
)
from lowmem.benchmarks.latency.rounds import Found, Watcher, WorkFile, run_job, run_rounds
from lowmem.benchmarks.latency.view import make_watcher
from lowmem.benchmarks.latency.worker import Visit

from tests.benchmarks.latency_helpers import JOB, LENGTHS, visit, write_model


@pytest.fixture(scope="module")
def lineup(tmp_path_factory: pytest.TempPathFactory) -> Lineup:
    return line_up([str(write_model(tmp_path_factory.mktemp("latency")))])


@pytest.fixture
def entries(lineup: Lineup) -> list[Entry]:
    return [Entry(entrant, LENGTHS, 1 << 20) for entrant in lineup.entrants]


# --- rounds ----------------------------------------------------------------------------------------------


def kept_in(folder: Path, **key: Any) -> WorkFile:
    return WorkFile(folder / "work.jsonl", {"key": 1, **key})


def test_rounds_are_interleaved(entries: list[Entry], tmp_path: Path) -> None:
    seen: list[str] = []
    found = Found()

    def measure(entry: Entry, step: Any) -> Visit:
        seen.append(entry.label)
        return visit()

    entries[1] = replace(entries[1], reason="too large")
    run_rounds(entries, 3, kept_in(tmp_path), measure, Watcher(), found)
    a, b, c = (e.label for e in entries if not e.reason)
    assert seen == [a, b, c, b, c, a, c, a, b]
    assert {label: len(visits) for label, visits in found.visits.items()} == {a: 3, b: 3, c: 3}


def test_the_time_left_is_what_forms_took_before(
    entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two forms of 10 and 30 seconds, two rounds: unknown, then three as long as the first, then as known."""
    now = [0.0]
    monkeypatch.setattr(latency_rounds.time, "monotonic", lambda: now[0])
    left: list[float | None] = []

    class Listener(Watcher):
        def began(self, title: str, done: int, total: int, seconds: float | None) -> None:
            left.append(seconds)

    def measure(entry: Entry, step: Any) -> Visit:
        now[0] += 10 if entry is entries[0] else 30
        return visit()

    run_rounds(entries[:2], 2, kept_in(tmp_path), measure, Listener(), Found())
    assert left == [None, 10 + 10 + 10, 30 + 10, 10]


def test_lines_for_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    watcher = make_watcher(quiet=False)
    watcher.began("round 1/1  NF4", 0, 1, None)
    watcher.ended("round 1/1  NF4", visit())
    watcher.ended("round 1/1  int8", "exit code 137")
    make_watcher(quiet=True).line("nothing")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines() == [
        "round 1/1  NF4: load 1.00 s, prefill of 8: 100 tokens/s, decode at 20: 5.0 tokens/s",
        "round 1/1  int8: exit code 137",
    ]


def test_a_form_that_fails_ends_nothing_else(entries: list[Entry], tmp_path: Path) -> None:
    """It fails in the second round: it is not tried again, and its first round does not count."""
    bad = entries[1].label
    count = {entry.label: 0 for entry in entries}

    def measure(entry: Entry, step: Any) -> Visit | str:
        count[entry.label] += 1
        return "exit code 137" if entry.label == bad and count[bad] == 2 else visit()

    found = Found()
    run_rounds(entries, 3, kept_in(tmp_path), measure, Watcher(), found)
    assert found.failures == {bad: "exit code 137"} and bad not in found.visits and count[bad] == 2
    assert found.whole_rounds() == 3 and len(found.visits) == len(entries) - 1


def stop_after(limit: int, seen: list[str]) -> Any:
    def measure(entry: Entry, step: Any) -> Visit:
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(entry.label)
        return visit(speed=len(seen))

    return measure


def test_an_interrupt_keeps_what_is_done(entries: list[Entry], tmp_path: Path) -> None:
    seen: list[str] = []
    found = Found()
    with pytest.raises(KeyboardInterrupt):
        run_rounds(entries, 3, kept_in(tmp_path), stop_after(6, seen), Watcher(), found)
    assert found.whole_rounds() == 1 and {len(v) for v in found.whole().values()} == {1}
    later, again = Found(), []
    run_rounds(entries, 3, kept_in(tmp_path), stop_after(99, again), Watcher(), later)
    assert len(again) == 3 * len(entries) - 6 and later.whole_rounds() == 3
    for label, visits in found.visits.items():
        assert later.visits[label][: len(visits)] == visits


def test_what_does_not_agree_is_measured_again(entries: list[Entry], tmp_path: Path) -> None:
    def measured(work: WorkFile, **options: Any) -> int:
        seen: list[str] = []
        run_rounds(entries[:1], 1, work, stop_after(9, seen), Watcher(), Found(), **options)
        return len(seen)

    assert measured(kept_in(tmp_path)) == 1
    assert measured(kept_in(tmp_path)) == 0
    assert measured(kept_in(tmp_path), fresh=True) == 1
    assert measured(kept_in(tmp_path, digest="another")) == 1
    assert measured(kept_in(tmp_path)) == 1, "the file was of the other one"
    old = WorkFile(tmp_path / "work.jsonl", {"key": 1}, lambda: time.time() + 86401)
    assert measured(old) == 1


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"key": 1}\n{"round": 0', '{"key": 1}\n{"round": 0, "time": 0}']
)
def test_a_damaged_work_file_counts_as_none(damage: str, entries: list[Entry], tmp_path: Path) -> None:
    (tmp_path / "work.jsonl").write_text(damage)
    seen: list[str] = []
    run_rounds(entries[:1], 1, kept_in(tmp_path), stop_after(9, seen), Watcher(), Found())
    assert len(seen) == 1


# --- processes -------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a script in the worker's place."""

    def put(body: str) -> None:
        (tmp_path / "lowmem_fake_worker.py").write_text(f"import os, signal, sys, time\n{body}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(latency_rounds, "WORKER", "lowmem_fake_worker")

    return put


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "memory ran out (exit code 137)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "failed with exit code 139: it said nothing"),
        (
            "raise ValueError('no\\x1b[31m such thing')",
            "failed with exit code 1: ValueError: no?[31m such thing",
        ),
        ('print(\'{"failure": "memory ran out: 3 GiB"}\'); sys.exit(1)', "memory ran out: 3 GiB"),
        ("sys.exit(0)", "failed with exit code 0: it said nothing"),
    ],
)
def test_a_process_that_dies_says_why(body: str, expected: str, worker: Any) -> None:
    worker(body)
    found = run_job(JOB, 0, lambda step: None)
    assert isinstance(found, str) and expected in found and "\x1b" not in found


def test_the_job_reaches_the_process(worker: Any) -> None:
    worker(
        "import json\njob = json.load(sys.stdin)\n"
        "print(json.dumps({'step': os.environ['OMP_NUM_THREADS'] + os.environ['CUDA_VISIBLE_DEVICES']}))\n"
        "print(json.dumps({'failure': job['path']}))"
    )
    steps: list[str] = []
    assert run_job(JOB, 3, steps.append) == "m" and steps == ["3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("MemoryError('3 GiB')", "memory ran out: 3 GiB"),
        ("RuntimeError('CUDA out of memory. Tried')", "memory ran out: CUDA out of memory. Tried"),
        ("SourceError('m is damaged', 'Convert it again')", "m is damaged. Convert it again"),
        ("KeyError('a bug')", "failed with exit code 1: KeyError: 'a bug'"),
    ],
)
def test_what_the_worker_raises(error: str, expected: str, worker: Any) -> None:
    """And what libraries print to standard output is not taken for what the worker tells."""
    worker(
        "from lowmem.benchmarks.latency import worker as latency_worker\nfrom lowmem.errors import SourceError\n"
        "def measure(job, tell):\n    print('noise')\n    os.write(1, b'noise')\n"
        f"    raise {error}\n"
        "latency_worker.measure = measure\nsys.exit(latency_worker.main())"
    )
    assert run_job(JOB, 0, lambda step: None) == expected


def test_an_interrupt_kills_the_whole_group(worker: Any, tmp_path: Path) -> None:
    """The process has one of its own, which holds its standard output open."""
    worker(
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(os.getpid(), child.pid, flush=True)\ntime.sleep(600)"
    )
    pids: list[int] = []

    def hear(line: str) -> None:
        pids.extend(map(int, line.split()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converse(latency_rounds.WORKER, "", hear, tmp_path / "log", {})
    assert len(pids) == 2
    for _ in range(100):
        if not any(alive(pid) for pid in pids):
            break
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
