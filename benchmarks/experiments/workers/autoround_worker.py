"""One conversion by AutoRound, with its defaults. Run by path, in an interpreter that has AutoRound.

lowmem is not imported: it need not be installed there.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

BATCH = 8
"""AutoRound's own batch size, for calibration and for tuning."""
SETTINGS = (
    "iters", "lr", "minmax_lr", "momentum", "nblocks", "gradient_accumulate_steps", "enable_minmax_tuning",
    "enable_norm_bias_tuning", "enable_quanted_input", "enable_alg_ext", "enable_adam", "enable_lfq",
    "not_use_best_mse", "bits", "group_size", "sym",
)  # fmt: skip


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Convert a model to the GPTQ format, symmetric, on the CPU; the recipe as AutoRound resolved it."""
    import torch
    from auto_round import AutoRound  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    rows = torch.tensor(json.loads(args.tokens.read_bytes()))
    tuner = AutoRound(
        args.source,
        AutoTokenizer.from_pretrained(args.source, local_files_only=True),
        bits=args.bits,
        group_size=args.group_size,
        sym=True,
        iters=args.iters,
        dataset=list(rows.split(BATCH)),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=BATCH,
        device_map="cpu",
    )
    tuner.quantize_and_save(output_dir=str(args.out), format="auto_gptq", inplace=True)
    config = tuner.quantize_config
    return {
        "settings": {name: getattr(config, name) for name in SETTINGS if hasattr(config, name)}
        | {"rows": list(rows.shape), "batch_size": BATCH, "dtype": str(tuner.model_context.amp_dtype)},
        "versions": {"auto-round": version("auto-round"), "AutoRound's torch": version("torch")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a model with AutoRound.")
    parser.add_argument("source")
    parser.add_argument("--tokens", type=Path, required=True, help="JSON: rows of token ids, all of a length")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True, help="the JSON file to write the recipe to")
    for option in ("--bits", "--group-size", "--iters"):
        parser.add_argument(option, type=int, required=True)
    arguments = parser.parse_args()
    arguments.report.write_text(json.dumps(convert(arguments)))
