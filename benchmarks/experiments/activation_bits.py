"""Quality with fewer activation bits: `python -m lowmem.benchmarks.experiments.activation_bits SOURCE
FOLDER…`.

Each converted folder runs through lowmem's kernels, which quantize the activations of all linears to 8, 12,
16 and 24 bits in turn. Logits are compared with those of the unquantized float32 model, as in `lowmem bench
quality`. All other activations are float32, so only the width of the integers differs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lowmem.benchmarks.common.origin import origin_of
from lowmem.benchmarks.quality.divergence import compare
from lowmem.benchmarks.quality.texts import read_texts

from lowmem.kernels.native import linear as native_linear
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.loading.loader import LoadedModel, LoadOptions, load

TEXTS = ("code", "dialogues")
PLANES = {24: 3, **{bits: native_linear.planes_of(bits) for bits in (16, 12, 8)}}
"""By the bits of an activation's integer; weights of 8 bits take 16 for 12."""
_AT_ONCE = 4  # rows


def main(argv: list[str] | None = None) -> int:
    """Print the table, and write the JSON that --out names."""
    parser = argparse.ArgumentParser(
        prog="python -m lowmem.benchmarks.experiments.activation_bits", description=__doc__
    )
    parser.add_argument("source", help="the unquantized model")
    parser.add_argument("folders", nargs="+", help="converted ones")
    parser.add_argument("--rows", type=int, default=24, help="of each text (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    reference = load(args.source, LoadOptions(dtype=torch.float32))
    vocabulary = reference.model.get_input_embeddings().weight.shape[0]
    texts = read_texts(TEXTS, (), reference.tokenizer, vocabulary, rows=args.rows)
    right = {text.name: list(_logits(reference, text.rows)) for text in texts}
    results: list[dict[str, Any]] = []
    print("| form | " + " | ".join(f"{bits} bits, {name}" for bits in PLANES for name in TEXTS) + " |")
    print("|---" * (1 + len(PLANES) * len(TEXTS)) + "|")
    for folder in args.folders:
        loaded = load(folder, LoadOptions(dtype=torch.float32))
        kld: dict[str, dict[str, float]] = {}
        for bits, planes in PLANES.items():
            _use(loaded, planes)
            kld[str(bits)] = {
                text.name: float(
                    compare(
                        text.rows, zip(right[text.name], _logits(loaded, text.rows), strict=True)
                    ).kld.mean()
                )
                for text in texts
            }
        print(
            f"| {loaded.label} | " + " | ".join(f"{v:.6f}" for t in kld.values() for v in t.values()) + " |"
        )
        sys.stdout.flush()
        results.append({"form": loaded.label, "kld": kld})
    if args.out:
        origin = origin_of(sys.argv[1:], args.source, "")
        origin = replace(
            origin,
            command=shlex.join(["python -m lowmem.benchmarks.experiments.activation_bits", *sys.argv[1:]]),
        )
        args.out.write_text(json.dumps({"origin": asdict(origin), "results": results}, indent=1) + "\n")
    return 0


def _use(loaded: LoadedModel, planes: int) -> None:
    """Set the number of bytes per activation in all linears of the model."""
    native_linear.PLANES[torch.float32] = planes
    for module in loaded.model.modules():
        if isinstance(module, QuantLinear):
            if module.packed is None:
                raise SystemExit("lowmem's own kernels are not used here: see lowmem doctor")
            module.packed.planes = planes


def _logits(loaded: LoadedModel, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """[some tokens, vocabulary] of all rows in order."""
    with torch.inference_mode():
        for part in rows.split(_AT_ONCE):
            yield loaded.model(input_ids=part).logits.float().flatten(0, 1)


if __name__ == "__main__":
    sys.exit(main())
