"""The series at StarChat's size: steps resume, and the report comes from their output alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from lowmem.benchmarks.common.record_file import to_json
from lowmem.benchmarks.experiments.full_size import __main__ as full_size
from lowmem.benchmarks.experiments.full_size.__main__ import (
    EIGHT,
    FEW,
    FOUR,
    SOURCE,
    STEPS,
    Step,
    done,
    main,
    run_step,
)
from lowmem.benchmarks.experiments.full_size.record import PHASES, collect
from lowmem.benchmarks.experiments.full_size.report import REPORT, markdown

from lowmem.errors import SourceError
from tests.helpers import REPO

TINY = REPO / "benchmarks" / "results" / "tiny-starchat"


def test_a_step_is_watched_and_an_interrupted_one_goes_on(tmp_path: Path) -> None:
    """40 MB on the disk, 100 MB in memory; the first run kills itself."""
    code = (
        "import os, pathlib, signal, sys, time\n"
        "there = pathlib.Path(sys.argv[1]) / 'there'\n"
        "first = not there.exists()\n"
        "there.write_bytes(os.urandom(40_000_000))\n"
        "held = bytearray(os.urandom(100_000_000))\n"
        "time.sleep(0.3)\n"
        "if first: os.kill(os.getpid(), signal.SIGKILL)\n"
        "print('{\"well\": true}')"
    )
    (tmp_path / SOURCE).mkdir()
    step = Step("make", ("-c", code, SOURCE))
    assert not done(step, tmp_path)
    assert run_step(step, tmp_path) == -signal.SIGKILL
    assert not done(step, tmp_path)
    assert run_step(step, tmp_path) == 0
    assert done(step, tmp_path)
    first, second = (json.loads((tmp_path / "logs" / f"make.{n}.json").read_bytes()) for n in (1, 2))
    assert (first["exit_code"], second["exit_code"]) == (-9, 0)
    assert 40_000_000 <= first["disk_bytes"] < 80_000_000 and second["disk_bytes"] < 1_000_000
    assert second["peak_anonymous_bytes"] > 100_000_000 and second["wall_seconds"] >= 0.3
    assert str(tmp_path) not in first["command"]
    assert json.loads((tmp_path / "logs" / "make.2.log").read_text()) == {"well": True}


def test_a_step_without_what_it_needs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--work", str(tmp_path), "--only", "verify"]) == 2
    assert "Run the steps before this one first" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--work", str(tmp_path), "--only", "verfy"])


def test_a_failing_step_ends_the_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = (Step("make", ("-c", "import sys; sys.exit('no room')")), Step("plan", ("-c", "print(1)")))
    monkeypatch.setattr(full_size, "STEPS", steps)
    assert main(["--work", str(tmp_path)]) == 2
    assert "no room" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "logs")) == ["make.1.err", "make.1.json", "make.1.log"]


def layer_event(layer: int, seconds: float) -> dict[str, Any]:
    phases = dict.fromkeys(PHASES, 0.0) | {"forward": seconds}
    return {"event": "layer", "layer": layer, "error": 0.25, "seconds": phases}


def work_of(folder: Path) -> Path:
    """The output of all steps: a conversion of four layers in two runs, the first of them killed."""
    logs = folder / "logs"
    logs.mkdir(parents=True)
    for name, size in ((SOURCE, 4000), (FOUR, 1000), (FEW, 400), (EIGHT, 200)):
        (folder / name).mkdir()
        (folder / name / "shard").write_bytes(bytes(size))
    started = {"event": "started", "plan": {"host_peak": 5 * 2**30}}
    plan = {"chosen": {"need": 10 * 2**30}}
    answer = {"label": "4-bit g128", "kernel": "K", "context": 8192, "load_seconds": 1.5, "ttft_seconds": 2.5,
              "prompt_tokens": 9, "new_tokens": 32, "tokens_per_second": 4.5}  # fmt: skip
    check = {"ok": True, "files": 9, "tensors": 808, "linears": 160, "bytes": 8_594_000_000}
    output: dict[str, list[Any]] = {
        "convert-4.1": [started, layer_event(0, 100.0), layer_event(1, 110.0)],
        "convert-4.2": [started, layer_event(1, 90.0), layer_event(2, 100.0), layer_event(3, 120.0)],
        "convert-8.1": [started, layer_event(0, 50.0), layer_event(1, 70.0)],
        "verify.1": [check],
        "plan.1": [plan],
        "run.1": [answer],
    }
    for step in STEPS:
        output.setdefault(f"{step.name}.1", [])
    for number, (name, lines) in enumerate(output.items()):
        text = "\n".join(json.dumps(line) for line in lines)
        (logs / f"{name}.log").write_text(text + '\n{"event": "lin' * name.startswith("convert-4.1"))
        run = {
            "step": name.partition(".")[0],
            "command": f"python -m {name}",
            "date": f"2026-01-01T00:00:{number:02}Z",
            "exit_code": -9 if name == "convert-4.1" else 0,
            "wall_seconds": 10.0 + number,
            "cpu_seconds": 5.0,
            "peak_bytes": 4 * 2**30,
            "peak_anonymous_bytes": 3 * 2**30,
            "load_average_before": 0.5,
            "disk_bytes": 10**9 * number,
        }
        (logs / f"{name}.json").write_text(json.dumps(run))
    for kind in ("latency", "quality"):
        (logs / kind).mkdir()
        text = (TINY / f"{kind}.json").read_text(encoding="utf-8")
        (logs / kind / f"{kind}.json").write_text(text.replace('"tiny-starchat', f'"{folder}/tiny-starchat'))
    return folder


def test_the_record_is_what_the_steps_printed(tmp_path: Path) -> None:
    record = collect(work_of(tmp_path / "work"))
    assert [layer.seconds for layer in record.four.layers] == [100.0, 90.0, 100.0, 120.0]
    assert (record.four.source_bytes, record.four.output_bytes) == (4000, 1000)
    assert record.verified.tensors == 808 and record.answer.predicted_bytes == 10 * 2**30
    assert [run.exit_code for run in record.of("convert-4")] == [-9, 0]
    text = json.dumps(to_json(record))
    assert str(tmp_path) not in text and '"tiny-starchat' in text
    page = markdown(record)
    assert "convert it to 4 bits (run 1 of 2, killed) | 10 |" in page
    assert "A layer took 100 (90 to 120) s" in page and "took 1.16 times as long" in page
    assert "0.67 h for 40 at that rate" in page  # 60 s each
    assert "Planned 10.00 GiB, measured 4.00 GiB (-60.0 %)" in page
    assert all(f"python -m {step.name}.1" in page for step in STEPS)


@pytest.mark.parametrize("damage", ["no json", "cut short", "missing"])
def test_output_that_is_damaged_is_refused(damage: str, tmp_path: Path) -> None:
    work = work_of(tmp_path / "work")
    if damage == "no json":
        (work / "logs" / "verify.1.log").write_text("Traceback\n")
    elif damage == "cut short":
        (work / "logs" / "run.1.log").write_text("")
    else:
        shutil.rmtree(work / "logs" / "quality")
    with pytest.raises(SourceError, match="Run the step again"):
        collect(work)


def test_the_committed_report_is_that_of_the_committed_record(capsys: pytest.CaptureFixture[str]) -> None:
    record = full_size.FULL_SIZE.read()
    assert REPORT.read_text(encoding="utf-8") == markdown(record) + "\n"
    assert len(record.four.layers) == 40 and all(record.of(step.name)[-1].exit_code == 0 for step in STEPS)
    assert main(["--show"]) == 0
    assert capsys.readouterr().out == markdown(record) + "\n"
    assert sys.executable not in REPORT.read_text(encoding="utf-8")
