"""`lowmem demo`: the whole job on the embedded model, which is real and trained, in a few minutes.

Convert to 8 and 4 bits, say what each needs, answer a prompt with each, and measure size, quality and
speed against bf16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem.benchmarks.quality.in_memory import Comparison, Quality

PROMPT = "Write a Python function get_name. Return the name of this object."
BITS = (8, 4)


@dataclass(frozen=True)
class Row:
    """One line of the demo's table; sizes in bytes."""

    name: str
    weights: int
    kv_cache: int
    quality: Quality
    tokens_per_second: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem demo`."""
    parser.add_argument("--keep", metavar="DIR", help="keep the converted checkpoints in this folder")
    parser.add_argument("--rows", type=int, default=128, metavar="N", help="calibration rows (%(default)s)")
    parser.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="of each answer (%(default)s)"
    )


def embedded_model() -> Path:
    """The folder of tiny-starchat inside the installed package."""
    from importlib.resources import files

    return Path(str(files("lowmem") / "data" / "tiny-starchat"))


def run(args: argparse.Namespace) -> int:
    """Run the demo; exit code 0."""
    from lowmem.errors import OutputError

    if args.keep is None:
        with tempfile.TemporaryDirectory(prefix="lowmem-demo-") as folder:
            _demo(Path(folder), args.rows, args.new_tokens)
        return 0
    keep = Path(args.keep).expanduser().absolute()
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{keep} cannot be made: {error.strerror}", "Choose another folder") from error
    _demo(keep, args.rows, args.new_tokens)
    print(f"The checkpoints are in {keep}: lowmem run {keep / '4bit'}")
    return 0


def _demo(folder: Path, rows: int, new_tokens: int) -> None:
    from lowmem.benchmarks.quality.in_memory import Comparison, log_probabilities, text_rows
    from lowmem.convert.calibration import CalibrationSpec
    from lowmem.convert.pipeline import convert
    from lowmem.convert.progress import make_reporter

    from lowmem.config import QuantConfig
    from lowmem.loading.loader import load

    source = embedded_model()
    candidates = [("bf16 source", source)]
    for bits in BITS:
        _say(f"Converting {source.name} to {bits} bits")
        out = folder / f"{bits}bit"
        if not out.exists():
            convert(
                source,
                out,
                QuantConfig(bits=bits),
                calibration=CalibrationSpec(rows=rows),
                reporter=make_reporter(quiet=False, as_json=False),
            )
        candidates.append((f"GPTQ {bits}-bit g128", out))
    _say("Loading the reference, in float32")
    import torch

    reference = load(source, dtype=torch.float32)
    text = (source / "heldout.txt").read_text(encoding="utf-8")
    tokens = text_rows(reference.tokenizer, text)
    comparison = Comparison(log_probabilities(reference.model, tokens), tokens)
    del reference
    table = [_measure(name, path, comparison, new_tokens) for name, path in candidates]
    _print_table(table, int(tokens.numel()))


def _measure(name: str, path: Path, comparison: Comparison, new_tokens: int) -> Row:
    """Answer the prompt, and compare: in bf16 as a user runs it, so the arithmetic's noise is in it."""
    import torch
    from lowmem.benchmarks.quality.in_memory import log_probabilities

    from lowmem.config import SamplingParams
    from lowmem.loading.loader import load
    from lowmem.plan.request import ModelRequest, plan_for
    from lowmem.session import Session

    need = plan_for(ModelRequest(str(path), device="cpu", method=None if name.startswith("GPTQ") else "dense"))
    loaded = load(path)
    weights, kv_cache = need.chosen.need.weights, need.chosen.need.kv_cache
    _say(f"{name} answers {PROMPT!r}")
    params = SamplingParams(max_new_tokens=new_tokens, temperature=0)
    session = Session(loaded)
    session.complete(PROMPT, SamplingParams(max_new_tokens=2, temperature=0))  # warm-up
    answer = session.complete(PROMPT, params)
    print(answer.text.strip(), flush=True)
    del loaded, session
    exact = load(path, dtype=torch.float32)
    quality = comparison.measure(log_probabilities(exact.model, comparison.rows))
    return Row(name, weights, kv_cache, quality, answer.tokens_per_second)


def _say(text: str) -> None:
    print(f"\n# {text}", file=sys.stderr, flush=True)


def _print_table(table: list[Row], tokens: int) -> None:
    from rich.console import Console
    from rich.table import Table

    view: Any = Table(title=f"tiny-starchat against bf16, over {tokens:,} tokens of held-out code")
    view.add_column("checkpoint")
    for column in (
        "weights MiB",
        "KV cache MiB",
        "of bf16",
        "KL divergence",
        "same top-1",
        "perplexity",
        "tokens/s",
    ):
        view.add_column(column, justify="right")
    first = table[0]
    for row in table:
        view.add_row(
            row.name,
            f"{row.weights / (1 << 20):.2f}",
            f"{row.kv_cache / (1 << 20):.2f}",
            f"{row.weights / first.weights:.0%}",
            f"{row.quality.kld:.6f}",
            f"{row.quality.same_top1:.2%}",
            f"{row.quality.ppl:.3f}",
            f"{row.tokens_per_second:.1f}",
        )
    console = Console()
    # A pipe has no width of its own; the table must not be folded to 80 columns there.
    Console(width=None if console.is_terminal else 120).print(view)
    print(
        "KL divergence and perplexity are computed in float32, so they show the quantization alone. "
        "The linears run in plain torch so far: packed kernels are to come, and tokens/s with them."
    )
