"""What `pace` found, the contents of results/pace.json, and the goals beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from lowmem.benchmarks.common.records import Origin, Repeated
from lowmem.benchmarks.experiments.common import repeated
from lowmem.benchmarks.experiments.pace.load import Load
from lowmem.benchmarks.experiments.pace.models import SMALL_VOCAB
from lowmem.benchmarks.experiments.starchat.dimensions import VOCAB
from lowmem.benchmarks.experiments.workers.lowmem_worker import Batch
from lowmem.benchmarks.experiments.workers.turns import RuntimeFacts

BESIDE = "decode 512, beside whole heads"
"""Decoding of a model with a small head in the turns of those with a whole one."""
FOUR, EIGHT, THREE = "lowmem 4-bit g128", "lowmem 8-bit g128", "lowmem 3-bit g64"
SIX, FIVE = "lowmem 6-bit g128", "lowmem 5-bit g128"


@dataclass(frozen=True)
class Timing:
    """One model doing one thing."""

    model: str
    what: str
    """ "prefill 512", "decode 512", "1 row", "4 rows" …"""
    tokens: int
    """That go through the model in `seconds`."""
    seconds: Repeated
    """Of a prompt, a token or a step: one value a round, each a median of the round's."""
    bytes: int
    """That a decode step reads: weights, scales, head and KV cache; 0 for other steps."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds.median


@dataclass(frozen=True)
class Share:
    """Decoding between reads, in one process."""

    model: str
    context: int
    bytes: int
    """That a step reads."""
    batches: tuple[Batch, ...]

    def shares(self) -> tuple[float, ...]:
        """Of each batch: bytes a second while decoding, over those of the reads just before and after."""
        return tuple(
            self.bytes / median(batch.seconds) / ((batch.before + batch.after) / 2) for batch in self.batches
        )


@dataclass(frozen=True)
class PaceRecord:
    """`pace.json`."""

    origin: Origin
    layers: int
    threads: int
    rounds: int
    llama: str
    """The version of llama-cpp-python; empty without it."""
    models: tuple[RuntimeFacts, ...]
    timings: tuple[Timing, ...]
    shares: tuple[Share, ...]
    loads: tuple[Load, ...]

    def timing(self, model: str, what: str) -> Timing | None:
        """The timing of a model, or None."""
        return next((t for t in self.timings if (t.model, t.what) == (model, what)), None)


@dataclass(frozen=True)
class Goal:
    """A goal of the project, and what was found."""

    name: str
    bound: float
    least: bool
    """Whether the median must reach `bound`; otherwise it must not exceed it."""
    found: Repeated | None
    """The median and extremes of the rounds' own ratios; None where it was not measured."""

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal."""
        if self.found is None:
            return None
        return self.found.median >= self.bound if self.least else self.found.median <= self.bound


def ratio(over: Timing | None, under: Timing | None) -> Repeated | None:
    """How many times faster `under` is a token than `over`, round by round."""
    if over is None or under is None or not under.seconds.values:
        return None
    scale = under.tokens / over.tokens
    pairs = zip(over.seconds.values, under.seconds.values, strict=False)
    return repeated([scale * a / b for a, b in pairs])


def goals(record: PaceRecord) -> Iterator[Goal]:
    """The project's goals in their order, with what was found."""

    def decode(over: str, under: str) -> Repeated | None:
        return ratio(record.timing(over, "decode 512"), record.timing(under, "decode 512"))

    for model, bits, bound in ((FOUR, 4, 0.95), (FIVE, 5, 0.9), (SIX, 6, 0.9)):
        share = next((share for share in record.shares if share.model == model), None)
        found = repeated(share.shares()) if share else None
        yield Goal(f"share of the read bandwidth in decode, {bits} bits", bound, True, found)
    yield Goal("decode, 4-bit g128 / llama.cpp Q4_0", 1.35, True, decode("llama.cpp Q4_0", FOUR))
    yield Goal("decode, 8-bit g128 / Q8_0", 1.35, True, decode("llama.cpp Q8_0", EIGHT))
    yield Goal("decode, 3-bit g64 / our 4-bit", 1.2, True, decode(FOUR, THREE))
    best = best_prefill(record)
    kind = best.model.removeprefix("llama.cpp ") if best else "not measured"
    found = ratio(best, record.timing(FOUR, "prefill 512"))
    yield Goal(f"prefill of 512 tokens, 4-bit / llama.cpp's best ({kind})", 1.4, True, found)
    yield Goal("4 rows at once / 1 row, 4 bits", 1.3, False, rows_ratio(record, FOUR))
    largest = max((load.layers for load in record.loads), default=0)
    loads = [load.whole / load.read_seconds for load in record.loads if load.layers == largest]
    name = f"load to first token / reading the bytes once, 4 bits, {largest} layers"
    yield Goal(name, 1.2, False, repeated(loads) if loads else None)


def rows_ratio(record: PaceRecord, model: str) -> Repeated | None:
    """Time of a step of 4 rows over that of 1."""
    one, many = record.timing(model, "1 row"), record.timing(model, "4 rows")
    if one is None or many is None:
        return None
    return repeated([m / o for m, o in zip(many.seconds.values, one.seconds.values, strict=True)])


def whole_model(record: PaceRecord, layers: int) -> dict[str, float]:
    """Seconds a token of models of `layers` layers, by arithmetic, for the models with the whole head.

    The whole vocabulary's time less that of the small one, measured beside it, is the time of the other rows
    of the head. Without the small head's rows, the rest of that model's time is its layers'.
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
    """llama.cpp's fastest version."""
    found = [t for t in record.timings if t.what == "prefill 512" and t.model.startswith("llama.cpp")]
    return max(found, key=lambda timing: timing.rate, default=None)
