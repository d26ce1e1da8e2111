"""What `full_size` found, read from the output of its steps. Sizes are bytes, times seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common.origin import machine_here, versions
from lowmem.benchmarks.common.record_file import from_json
from lowmem.benchmarks.common.records import LatencyRecord, Machine, QualityRecord
from lowmem.benchmarks.experiments.common import RESULTS as FOLDER

from lowmem.errors import SourceError

RESULTS = FOLDER / "full_size.json"
FEW_LAYERS = 3
"""Layers that are converted to 8 bits."""
SOURCE, FOUR = "starchat-shaped", "starchat-shaped-4bit"
FEW, EIGHT = f"starchat-shaped-{FEW_LAYERS}layers", f"starchat-shaped-{FEW_LAYERS}layers-8bit"
"""Folders of the work folder."""
PHASES = ("read", "forward", "hessian", "factor", "quantize", "tune", "pack", "write")


@dataclass(frozen=True)
class Run:
    """A run of a step; an interrupted step has several."""

    step: str
    command: str
    date: str
    exit_code: int
    """Negative for a signal."""
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int
    """0 where it was not watched."""
    load_average_before: float
    """Negative where it was not watched."""
    disk_bytes: int
    """The most that the work folder grew by; 0 where it was not watched."""


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one decoder layer's conversion, by phase."""

    layer: int
    forward: float
    hessian: float
    factor: float
    quantize: float
    tune: float
    pack: float
    read: float
    write: float
    error: float
    """Mean relative output error of its linears."""

    @property
    def seconds(self) -> float:
        """All phases."""
        return float(sum(getattr(self, phase) for phase in PHASES))


@dataclass(frozen=True)
class Conversion:
    """One conversion."""

    bits: int
    predicted_bytes: int
    """The peak memory that the plan promised."""
    output_bytes: int
    source_bytes: int
    layers: tuple[LayerTime, ...]
    """In order, each from the run that finished it."""


@dataclass(frozen=True)
class Verified:
    """What `lowmem verify` checked."""

    ok: bool
    files: int
    tensors: int
    linears: int
    nbytes: int


@dataclass(frozen=True)
class Answer:
    """What `lowmem run` reported about one answer."""

    label: str
    kernel: str
    context: int
    predicted_bytes: int
    """The plan's, of the process."""
    load_seconds: float
    ttft_seconds: float
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class FullSize:
    """`full_size.json`."""

    machine: Machine
    versions: tuple[tuple[str, str], ...]
    runs: tuple[Run, ...]
    four: Conversion
    eight: Conversion
    verified: Verified
    answer: Answer
    latency: LatencyRecord
    quality: QualityRecord

    def of(self, step: str) -> tuple[Run, ...]:
        """The runs of one step."""
        return tuple(run for run in self.runs if run.step == step)


def collect(work: Path) -> FullSize:
    """The record of a work folder whose steps are all done. Raises SourceError where output is damaged."""
    logs = work / "logs"
    try:
        files = sorted(logs.glob("*.json"), key=lambda file: json.loads(file.read_bytes())["date"])
        check, plan, answer = (_last(logs, step) for step in ("verify", "plan", "run"))
        taken = {f.name: answer[f.name] for f in fields(Answer) if f.name != "predicted_bytes"}
        return FullSize(
            machine=machine_here(),
            versions=versions(),
            runs=tuple(from_json(Run, json.loads(file.read_bytes())) for file in files),
            four=_conversion(logs, "convert-4", 4, work / SOURCE, work / FOUR),
            eight=_conversion(logs, "convert-8", 8, work / FEW, work / EIGHT),
            verified=Verified(
                check["ok"], check["files"], check["tensors"], check["linears"], check["bytes"]
            ),
            answer=Answer(predicted_bytes=plan["chosen"]["need"], **taken),
            latency=from_json(LatencyRecord, _named(logs / "latency" / "latency.json", work)),
            quality=from_json(QualityRecord, _named(logs / "quality" / "quality.json", work)),
        )
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise SourceError(
            f"{logs} cannot be read: {error!r}", "Run the step again: remove its files"
        ) from error


def _named(file: Path, work: Path) -> Any:
    """A record with the folders of `work` by their names alone."""
    return json.loads(file.read_text(encoding="utf-8").replace(f"{work}/", ""))


def _logs_of(logs: Path, step: str) -> list[Path]:
    return sorted(logs.glob(f"{step}.*.log"), key=lambda file: int(file.suffixes[-2][1:]))


def _last(logs: Path, step: str) -> dict[str, Any]:
    """The JSON object that the last run of a step printed."""
    return dict(json.loads(_logs_of(logs, step)[-1].read_text(encoding="utf-8").splitlines()[-1]))


def _events(logs: Path, step: str) -> Iterator[dict[str, Any]]:
    for file in _logs_of(logs, step):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith('{"event"') and line.endswith("}"):
                yield json.loads(line)


def _conversion(logs: Path, step: str, bits: int, source: Path, folder: Path) -> Conversion:
    layers: dict[int, LayerTime] = {}
    predicted = 0
    for event in _events(logs, step):
        if event["event"] == "started":
            predicted = max(predicted, int(event["plan"]["host_peak"]))
        elif event["event"] == "layer":
            number = event["layer"]
            layers[number] = LayerTime(number, error=float(event["error"]), **_phases(event["seconds"]))
    in_order = tuple(layers[index] for index in sorted(layers))
    return Conversion(bits, predicted, _bytes(folder), _bytes(source), in_order)


def _phases(seconds: Mapping[str, float]) -> dict[str, float]:
    if set(seconds) != set(PHASES):
        raise ValueError(f"the phases of a layer are {sorted(seconds)}")
    return {name: round(value, 3) for name, value in seconds.items()}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
