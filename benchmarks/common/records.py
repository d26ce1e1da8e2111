"""What a measurement found, as values. Reports are made of these alone.

The fields are the names in the JSON files. Sizes are bytes, times seconds, divergences nats.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMAT = 1


@dataclass(frozen=True)
class Machine:
    """Where a measurement ran."""

    cpu: str
    """Model name of the processor."""
    flags: tuple[str, ...]
    """Instruction sets of the CPU that matter here."""
    cores: int
    """Cores that the process may use."""
    memory_bytes: int
    device: str
    """The name of the card, or "cpu"."""
    device_memory_bytes: int
    """Memory of the card; 0 without one."""


@dataclass(frozen=True)
class Origin:
    """How a record was made."""

    command: str
    """The command line, as typed."""
    date: str
    """Start, ISO 8601 in UTC."""
    machine: Machine
    versions: tuple[tuple[str, str], ...]
    """(package, version), lowmem and Python first."""
    source: str
    """The unquantized model, as the user named it."""
    source_digest: str
    """Fingerprint of its weights."""
    load_average: float
    """Of one minute, before the measurement."""


@dataclass(frozen=True)
class MadeWith:
    """The code behind the figures of one version; see `lowmem.benchmarks.common.currency`."""

    kernel: str
    """What multiplied the linears; "" if they were dequantized, or if it is unknown."""
    kernel_contract: int
    """Version of lowmem's C kernels; 0 if another kernel ran."""
    recipe: int
    """Recipe version of the converter that made the folder; 0 if unknown, or not made by lowmem."""

    def describe(self) -> str:
        """One line; "" if nothing is known."""
        kernel = self.kernel + (f", contract {self.kernel_contract}" if self.kernel_contract else "")
        return "; ".join(filter(None, [f"recipe {self.recipe}" if self.recipe else "", kernel]))


@dataclass(frozen=True)
class Subject:
    """One version of the model."""

    label: str
    """Unique within its record: "4-bit g128", "bfloat16", "int8", "NF4"."""
    method: str
    """dense, gptq, int8, nf4, or the name of another tool."""
    dtype: str
    """Of the activations."""
    path: str
    bits_per_weight: float
    """All stored bits of the linears over their number of weights."""
    weight_bytes: int
    """Weights of the whole model in memory."""
    made_with: MadeWith | None = None
    """None in records of earlier versions of lowmem: unknown."""


@dataclass(frozen=True)
class Repeated:
    """A quantity measured once per round."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]
    """All values, in the order of the rounds."""


# --- quality -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The distribution of a quantity over tokens."""

    mean: float
    standard_error: float
    """Of the mean."""
    median: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Bucket:
    """The tokens for which the reference's largest probability lies in [low, high)."""

    low: float
    high: float
    tokens: int
    kld: float
    same_top1: float


@dataclass(frozen=True)
class TextQuality:
    """Comparison of one version with the reference on one text."""

    text: str
    tokens: int
    ppl: float
    reference_ppl: float
    ppl_ratio: float
    """`ppl` over `reference_ppl`."""
    ppl_ratio_standard_error: float
    kld: Spread
    same_top1: float
    """Share of tokens with the same most likely token."""
    same_top1_standard_error: float
    rms_dp: float
    """Root mean square of the change in the correct token's probability."""
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True)
class GreedyAgreement:
    """Number of tokens for which greedy answers equal the reference's; one number per prompt."""

    limit: int
    """The longest answer allowed."""
    answer_tokens: tuple[int, ...]
    equal_tokens: tuple[int, ...]


@dataclass(frozen=True)
class AllocatedLinear:
    """How one linear of a version that was made for a size is stored, and why."""

    name: str
    """Its full name, such as "transformer.h.3.mlp.c_fc"."""
    bits: int
    group_size: int
    """Input columns that share a scale; -1 is one group for the whole row."""
    sym: bool
    predicted_kld: float
    """What it was predicted to add to the KL divergence as it is stored."""
    sensitivity: float
    """What it was predicted to add at 4 bits."""


@dataclass(frozen=True)
class Allocated:
    """The bits that `lowmem convert` chose for a size, from the version's `lowmem-report.json`."""

    made_for: str
    """The option that asked for the size, such as "--bpw 3.5"."""
    predicted_kld: float
    """Of all linears together, on the calibration rows."""
    linears: tuple[AllocatedLinear, ...]


@dataclass(frozen=True)
class SubjectQuality:
    """Results of one version on every text."""

    subject: Subject
    noise_floor: bool
    """Whether it is the unquantized model, measured for the effect of rounding in the arithmetic."""
    texts: tuple[TextQuality, ...]
    greedy: GreedyAgreement | None
    seconds: float
    allocated: Allocated | None = None
    """None if the version was not made for a size, and in records of earlier versions of lowmem."""


@dataclass(frozen=True)
class QualityRecord:
    """`quality.json`."""

    origin: Origin
    reference_dtype: str
    reference_seconds: float
    reference_peak_bytes: int
    """Peak host memory while the reference was computed; 0 if it came from the cache."""
    reference_cache_bytes: int
    subjects: tuple[SubjectQuality, ...]
    format: int = FORMAT


# --- HumanEval ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One answer to one problem."""

    task: str
    sample: int
    passed: bool
    outcome: str
    """passed, failed, timeout, memory or refused."""
    detail: str
    """The reason, in one line."""
    completion: str


@dataclass(frozen=True)
class SubjectHumanEval:
    """Results of one version on all problems."""

    subject: Subject
    problems: int
    samples: int
    """Answers to each problem."""
    temperature: float
    pass_at_1: float
    """Mean over the problems of the share of their samples that pass."""
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
class Roofline:
    """The machine's rates during the measurement."""

    read_bytes_per_second: Repeated
    """Memory bandwidth of all cores, or of the card."""
    matmul_flops_per_second: Repeated
    """Floating-point operations of a matrix product."""
    matmul_dtype: str


@dataclass(frozen=True)
class PrefillLatency:
    """Prefill times of prompts of one length."""

    prompt_tokens: int
    ttft: Repeated
    """Request to first token."""
    tokens_per_second: Repeated
    ceiling_tokens_per_second: float
    """What the roofline allows."""
    share: float
    """Measured over ceiling."""


@dataclass(frozen=True)
class DecodeLatency:
    """Decode times after a context of one length."""

    context_tokens: int
    new_tokens: int
    tpot: Repeated
    """Time per output token: (end - first token) / (n - 1)."""
    itl_p50: float
    itl_p90: float
    itl_p99: float
    itl_seconds: tuple[float, ...]
    """Every inter-token latency of every round."""
    ceiling_tokens_per_second: float
    share: float
    joules_per_token: float | None
    """None if the machine has no energy counter that can be read."""


@dataclass(frozen=True)
class BatchLatency:
    """Decode times of several answers at once, each after a context of the same length."""

    sequences: int
    context_tokens: int
    new_tokens: int
    """Of each answer."""
    step: Repeated
    """Seconds in which each answer gets a token."""
    of_one: Repeated
    """Tokens per second of all answers, over those of one after this context in the same round."""


@dataclass(frozen=True)
class SubjectLatency:
    """Timings of one version."""

    subject: Subject
    fits: bool
    """False if it needs more memory than is free, or failed: nothing was measured then."""
    reason: str
    needed_bytes: int
    """Planned memory."""
    kernel: str
    load_seconds: Repeated | None
    prefill: tuple[PrefillLatency, ...]
    decode: tuple[DecodeLatency, ...]
    peak_host_bytes: int
    peak_device_bytes: int
    batch: BatchLatency | None = None
    """None if it was not asked for or does not fit, and in records of earlier versions of lowmem."""


@dataclass(frozen=True)
class LatencyRecord:
    """`latency.json`."""

    origin: Origin
    rounds: int
    threads: int
    roofline: Roofline
    drift: float
    """Highest memory bandwidth of a round over the lowest, minus 1: how much the machine itself changed."""
    warnings: tuple[str, ...]
    subjects: tuple[SubjectLatency, ...]
    format: int = FORMAT
