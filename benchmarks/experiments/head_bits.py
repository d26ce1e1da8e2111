"""What a head and an embedding in 8 bits cost in quality and in loading, and save in time.

    python -m lowmem.benchmarks.experiments.head_bits SOURCE FOLDER… --no-speed
    python -m lowmem.benchmarks.experiments.head_bits --out benchmarks/results/head_pace.json

Quality: the source and each converted folder are loaded in float32 with the head in 16 and in 8 bits, and
their logits are compared with the unquantized model's, as by `lowmem bench quality`. Speed: decoder layers of
StarChat Alpha's dimensions at 4 bits with its vocabulary, random weights, in bfloat16; both heads decode in
turns.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from lowmem.benchmarks.common.records import Origin, Repeated
from lowmem.benchmarks.experiments.common import (
    RESULTS,
    Experiment,
    made_with,
    origin_here,
    repeated,
    say,
    spread,
    table,
)
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions
from lowmem.benchmarks.experiments.starchat.random_weights import write_packed
from lowmem.benchmarks.quality.divergence import compare
from lowmem.benchmarks.quality.texts import read_texts

from lowmem.config import SamplingParams
from lowmem.generate.engine import Engine
from lowmem.loading.loader import LoadedModel, LoadOptions, load
from lowmem.models.embedding import token_table
from lowmem.plan.memory import HEAD_BITS

TEXTS = ("code", "prose", "dialogues")
TOKENS = 16
"""Tokens of one answer; the first is not timed."""
_AT_ONCE = 4  # rows


@dataclass(frozen=True)
class Divergence:
    """The mean KL divergence of one version on one text, in nats."""

    version: str
    head_bits: int
    text: str
    kld: float
    same_top: float
    """Share of positions with the same most likely token."""


@dataclass(frozen=True)
class Pace:
    """One head in a model of a few decoder layers at StarChat Alpha's dimensions."""

    head_bits: int
    layers: int
    weight_bytes: int
    load_seconds: float
    """With the files in the page cache."""
    token_ms: Repeated
    """Milliseconds per token: of each round the median."""


@dataclass(frozen=True)
class HeadBits:
    """The record."""

    origin: Origin
    quality: tuple[Divergence, ...]
    pace: tuple[Pace, ...]


def quality(source: str, folders: Sequence[str], rows: int) -> Iterator[Divergence]:
    """The source and every folder with both heads on every text."""
    reference = load(source, LoadOptions(dtype=torch.float32))
    texts = read_texts(TEXTS, (), reference.tokenizer, token_table(reference.model).vocabulary, rows=rows)
    expected = {text.name: list(_logits(reference, text.rows)) for text in texts}
    for folder in (source, *folders):
        for bits in HEAD_BITS:
            if folder == source and bits == 16:  # the reference itself
                continue
            loaded = load(folder, LoadOptions(dtype=torch.float32, head_bits=bits))
            for text in texts:
                figures = compare(
                    text.rows, zip(expected[text.name], _logits(loaded, text.rows), strict=True)
                )
                kld, same = float(figures.kld.mean()), float(figures.same_top1.mean())
                say(f"{loaded.label}, {text.name}: {kld:.6f}")
                version = loaded.label.removesuffix(", 8-bit head")
                yield Divergence(version, bits, text.name, kld, same)


def _logits(loaded: LoadedModel, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """[tokens of some rows, vocabulary], in order."""
    with torch.inference_mode():
        for part in rows.split(_AT_ONCE):
            yield loaded.model(input_ids=part).logits.float().flatten(0, 1)


def pace(layers: int, rounds: int) -> Iterator[Pace]:
    """Both heads, in turns."""
    with tempfile.TemporaryDirectory(prefix="lowmem-head-") as temporary:
        folder = write_packed(Path(temporary) / "model", Dimensions(layers=layers), 4, 128)
        load(folder, LoadOptions(dtype=torch.bfloat16))  # into the page cache
        loaded = {bits: load(folder, LoadOptions(dtype=torch.bfloat16, head_bits=bits)) for bits in HEAD_BITS}
        engines = {bits: Engine(one.model, context=256, speculate=False) for bits, one in loaded.items()}
        times: dict[int, list[float]] = {bits: [] for bits in HEAD_BITS}
        for engine in engines.values():
            engine.repacking.finish()
            _token_ms(engine)
        for number in range(rounds):
            for bits in HEAD_BITS if number % 2 == 0 else HEAD_BITS[::-1]:
                times[bits].append(_token_ms(engines[bits]))
                say(f"{bits}-bit head: {times[bits][-1]:.2f} ms per token")
        for bits, one in loaded.items():
            yield Pace(bits, layers, one.weight_bytes, one.load_seconds, repeated(times[bits]))


def _token_ms(engine: Engine) -> float:
    """The median milliseconds of an answer's tokens after the first."""
    engine.reset()
    edges = []
    for _ in engine.generate([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=TOKENS)):
        edges.append(time.perf_counter())
    return 1000 * median(after - before for before, after in pairwise(edges))


def render(record: HeadBits) -> str:
    """A table of the quality and one of the pace."""
    found = {(one.version, one.head_bits, one.text): one for one in record.quality}
    lines, parts = [], []
    for version, bits in dict.fromkeys((one.version, one.head_bits) for one in record.quality):
        cells = [found[version, bits, text] for text in TEXTS]
        top = f"{100 * cells[0].same_top:.2f}%"
        lines.append([version, str(bits), *(f"{cell.kld:.6f}" for cell in cells), top])
    heads = ["version", "head", *(f"KL divergence: {text}" for text in TEXTS), f"same top-1: {TEXTS[0]}"]
    if lines:
        parts.append(table(heads, lines))
    if record.pace:
        lines = [
            [f"{one.head_bits} bits", f"{one.weight_bytes / 1e6:.0f} MB", f"{one.load_seconds:.2f} s",
             spread(one.token_ms.values)]
            for one in record.pace
        ]  # fmt: skip
        layers = record.pace[0].layers
        parts.append(table(["head", f"weights, {layers} layers", "load", "ms per token"], lines))
    return "\n\n".join((*parts, made_with(record.origin)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    experiment = Experiment("head_bits", HeadBits, RESULTS / "head_bits.json", render)
    parser = experiment.parser(__doc__)
    parser.add_argument("source", nargs="?", help="the unquantized model (without: speed only)")
    parser.add_argument("folders", nargs="*", help="converted ones")
    parser.add_argument("--rows", type=int, default=24, help="of each text (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="that decode (%(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="of decoding, both heads each (%(default)s)")
    parser.add_argument("--no-speed", action="store_true", help="measure quality only")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)

    def measured() -> HeadBits:
        origin = origin_here("head_bits", words, args.source or "made-up weights")
        found = tuple(quality(args.source, args.folders, args.rows)) if args.source else ()
        return HeadBits(origin, found, () if args.no_speed else tuple(pace(args.layers, args.rounds)))

    return experiment.run(args, measured)


if __name__ == "__main__":
    sys.exit(main())
