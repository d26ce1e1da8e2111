"""AutoRound's part of `lowmem.benchmarks.experiments.peers.command`, run by an interpreter that has it: one conversion, its defaults.

It imports nothing of lowmem, whose dependencies need not be there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
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


def convert(source: str, tokens: Path, out: Path, bits: int, group_size: int, iters: int) -> dict[str, Any]:
    """Convert the model at `source` to GPTQ's format; the recipe as AutoRound resolved it.

    tokens: JSON, rows of token ids, all of one length. out: the folder to write. Symmetric, on the CPU.
    """
    import torch
    from auto_round import AutoRound  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    rows = torch.tensor(json.loads(tokens.read_bytes()))
    tuner = AutoRound(
        source,
        AutoTokenizer.from_pretrained(source, local_files_only=True),
        bits=bits,
        group_size=group_size,
        sym=True,
        iters=iters,
        dataset=list(rows.split(BATCH)),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=BATCH,
        device_map="cpu",
    )
    started = time.perf_counter()
    tuner.quantize_and_save(output_dir=str(out), format="auto_gptq", inplace=True)
    config = tuner.quantize_config
    return {
        "folder": str(_folder(out)),
        "seconds": round(time.perf_counter() - started, 1),
        "settings": {name: getattr(config, name) for name in SETTINGS if hasattr(config, name)}
        | {"rows": list(rows.shape), "batch_size": BATCH, "dtype": str(tuner.model_context.amp_dtype)},
        "versions": {"auto-round": version("auto-round"), "AutoRound's torch": version("torch")},
    }


def _folder(out: Path) -> Path:
    """Where it wrote: `out`, or the one folder in it."""
    return next(path.parent for path in sorted(out.rglob("config.json")))


def main(argv: Sequence[str] | None = None) -> int:
    """One conversion; its report as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--iters", type=int, required=True)
    args = parser.parse_args(argv)
    report = convert(args.source, args.tokens, args.out, args.bits, args.group_size, args.iters)
    args.report.write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
