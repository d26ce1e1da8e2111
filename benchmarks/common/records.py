"""What was measured, as values, and their JSON: the only thing that a report is made of.

A record's fields are its JSON's names. All sizes are bytes, all times seconds, all divergences nats.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lowmem.errors import LowmemError, SourceError

FORMAT = 1
FOLDER = "lowmem-bench"
"""Where `lowmem bench` writes its records, and its reports, when --out names no other folder."""


@dataclass(frozen=True)
class Machine:
    """cores: that this process may use. flags: of the CPU's instruction sets, those that matter here.
    device: what was measured on, "cpu" or the card's name; its memory in device_memory_bytes (0: no card)."""

    cpu: str
    flags: tuple[str, ...]
    cores: int
    memory_bytes: int
    device: str
    device_memory_bytes: int


@dataclass(frozen=True)
class Origin:
    """Who says so. command: as typed. date: ISO 8601, UTC. versions: (package, version), lowmem and Python
    first. source: the model, as the user named it. source_digest: fingerprint of its weights.
    load_average: of the machine, one minute, before anything began."""

    command: str
    date: str
    machine: Machine
    versions: tuple[tuple[str, str], ...]
    source: str
    source_digest: str
    load_average: float


@dataclass(frozen=True)
class Subject:
    """One form of the model. label: unique in its record ("4-bit g128", "bfloat16", "int8", "NF4").
    method: dense, gptq, int8, nf4, or a peer's name. bits_per_weight: all stored bits of the linears over
    their weights. weight_bytes: of the whole model as it is held."""

    label: str
    method: str
    dtype: str
    path: str
    bits_per_weight: float
    weight_bytes: int


# --- quality -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Of a quantity over tokens. standard_error: of the mean."""

    mean: float
    standard_error: float
    median: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Bucket:
    """Tokens at which the reference's largest probability lies in [low, high)."""

    low: float
    high: float
    tokens: int
    kld: float
    same_top1: float


@dataclass(frozen=True)
class TextQuality:
    """One form on one text, against the reference on the same tokens.

    ppl_ratio: ppl over the reference's, with the standard error of that ratio. rms_dp: root of the mean
    square of the change in the right token's probability.
    """

    text: str
    tokens: int
    ppl: float
    reference_ppl: float
    ppl_ratio: float
    ppl_ratio_standard_error: float
    kld: Spread
    same_top1: float
    same_top1_standard_error: float
    rms_dp: float
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True)
class GreedyAgreement:
    """How long a form's greedy answer is the reference's own, in tokens. limit: the longest that was asked
    for; an answer that ends earlier counts as its whole length. equal_tokens: one number a prompt."""

    limit: int
    answer_tokens: tuple[int, ...]
    equal_tokens: tuple[int, ...]


@dataclass(frozen=True)
class SubjectQuality:
    """A form on every text. seconds: that it took. noise_floor: it is the unquantized model in the
    arithmetic of `subject.dtype`: what rounding alone does."""

    subject: Subject
    noise_floor: bool
    texts: tuple[TextQuality, ...]
    greedy: GreedyAgreement | None
    seconds: float


@dataclass(frozen=True)
class QualityRecord:
    """`quality.json`. reference_dtype: the arithmetic of the reference's logits. reference_peak_bytes: of
    host memory, while they were computed (0: they were in the cache)."""

    origin: Origin
    reference_dtype: str
    reference_seconds: float
    reference_peak_bytes: int
    reference_cache_bytes: int
    subjects: tuple[SubjectQuality, ...]
    format: int = FORMAT


# --- HumanEval ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One answer to one problem. outcome: passed, failed, timeout, memory or refused; detail in one line."""

    task: str
    sample: int
    passed: bool
    outcome: str
    detail: str
    completion: str


@dataclass(frozen=True)
class SubjectHumanEval:
    """pass_at_1: mean over the problems of the share of their samples that pass, and its standard error."""

    subject: Subject
    problems: int
    samples: int
    temperature: float
    pass_at_1: float
    standard_error: float
    seconds: float
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True)
class HumanEvalRecord:
    """`humaneval.json`."""

    origin: Origin
    subjects: tuple[SubjectHumanEval, ...]
    format: int = FORMAT


# --- latency -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repeated:
    """A quantity measured several times: all values in the order of the rounds."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Roofline:
    """What the machine allowed while this was measured: bytes a second read by all cores (or the card), and
    floating-point operations a second of a matrix product in the dtype named."""

    read_bytes_per_second: Repeated
    matmul_flops_per_second: Repeated
    matmul_dtype: str


@dataclass(frozen=True)
class PrefillLatency:
    """A prompt of so many tokens. ttft: request to first token. ceiling: tokens/s that the roofline allows;
    share: reached of it."""

    prompt_tokens: int
    ttft: Repeated
    tokens_per_second: Repeated
    ceiling_tokens_per_second: float
    share: float


@dataclass(frozen=True)
class DecodeLatency:
    """New tokens after a context of so many. tpot: (end - first token) / (n - 1), one value a round. itl:
    all inter-token latencies' quantiles. joules_per_token: where the machine tells, else None."""

    context_tokens: int
    new_tokens: int
    tpot: Repeated
    itl_p50: float
    itl_p90: float
    itl_p99: float
    itl_seconds: tuple[float, ...]
    ceiling_tokens_per_second: float
    share: float
    joules_per_token: float | None


@dataclass(frozen=True)
class SubjectLatency:
    """fits: False where the planner says that it needs more than there is; then `reason` says how much, and
    nothing was measured. kernel: what multiplies. needed_bytes: planned."""

    subject: Subject
    fits: bool
    reason: str
    needed_bytes: int
    kernel: str
    load_seconds: Repeated | None
    prefill: tuple[PrefillLatency, ...]
    decode: tuple[DecodeLatency, ...]
    peak_host_bytes: int
    peak_device_bytes: int


@dataclass(frozen=True)
class LatencyRecord:
    """`latency.json`. drift: largest median of the roofline's read rate in a round over the smallest, minus
    1: how much the machine itself changed while this ran. warnings: in the user's words."""

    origin: Origin
    rounds: int
    threads: int
    roofline: Roofline
    drift: float
    warnings: tuple[str, ...]
    subjects: tuple[SubjectLatency, ...]
    format: int = FORMAT


# --- files -------------------------------------------------------------------------------------------------

Record = TypeVar("Record", QualityRecord, HumanEvalRecord, LatencyRecord)
FILES: dict[type, str] = {
    QualityRecord: "quality.json",
    HumanEvalRecord: "humaneval.json",
    LatencyRecord: "latency.json",
}


def to_json(record: Any) -> dict[str, Any]:
    """A record as JSON's own types."""
    return dataclasses.asdict(record)


def write_record(record: QualityRecord | HumanEvalRecord | LatencyRecord, folder: Path) -> Path:
    """Write a record to its file in `folder`, whole or not at all; the file.

    Raises OutputError where that cannot be done.
    """
    from lowmem.checkpoint.files.whole import as_output_error, write_whole

    file = folder / FILES[type(record)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_output_error(error, folder) from error
    write_whole(file, [(json.dumps(to_json(record), indent=1) + "\n").encode()])
    return file


def read_record(kind: type[Record], folder: Path) -> Record | None:
    """The record of this kind in `folder`, or None where there is none. SourceError if it is damaged."""
    file = folder / FILES[kind]
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _damaged(file, "not written by this version of lowmem bench")
    try:
        return typing.cast(Record, from_json(kind, data))
    except (TypeError, ValueError, KeyError) as error:
        raise _damaged(file, str(error)) from error


def _damaged(file: Path, why: str) -> LowmemError:
    return SourceError(f"{file} cannot be read: {why}", "Measure again, or remove it")


def from_json(kind: Any, data: Any) -> Any:
    """`data` as a value of type `kind`. Raises TypeError, ValueError or KeyError where it does not fit."""
    if dataclasses.is_dataclass(kind):
        make: Any = kind
        if not isinstance(data, dict):
            raise TypeError(f"no {make.__name__}")
        hints = typing.get_type_hints(kind)
        fields = dataclasses.fields(kind)
        if unknown := set(data) - {field.name for field in fields}:
            raise KeyError(f"unknown field {min(unknown)}")
        return make(**{field.name: from_json(hints[field.name], data[field.name]) for field in fields})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(data, list):
            raise TypeError("no list")
        if arguments[-1] is Ellipsis:
            return tuple(from_json(arguments[0], value) for value in data)
        return tuple(from_json(one, value) for one, value in zip(arguments, data, strict=True))
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return from_json(next(one for one in arguments if one is not type(None)), data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise TypeError(f"{data!r} is no {kind.__name__}")
    return data
