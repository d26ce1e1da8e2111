"""Rounds and worker processes of `lowmem bench latency`: order, failures and interrupts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lowmem.benchmarks.common.lineup import Lineup, LineupRequest, line_up
from lowmem.benchmarks.common.processes import converse
from lowmem.benchmarks.common.progress import Progress, make_progress
from lowmem.benchmarks.common.work_file import WorkFile, digest_of
from lowmem.benchmarks.latency import rounds as latency_rounds
from lowmem.benchmarks.latency.planning import PlannedVersion
from lowmem.benchmarks.latency.rounds import KEPT_SECONDS, Rounds, run_task
from lowmem.benchmarks.latency.tasks import Timings, TimingTask

from tests.benchmarks.latency_helpers import LENGTHS, TASK, timings, write_model


@pytest.fixture(scope="module")
def lineup(tmp_path_factory: pytest.TempPathFactory) -> Lineup:
    return line_up(LineupRequest((str(write_model(tmp_path_factory.mktemp("latency"))),)))


@pytest.fixture
def entries(lineup: Lineup) -> list[PlannedVersion]:
    return [PlannedVersion(entrant, LENGTHS, 1 << 20) for entrant in lineup.entrants]


# --- rounds ----------------------------------------------------------------------------------------------


def kept_in(folder: Path, key: str = "key") -> WorkFile[Timings]:
    return WorkFile(folder / "work.jsonl", Timings, key, KEPT_SECONDS)


def test_rounds_are_interleaved(entries: list[PlannedVersion], tmp_path: Path) -> None:
    seen: list[str] = []

    def measure(entry: PlannedVersion, step: Any) -> Timings:
        seen.append(entry.label)
        return timings()

    entries[1] = replace(entries[1], reason="too large")
    rounds = Rounds(entries, 3, kept_in(tmp_path), measure)
    rounds.run()
    a, b, c = (e.label for e in entries if not e.reason)
    assert seen == [a, b, c, b, c, a, c, a, b]
    assert {label: len(found) for label, found in rounds.timings.items()} == {a: 3, b: 3, c: 3}


def test_the_time_left_is_estimated_from_earlier_runs(
    entries: list[PlannedVersion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two versions of 100 and 300 s, two rounds. At first all are assumed to take as long as the first
    one."""
    now = [0.0]
    monkeypatch.setattr(latency_rounds.time, "monotonic", lambda: now[0])
    shown: list[str] = []

    class Shown(Progress):
        def update(self, done: int, total: int, text: str = "") -> None:
            shown.append(f"{done}/{total} {text.partition('about ')[2]}")

    def measure(entry: PlannedVersion, step: Any) -> Timings:
        step("load")
        now[0] += 100 if entry is entries[0] else 300
        return timings()

    Rounds(entries[:2], 2, kept_in(tmp_path), measure, Shown()).run()
    assert shown == ["0/4 ", "1/4 5 min 00 s left", "2/4 6 min 40 s left", "3/4 1 min 40 s left"]


def test_progress_lines_without_a_terminal(
    entries: list[PlannedVersion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(entry: PlannedVersion, step: Any) -> Timings | str:
        return timings() if entry is entries[0] else "exit code 137"

    Rounds(entries[:2], 1, kept_in(tmp_path), measure, make_progress(quiet=False)).run()
    make_progress(quiet=True).note("nothing")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines() == [
        f"round 1/1  {entries[0].label}: load 1.00 s, prefill of 8: 100 tokens/s, decode at 20: 5.0 tokens/s",
        f"round 1/1  {entries[1].label}: exit code 137",
    ]


def test_a_failing_version_does_not_stop_the_others(entries: list[PlannedVersion], tmp_path: Path) -> None:
    """A version that fails in the second round is not tried again, and its first round does not count."""
    bad = entries[1].label
    count = {entry.label: 0 for entry in entries}

    def measure(entry: PlannedVersion, step: Any) -> Timings | str:
        count[entry.label] += 1
        return "exit code 137" if entry.label == bad and count[bad] == 2 else timings()

    rounds = Rounds(entries, 3, kept_in(tmp_path), measure)
    rounds.run()
    assert rounds.failures == {bad: "exit code 137"} and bad not in rounds.timings and count[bad] == 2
    assert rounds.whole() == 3 and len(rounds.timings) == len(entries) - 1


def stop_after(limit: int, seen: list[str]) -> Any:
    def measure(entry: PlannedVersion, step: Any) -> Timings:
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(entry.label)
        return timings(speed=len(seen))

    return measure


def test_an_interrupt_keeps_finished_results(entries: list[PlannedVersion], tmp_path: Path) -> None:
    seen: list[str] = []
    first = Rounds(entries, 3, kept_in(tmp_path), stop_after(6, seen))
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert first.whole() == 1 and {len(found) for found in first.results().values()} == {1}
    again: list[str] = []
    later = Rounds(entries, 3, kept_in(tmp_path), stop_after(99, again))
    later.run()
    assert len(again) == 3 * len(entries) - 6 and later.whole() == 3
    for label, found in first.timings.items():
        assert later.timings[label][: len(found)] == found


def test_results_of_another_measurement_or_day_are_not_used(
    entries: list[PlannedVersion], tmp_path: Path
) -> None:
    def measured(work: WorkFile[Timings]) -> int:
        seen: list[str] = []
        Rounds(entries[:1], 1, work, stop_after(9, seen)).run()
        return len(seen)

    assert [measured(kept_in(tmp_path)), measured(kept_in(tmp_path))] == [1, 0]
    assert measured(kept_in(tmp_path, "another")) == 1
    assert measured(kept_in(tmp_path)) == 0, "results of another measurement were used"
    assert measured(replace(kept_in(tmp_path), clock=lambda: time.time() + KEPT_SECONDS + 1)) == 1
    assert digest_of({"a": 1}) == digest_of({"a": 1}) != digest_of({"a": 2})


@pytest.mark.parametrize("damage", ["", "{", "[]", "\x00", '{"key": "key"}', '{"key": "key", "time": 0}'])
def test_damaged_lines_of_a_work_file_are_skipped(
    damage: str, entries: list[PlannedVersion], tmp_path: Path
) -> None:
    (tmp_path / "work.jsonl").write_text(damage)
    for expected in (1, 0):
        seen: list[str] = []
        Rounds(entries[:1], 1, kept_in(tmp_path), stop_after(9, seen)).run()
        assert len(seen) == expected


# --- processes -------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the worker by a script."""

    def put(body: str) -> None:
        (tmp_path / "lowmem_fake_worker.py").write_text(f"import os, signal, sys, time\n{body}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(latency_rounds, "PROCESS", "lowmem_fake_worker")

    return put


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "because memory ran out (exit code 137)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "failed with exit code 139: no message"),
        (
            "raise ValueError('no\\x1b[31m such thing')",
            "failed with exit code 1: ValueError: no?[31m such thing",
        ),
        ('print(\'{"failure": "out of memory: 3 GiB"}\'); sys.exit(1)', "out of memory: 3 GiB"),
        ("sys.exit(0)", "failed with exit code 0: no message"),
    ],
)
def test_a_process_that_dies_says_why(body: str, expected: str, worker: Any) -> None:
    worker(body)
    found = run_task(TASK, lambda step: None)
    assert isinstance(found, str) and expected in found and "\x1b" not in found


def test_the_task_reaches_the_process(worker: Any) -> None:
    worker(
        "import json\ntask = json.load(sys.stdin)\n"
        "print(json.dumps({'step': os.environ['OMP_NUM_THREADS'] + os.environ['CUDA_VISIBLE_DEVICES']}))\n"
        "print(json.dumps({'failure': task['path']}))"
    )
    steps: list[str] = []
    assert run_task(replace(TASK, threads=3), steps.append) == "m" and steps == ["3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("MemoryError('3 GiB')", "out of memory: 3 GiB"),
        ("RuntimeError('CUDA out of memory. Tried')", "out of memory: CUDA out of memory. Tried"),
        ("SourceError('m is damaged', 'Convert it again')", "m is damaged. Convert it again"),
        ("KeyError('a bug')", "failed with exit code 1: KeyError: 'a bug'"),
    ],
)
def test_errors_of_the_worker(error: str, expected: str, worker: Any) -> None:
    """Output of libraries on standard output is not mistaken for the worker's result."""
    worker(
        "from lowmem.benchmarks.latency import timing\nfrom lowmem.errors import SourceError\n"
        "def measure(task, tell):\n    print('noise')\n    os.write(1, b'noise')\n"
        f"    raise {error}\n"
        "timing.measure = measure\nsys.exit(timing.main())"
    )
    assert run_task(TASK, lambda step: None) == expected


def test_modules_in_the_users_folder_are_not_imported(
    entries: list[PlannedVersion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` would search the current folder first."""
    for name in ("convert", "bench", "benchmarks", "lowmem", "random_name", "torch", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    task = TimingTask("cpu", "float32", 1 << 20, threads=1, seconds=0.01)
    found = run_task(task, lambda step: None)
    assert isinstance(found, Timings) and found.threads == 1 and not found.kernel


def test_an_interrupt_kills_the_whole_group(worker: Any, tmp_path: Path) -> None:
    """The worker has a child process that keeps its standard output open."""
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
        converse(latency_rounds.PROCESS, "", hear, tmp_path / "log", {})
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
