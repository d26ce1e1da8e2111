"""`lowmem bench latency` as a command: its record, refusals, Ctrl-C and resuming."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from lowmem.benchmarks.common.record_file import read_record
from lowmem.benchmarks.common.records import LatencyRecord
from lowmem.benchmarks.latency import command as latency_command
from lowmem.benchmarks.latency import machine_state
from lowmem.benchmarks.latency import rounds as latency_rounds
from lowmem.benchmarks.latency.tasks import Timings, TimingTask

from lowmem.errors import LowmemError, OutputError
from tests.benchmarks.latency_helpers import timings, write_model
from tests.helpers import tiny_model
from tests.rtn_helpers import write_rtn_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("latency"))


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    latency_command.add_arguments(parser)
    return latency_command.run(parser.parse_args(words))


SHORT = ("--prompts", "4,8", "--contexts", "6,20", "--new-tokens", "3", "--quiet")


def test_a_real_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One version and one round, in real worker processes."""
    monkeypatch.setattr("lowmem.benchmarks.latency.roofline.SECONDS", 0.01)
    words = [
        str(model),
        "--versions",
        "dense",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--json",
        "--out",
        str(tmp_path),
    ]
    assert command(*words, *SHORT) == 0
    record = read_record(LatencyRecord, tmp_path)
    assert record is not None and json.loads(capsys.readouterr().out) == json.loads(
        (tmp_path / "latency.json").read_text()
    )
    assert (
        record.rounds == 1
        and record.threads == 1
        and record.drift == 0
        and record.origin.source == str(model)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]
    (subject,) = record.subjects
    assert subject.fits and subject.load_seconds is not None and len(subject.load_seconds.values) == 1
    assert subject.peak_host_bytes >= subject.subject.weight_bytes
    assert [p.prompt_tokens for p in subject.prefill] == [4, 8]
    for prompt in subject.prefill:
        assert prompt.tokens_per_second.median == pytest.approx(prompt.prompt_tokens / prompt.ttft.median)
        assert prompt.share == pytest.approx(
            prompt.tokens_per_second.median / prompt.ceiling_tokens_per_second
        )
    for decode in subject.decode:
        assert len(decode.itl_seconds) == (3 - 1) * record.rounds
        assert decode.tpot.median == pytest.approx(sum(decode.itl_seconds) / 2)
        assert decode.share == pytest.approx(1 / decode.tpot.median / decode.ceiling_tokens_per_second)
        assert decode.itl_p50 <= decode.itl_p90 <= decode.itl_p99 <= max(decode.itl_seconds)


@pytest.fixture
def fake_jobs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace worker processes: they return `timings` and record their paths. A final "stop" interrupts."""
    jobs: list[str] = []

    def run(task: TimingTask, step: Any) -> Timings:
        if jobs and jobs[-1] == "stop":
            jobs.pop()
            raise KeyboardInterrupt
        jobs.append(task.path and task.method)
        if len(jobs) == 7:
            jobs.append("stop")
        return timings()

    monkeypatch.setattr(latency_rounds, "run_task", run)
    monkeypatch.setattr(machine_state, "look_before", lambda load: machine_state.Before(("It is busy",), 0))
    return jobs


def test_an_interrupted_run_leaves_a_record_and_resumes(
    model: Path, tmp_path: Path, fake_jobs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Four versions: the machine, one round, two more versions, Ctrl-C. The same command then resumes."""
    words = [str(model), "--rounds", "2", "--out", str(tmp_path), *SHORT]
    assert command(*words) == 130
    assert "stopped after 1 of 2 rounds" in capsys.readouterr().err
    record = read_record(LatencyRecord, tmp_path)
    assert record is not None and record.rounds == 1 and len(record.subjects) == 4
    assert record.warnings[0] == "It is busy" and "interrupted after 1 of 2 rounds" in record.warnings
    assert (tmp_path / latency_rounds.WORK_FILE).exists()
    del fake_jobs[:]
    assert command(*words) == 0
    assert len(fake_jobs) == 1 + 2  # the machine, and the rest of the second round
    record = read_record(LatencyRecord, tmp_path)
    assert record is not None and record.rounds == 2 and not (tmp_path / latency_rounds.WORK_FILE).exists()
    assert all(len(s.load_seconds.values) == 2 for s in record.subjects if s.load_seconds)


def test_an_interrupt_before_a_whole_round_leaves_no_record(
    model: Path, tmp_path: Path, fake_jobs: list[str]
) -> None:
    fake_jobs.extend([""] * 4)
    assert command(str(model), "--out", str(tmp_path), *SHORT) == 130
    assert [path.name for path in tmp_path.iterdir()] == [latency_rounds.WORK_FILE]


def test_versions_beyond_the_memory_limit_are_marked(
    model: Path, tmp_path: Path, fake_jobs: list[str]
) -> None:
    assert command(str(model), "--ram", "1MiB", "--out", str(tmp_path), *SHORT) == 0
    record = read_record(LatencyRecord, tmp_path)
    assert record is not None and not any(subject.fits for subject in record.subjects)
    assert all("--ram allows 1 MiB" in s.reason and s.needed_bytes > 1 << 20 for s in record.subjects)
    assert fake_jobs == [""], "only the machine was measured"


def test_a_converted_folder_needs_no_reference(model: Path, tmp_path: Path, fake_jobs: list[str]) -> None:
    """A downloaded quantized checkpoint has no 16-bit source here. It can be timed without one."""
    alone = tmp_path / "elsewhere"
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), alone, bits=4)
    assert command(str(alone), "--rounds", "1", "--out", str(tmp_path / "out"), *SHORT) == 0
    record = read_record(LatencyRecord, tmp_path / "out")
    assert record is not None and [s.subject.label for s in record.subjects] == ["4-bit g32"]
    assert record.origin.source == str(alone)


@pytest.mark.parametrize(
    "words",
    [("--rounds", "0"), ("--vram", "8GiB"), ("--contexts", "5000"), ("--new-tokens", "1"), ("--ram", "x")],
)
def test_invalid_requests_are_refused(
    words: tuple[str, ...], model: Path, tmp_path: Path, fake_jobs: list[str]
) -> None:
    with pytest.raises(LowmemError):
        command(str(model), "--quiet", "--out", str(tmp_path), "--device", "cpu", *words)


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path, fake_jobs: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        command(str(model), "--out", str(tmp_path / "file" / "below"), *SHORT)
    assert not fake_jobs, "it was measured before the check"


def test_no_list_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("m", "--prompts", "12,x")
    assert "not a list of numbers" in capsys.readouterr().err
