"""What `lowmem.benchmarks.experiments.full_size.command` found, read off the output of its steps. Sizes are bytes, times seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common.origin import machine_here, versions
from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.record_file import from_json
from lowmem.benchmarks.common.records import LatencyRecord, Machine, QualityRecord

from lowmem.errors import SourceError

RESULTS = ROOT / "benchmarks" / "results" / "full_size.json"
FEW_LAYERS = 3
"""That are converted to 8 bits."""
SOURCE, FOUR = "starchat-shaped", "starchat-shaped-4bit"
FEW, EIGHT = f"starchat-shaped-{FEW_LAYERS}layers", f"starchat-shaped-{FEW_LAYERS}layers-8bit"
"""Folders of the work folder."""


@dataclass(frozen=True)
class Run:
    """A step, or a part of one that was interrupted. exit_code: negative for a signal. disk_bytes: the most
    that the work folder grew by. Not watched: 0 bytes on the disk or outside of files, a load below 0."""

    step: str
    command: str
    date: str
    exit_code: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int
    load_average_before: float
    disk_bytes: int


@dataclass(frozen=True)
class LayerTime:
    """Where the time of one decoder layer went, and the mean relative output error of its linears."""

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

    @property
    def seconds(self) -> float:
        """All of it."""
        return float(sum(getattr(self, phase) for phase in PHASES))


PHASES = ("read", "forward", "hessian", "factor", "quantize", "tune", "pack", "write")


@dataclass(frozen=True)
class Conversion:
    """layers: in order, each from the run that finished it. predicted_bytes: the peak that was promised."""

    bits: int
    predicted_bytes: int
    output_bytes: int
    source_bytes: int
    layers: tuple[LayerTime, ...]


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
    """What `lowmem run` said of one answer. predicted_bytes: the plan's, of the process."""

    label: str
    kernel: str
    context: int
    predicted_bytes: int
    load_seconds: float
    ttft_seconds: float
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class FullSize:
    """All of it."""

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
    """The record of a work folder all of whose steps are done. Raises SourceError for output that is not."""
    logs = work / "logs"
    try:
        files = sorted(logs.glob("*.json"), key=lambda file: json.loads(file.read_bytes())["date"])
        runs = tuple(from_json(Run, json.loads(file.read_bytes())) for file in files)
        check, plan, answer = (_last(logs, step) for step in ("verify", "plan", "run"))
        return FullSize(
            machine=machine_here(),
            versions=versions(),
            runs=runs,
            four=_conversion(logs, "convert-4", 4, work / SOURCE, work / FOUR),
            eight=_conversion(logs, "convert-8", 8, work / FEW, work / EIGHT),
            verified=Verified(
                check["ok"], check["files"], check["tensors"], check["linears"], check["bytes"]
            ),
            answer=_answer(plan, answer),
            latency=from_json(LatencyRecord, _named(logs / "latency" / "latency.json", work)),
            quality=from_json(QualityRecord, _named(logs / "quality" / "quality.json", work)),
        )
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise SourceError(
            f"{logs} cannot be read: {error!r}", "Run the step again: remove its files"
        ) from error


def _named(file: Path, work: Path) -> Any:
    """A record in which a folder of `work` is its name alone: where it lies is nobody's business."""
    return json.loads(file.read_text(encoding="utf-8").replace(f"{work}/", ""))


def _last(logs: Path, step: str) -> dict[str, Any]:
    """The JSON object that the last run of a step printed."""
    file = max(logs.glob(f"{step}.*.log"), key=lambda file: int(file.suffixes[-2][1:]))
    return dict(json.loads(file.read_text(encoding="utf-8").splitlines()[-1]))


def _events(logs: Path, step: str) -> Iterator[dict[str, Any]]:
    for file in sorted(logs.glob(f"{step}.*.log"), key=lambda file: int(file.suffixes[-2][1:])):
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
            layers[event["layer"]] = LayerTime(
                event["layer"], error=float(event["error"]), **_phases(event["seconds"])
            )
    in_order = tuple(layers[index] for index in sorted(layers))
    return Conversion(bits, predicted, _bytes(folder), _bytes(source), in_order)


def _phases(seconds: Mapping[str, float]) -> dict[str, float]:
    wanted = {field.name for field in fields(LayerTime)} - {"layer", "error"}
    if set(seconds) != wanted:
        raise ValueError(f"the phases of a layer are {sorted(seconds)}")
    return {name: round(value, 3) for name, value in seconds.items()}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _answer(plan: Mapping[str, Any], answer: Mapping[str, Any]) -> Answer:
    return Answer(
        label=answer["label"],
        kernel=answer["kernel"],
        context=answer["context"],
        predicted_bytes=plan["chosen"]["need"],
        load_seconds=answer["load_seconds"],
        ttft_seconds=answer["ttft_seconds"],
        prompt_tokens=answer["prompt_tokens"],
        new_tokens=answer["new_tokens"],
        tokens_per_second=answer["tokens_per_second"],
    )
