"""What `lowmem.benchmarks.experiments.pace.command` found, as values: the contents of results/pace.json, and the goals beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from lowmem.benchmarks.common.records import Origin, Repeated
from lowmem.benchmarks.experiments.full_size.shaped import VOCAB
from lowmem.benchmarks.experiments.pace.linears import LinearTimes
from lowmem.benchmarks.experiments.pace.load import Load
from lowmem.benchmarks.experiments.pace.models import SMALL_VOCAB
from lowmem.benchmarks.experiments.pace.worker import Batch


@dataclass(frozen=True)
class Timing:
    """One model doing one thing. what: "prefill 512", "decode 512", "1 row", "4 rows" …. seconds: a prompt, a
    token or a step; one value a round, each a median of the round's. bytes: that a step of decoding reads:
    weights, scales, head and KV cache, counted from the model or the file; 0 for others."""

    model: str
    what: str
    tokens: int
    seconds: Repeated
    bytes: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds.median


@dataclass(frozen=True)
class Share:
    """Decoding between reads, in one process. bytes: that a step reads."""

    model: str
    context: int
    bytes: int
    batches: tuple[Batch, ...]

    def shares(self) -> tuple[float, ...]:
        """Of each batch: bytes a second while decoding over those of the reads just before and after."""
        return tuple(
            self.bytes / median(batch.seconds) / ((batch.before + batch.after) / 2) for batch in self.batches
        )


@dataclass(frozen=True)
class ModelFacts:
    """bytes: by name ("packed", "scales", "head", …) of what a step at the short context reads."""

    label: str
    kernel: str
    load_seconds: float
    bytes: tuple[tuple[str, int], ...]
    failure: str = ""


@dataclass(frozen=True)
class PaceRecord:
    """`pace.json`. rounds: of what takes turns. llama: version of llama-cpp-python."""

    origin: Origin
    layers: int
    threads: int
    rounds: int
    llama: str
    models: tuple[ModelFacts, ...]
    timings: tuple[Timing, ...]
    shares: tuple[Share, ...]
    loads: tuple[Load, ...]
    linears: tuple[LinearTimes, ...]
    format: int = 1

    def timing(self, model: str, what: str) -> Timing | None:
        """That of a model, if it was taken."""
        return next((t for t in self.timings if (t.model, t.what) == (model, what)), None)


@dataclass(frozen=True)
class Goal:
    """What is to be reached. found: the median, and the extremes, of the rounds' own ratios; None where it
    was not measured. least: found must not be below `bound`, else not above."""

    name: str
    bound: float
    least: bool
    found: Repeated | None

    @property
    def met(self) -> bool | None:
        """Whether the median does."""
        if self.found is None:
            return None
        return self.found.median >= self.bound if self.least else self.found.median <= self.bound


BESIDE = "decode 512, beside whole heads"
"""What a model with a small head does in the turns of those with a whole one."""


def repeated(values: list[float]) -> Repeated:
    """The median and the extremes."""
    return Repeated(median(values), min(values), max(values), tuple(values))


def ratio(over: Timing | None, under: Timing | None) -> Repeated | None:
    """Seconds a token of one over those of another, round by round: how many times faster `under` is."""
    if over is None or under is None or not under.seconds.values:
        return None
    scale = under.tokens / over.tokens
    pairs = zip(over.seconds.values, under.seconds.values, strict=False)
    return repeated([scale * a / b for a, b in pairs])


FOUR, EIGHT, THREE, TWO = (
    "lowmem 4-bit g128",
    "lowmem 8-bit g128",
    "lowmem 3-bit g64",
    "lowmem 2-bit g32",
)


def goals(record: PaceRecord) -> Iterator[Goal]:
    """Those of docs, in their order, with what was found."""

    def decode(over: str, under: str) -> Repeated | None:
        return ratio(record.timing(over, "decode 512"), record.timing(under, "decode 512"))

    share = next((share for share in record.shares if share.model == FOUR), None)
    found = repeated(list(share.shares())) if share else None
    yield Goal("share of the read bandwidth in decode, 4 bits", 0.95, True, found)
    yield Goal("decode, 4-bit g128 / llama.cpp Q4_0", 1.35, True, decode("llama.cpp Q4_0", FOUR))
    yield Goal("decode, 8-bit g128 / Q8_0", 1.35, True, decode("llama.cpp Q8_0", EIGHT))
    yield Goal("decode, 3-bit g64 / our 4-bit", 1.2, True, decode(FOUR, THREE))
    best = best_prefill(record)
    kind = best.model.removeprefix("llama.cpp ") if best else "not measured"
    yield Goal(
        f"prefill of 512 tokens, 4-bit / llama.cpp's best ({kind})", 1.4, True,
        ratio(best, record.timing(FOUR, "prefill 512")),
    )  # fmt: skip
    yield Goal("4 rows at once / 1 row, 4 bits", 1.3, False, rows_ratio(record, FOUR))
    largest = max((load.layers for load in record.loads), default=0)
    loads = [load.whole / load.read_seconds for load in record.loads if load.layers == largest]
    yield Goal(
        f"load to first token / reading the bytes once, 4 bits, {largest} layers",
        1.2,
        False,
        repeated(loads) if loads else None,
    )


def rows_ratio(record: PaceRecord, model: str) -> Repeated | None:
    """Time of a step of 4 rows over that of 1."""
    one, many = record.timing(model, "1 row"), record.timing(model, "4 rows")
    if one is None or many is None:
        return None
    return repeated([m / o for m, o in zip(many.seconds.values, one.seconds.values, strict=True)])


def whole_model(record: PaceRecord, layers: int) -> dict[str, float]:
    """Seconds a token of models of so many layers, by arithmetic, under the labels with the whole head.

    A model with the whole vocabulary less the same with a small one, beside it, is the rest of the head; what
    is left when the small head goes too, in proportion to its rows, are the layers.
    """
    found = {}
    for model in record.models:
        small, _, head = model.label.partition(", ")
        whole, cut = record.timing(model.label, "decode 512"), record.timing(small, BESIDE)
        if head and whole and cut:
            rest = whole.seconds.median - cut.seconds.median
            a_row = rest / (VOCAB - SMALL_VOCAB)
            of_layers = cut.seconds.median - a_row * SMALL_VOCAB
            found[model.label] = of_layers * layers / record.layers + a_row * VOCAB
    return found


def best_prefill(record: PaceRecord) -> Timing | None:
    """llama.cpp's fastest form."""
    found = [t for t in record.timings if t.what == "prefill 512" and t.model.startswith("llama.cpp")]
    return max(found, key=lambda timing: timing.rate, default=None)
