"""One mixed-width conversion by AutoRound's AutoScheme. Run by path, in an interpreter that has AutoRound.

AutoScheme chooses each linear's width for an average of stored bits, scales and zero-points included; the
tuning that follows has AutoRound's defaults. lowmem is not imported: it need not be installed there.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

BATCH = 8
"""AutoRound's own batch size, for scoring and for tuning."""
OPTIONS = tuple(f"W{bits}A16" for bits in (2, 3, 4, 5, 6, 8))
"""AutoRound's schemes of these widths: symmetric, groups of 128."""
ROWS = "token-rows"
"""The name under which AutoRound knows the token rows of --tokens: AutoScheme accepts only names."""


def register_rows(rows: list[list[int]]) -> None:
    """Make `rows` a calibration data set of AutoRound, named ROWS."""
    from auto_round.calib_dataset import register_dataset  # type: ignore[import-not-found]
    from datasets import Dataset

    @register_dataset(ROWS)  # type: ignore[untyped-decorator]
    def read(*_args: Any, **_options: Any) -> Dataset:
        return Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])


def grid_values(weight: Any, scale: Any, zero: Any, group_size: int) -> tuple[Any, int]:
    """What a packed linear represents, and how many integers differ from AutoRound's own rounding.

    weight: [outputs, inputs], AutoRound's rounded weight in the dtype of the model. scale, zero: one for each
    output and group. AutoRound's exporter rounds weight / scale + zero-point to the stored integers and keeps
    the scale in float16. Returns float32 [outputs, inputs], and the number of weights that are far from it.
    """
    import torch

    outputs, inputs = weight.shape
    steps = scale.reshape(outputs, -1, 1).float().half().float()
    zeros = zero.reshape(outputs, -1, 1).float() if isinstance(zero, torch.Tensor) else float(zero)
    groups = weight.float().reshape(outputs, inputs // group_size, group_size)
    integers = torch.round(groups / scale.reshape(outputs, -1, 1).float() + zeros)
    values = (integers - zeros) * steps
    far = (values - groups).abs() > 0.3 * steps.abs()
    return values.reshape(outputs, inputs).contiguous(), int(far.sum())


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Choose widths, convert on the CPU, and write the dequantized linears to --out."""
    import torch
    from auto_round import AutoRound, AutoScheme
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    rows = json.loads(args.tokens.read_bytes())
    register_rows(rows)
    length = len(rows[0])
    scheme = AutoScheme(avg_bits=args.average, options=OPTIONS, nsamples=len(rows), seqlen=length)
    tuner = AutoRound(
        args.source,
        AutoTokenizer.from_pretrained(args.source, local_files_only=True),
        scheme=scheme,
        iters=args.iters,
        dataset=ROWS,
        nsamples=len(rows),
        seqlen=length,
        batch_size=BATCH,
        device_map="cpu",
        enable_torch_compile=False,
    )
    model, _ = tuner.quantize()
    dense: dict[str, torch.Tensor] = {}
    widths: dict[str, tuple[int, int]] = {}
    differ = 0
    for name, module in model.named_modules():
        linear: Any = module  # AutoRound adds the attributes
        if not isinstance(module, torch.nn.Linear) or int(getattr(linear, "bits", 16)) >= 16:
            continue
        bits, group = int(linear.bits), int(linear.group_size)
        dense[f"{name}.weight"], far = grid_values(linear.weight.detach(), linear.scale, linear.zp, group)
        widths[name] = (bits, group)
        differ += far
    save_file(dense, str(args.out))
    return {
        "widths": widths,
        "off_grid": differ,
        "settings": {
            "options": OPTIONS,
            "iters": args.iters,
            "rows": [len(rows), length],
            "batch_size": BATCH,
        },
        "versions": {"auto-round": version("auto-round"), "AutoRound's torch": version("torch")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a model with AutoRound's AutoScheme.")
    parser.add_argument("source")
    parser.add_argument("--tokens", type=Path, required=True, help="JSON: rows of token ids, all of a length")
    parser.add_argument("--out", type=Path, required=True, help="safetensors: the dequantized linears")
    parser.add_argument("--report", type=Path, required=True, help="the JSON file to write widths to")
    parser.add_argument("--average", type=float, required=True, help="stored bits per weight")
    parser.add_argument("--iters", type=int, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("AR_AUTO_SCHEME_CACHE", str(arguments.out.resolve().parent / "autoscheme-scores"))
    arguments.report.write_text(json.dumps(convert(arguments)))
