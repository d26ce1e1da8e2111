"""What activations of fewer bits cost in quality.

    python -m lowmem.benchmarks.experiments.activation_bits SOURCE FOLDER… [--out FILE]

Each converted folder is computed by lowmem's own kernels with 24, 16, 12 and 8 bits for an activation's
integer in all linears, and its logits are compared with the unquantized model's in float32, as by `lowmem
bench quality`. The rest is float32, so that only the width of the integers differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.experiments.common import Experiment, origin_here, say, table
from lowmem.benchmarks.quality.divergence import compare
from lowmem.benchmarks.quality.texts import read_texts

from lowmem.kernels.native import linear as native_linear
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.loading.loader import LoadedModel, LoadOptions, load

TEXTS = ("code", "dialogues")
PLANES = {24: 3, **{bits: native_linear.planes_of(bits) for bits in (16, 12, 8)}}
"""Bytes of an activation by its bits; weights of more than 4 bits take 16 bits for 12."""
_AT_ONCE = 4  # rows


@dataclass(frozen=True)
class Divergence:
    """The mean KL divergence of one version on one text."""

    version: str
    bits: int
    text: str
    kld: float


@dataclass(frozen=True)
class ActivationBits:
    """The record."""

    origin: Origin
    found: tuple[Divergence, ...]


def measure(source: str, folders: Sequence[str], rows: int) -> Iterator[Divergence]:
    """Every folder with every width on every text."""
    reference = load(source, LoadOptions(dtype=torch.float32))
    vocabulary = reference.model.get_input_embeddings().weight.shape[0]
    texts = read_texts(TEXTS, (), reference.tokenizer, vocabulary, rows=rows)
    expected = {text.name: list(_logits(reference, text.rows)) for text in texts}
    for folder in folders:
        loaded = load(folder, LoadOptions(dtype=torch.float32))
        for bits, planes in PLANES.items():
            _use(loaded, planes)
            for text in texts:
                pairs = zip(expected[text.name], _logits(loaded, text.rows), strict=True)
                kld = float(compare(text.rows, pairs).kld.mean())
                say(f"{loaded.label}, {bits} bits, {text.name}: {kld:.6f}")
                yield Divergence(loaded.label, bits, text.name, kld)


def _use(loaded: LoadedModel, planes: int) -> None:
    """Have all linears of the model multiply with `planes` bytes of an activation."""
    native_linear.PLANES[torch.float32] = planes
    for module in loaded.model.modules():
        if isinstance(module, QuantLinear):
            if module.packed is None:
                raise SystemExit("lowmem's own kernels are not used here: see lowmem doctor")
            module.packed.planes = planes


def _logits(loaded: LoadedModel, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """[tokens of some rows, vocabulary], in order."""
    with torch.inference_mode():
        for part in rows.split(_AT_ONCE):
            yield loaded.model(input_ids=part).logits.float().flatten(0, 1)


def render(record: ActivationBits) -> str:
    """A row for each version."""
    columns = [(bits, text) for bits in PLANES for text in TEXTS]
    found = {(one.version, one.bits, one.text): f"{one.kld:.6f}" for one in record.found}
    rows = [
        [version, *(found[version, bits, text] for bits, text in columns)]
        for version in dict.fromkeys(one.version for one in record.found)
    ]
    return table(["version", *(f"{bits} bits, {text}" for bits, text in columns)], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    experiment = Experiment("activation_bits", ActivationBits, Path("activation_bits.json"), render)
    parser = experiment.parser(__doc__)
    parser.add_argument("source", help="the unquantized model")
    parser.add_argument("folders", nargs="+", help="converted ones")
    parser.add_argument("--rows", type=int, default=24, help="of each text (%(default)s)")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    origin = origin_here("activation_bits", words, args.source)
    return experiment.run(
        args, lambda: ActivationBits(origin, tuple(measure(args.source, args.folders, args.rows)))
    )


if __name__ == "__main__":
    sys.exit(main())
