"""`lowmem demo`: convert the embedded model, run it and measure it, in a few minutes.

The model is real and trained. It is converted to 8 and 4 bits; each version answers a prompt, and is compared
with the unquantized model in size, quality and speed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.config import EFFORTS, QuantConfig

if TYPE_CHECKING:
    from lowmem.benchmarks.common.records import TextQuality
    from lowmem.benchmarks.report.document import Table

PROMPT = "Write a Python function get_name. Return the name of this object."
BITS = (8, 4)
_MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """One version as it answered."""

    label: str
    weight_bytes: int
    kv_cache_bytes: int
    tokens_per_second: float
    kernel: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem demo`."""
    parser.add_argument("--keep", metavar="DIR", help="keep the converted checkpoints in this folder")
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="calibration rows (default: as many as the effort takes)",
    )
    parser.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="tokens of each answer (default: %(default)s)"
    )
    parser.add_argument(
        "--effort",
        choices=tuple(EFFORTS),
        default="default",
        help="tuning steps of each layer at 4 bits, and calibration rows: "
        + ", ".join(f"{name} {effort.tune_steps} and {effort.rows}" for name, effort in EFFORTS.items())
        + " (default: %(default)s)",
    )
    parser.add_argument(
        "--text-rows",
        type=int,
        default=24,
        metavar="N",
        help="rows of 512 tokens of held-out code that quality is measured on (default: %(default)s)",
    )


def embedded_model() -> Path:
    """The folder of tiny-starchat in the installed package."""
    from importlib.resources import files

    return Path(str(files("lowmem") / "data" / "tiny-starchat"))


def run(args: argparse.Namespace) -> int:
    """Run the demo; exit code 0. Raises InvalidRequestError for a number below 1."""
    from lowmem.checkpoint.files.home import typed_path
    from lowmem.errors import InvalidRequestError, OutputError

    for option in ("rows", "new_tokens", "text_rows"):
        if (value := getattr(args, option)) is not None and value < 1:
            name = option.replace("_", "-")
            raise InvalidRequestError(f"--{name} must be at least 1", f"Leave out --{name} for its default")
    if args.keep is None:
        with tempfile.TemporaryDirectory(prefix="lowmem-demo-") as folder:
            _demo(Path(folder), args)
        return 0
    keep = typed_path(args.keep).absolute()
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{keep} cannot be created: {error.strerror}", "Choose another folder") from error
    _demo(keep, args)
    print(f"The checkpoints are in {keep}. Chat with one: lowmem run {keep / '4bit'}")
    return 0


def _demo(folder: Path, args: argparse.Namespace) -> None:
    from lowmem.benchmarks.report.terminal import print_tables

    source = embedded_model()
    effort = EFFORTS[args.effort]
    rows = effort.rows if args.rows is None else args.rows
    configs = [QuantConfig(bits=bits, tune_steps=effort.steps(bits)) for bits in BITS]
    folders = [_converted(source, folder / f"{config.bits}bit", config, rows) for config in configs]
    versions = [(source, "dense"), *((path, "gptq") for path in folders)]
    runs = [_answer(path, method, args.new_tokens) for path, method in versions]
    _say("Comparing next-token distributions on held-out code")
    found = _quality(source, tuple(map(str, folders)), args.text_rows)
    cells = tuple(_cells(run, runs[0], found[run.label]) for run in runs)
    tokens = next(iter(found.values())).tokens
    print_tables([_table(cells, tokens)], NOTES)


def _converted(source: Path, out: Path, config: QuantConfig, rows: int) -> Path:
    from lowmem.convert.calibration import CalibrationSpec
    from lowmem.convert.pipeline import convert
    from lowmem.convert.progress import make_reporter

    _say(f"Converting {source.name} to {config.bits} bits")
    if not out.exists():
        reporter = make_reporter(quiet=False, as_json=False)
        convert(source, out, config, calibration=CalibrationSpec(rows=rows), reporter=reporter)
    return out


def _answer(path: Path, method: str, new_tokens: int) -> Run:
    """Answer the prompt with one version, as `lowmem run` would."""
    from lowmem.config import SamplingParams
    from lowmem.loading.opening import load_option
    from lowmem.plan.request import ModelRequest, plan_for
    from lowmem.session import Session

    request = ModelRequest(str(path), device="cpu", method=method)
    plan = plan_for(request)
    loaded = load_option(plan.chosen, plan, request)
    _say(f"{loaded.label} answers {PROMPT!r}")
    session = Session(loaded)
    session.complete(PROMPT, SamplingParams(max_new_tokens=2, temperature=0))  # warm-up
    session.engine.repacking.finish()
    answer = session.complete(PROMPT, SamplingParams(max_new_tokens=new_tokens, temperature=0))
    print(answer.text.strip(), flush=True)
    need = plan.chosen.need
    return Run(loaded.label, need.weights, need.kv_cache, answer.tokens_per_second, loaded.kernel)


def _quality(source: Path, folders: tuple[str, ...], rows: int) -> dict[str, TextQuality]:
    """Label → quality on held-out code, of the converted folders and of the source in bfloat16."""
    from lowmem.benchmarks.common.lineup import LineupRequest, line_up
    from lowmem.benchmarks.common.output import Output
    from lowmem.benchmarks.common.progress import make_progress
    from lowmem.benchmarks.quality.measure import Settings, measure

    lineup = line_up(LineupRequest(folders, reference=str(source)))
    settings = Settings(("code",), rows=rows, greedy=False, record=False, cache=False)
    progress = make_progress(quiet=False)
    try:
        with tempfile.TemporaryDirectory(prefix="lowmem-demo-") as records:
            record = measure(lineup, settings, Output(Path(records)), sys.argv[1:], progress)
    finally:
        progress.close()
    return {subject.subject.label: subject.texts[0] for subject in record.subjects}


def _say(text: str) -> None:
    print(f"\n# {text}", file=sys.stderr, flush=True)


NOTES = (
    "KL divergence and perplexity of 8 and 4 bits are computed in float32, so they show quantization alone. "
    "Those of bfloat16 show the rounding of its arithmetic.",
    "Decode reads all weights for every token, so fewer bits are faster; on a model as small as this, other "
    "work takes most of the time.",
)


def _cells(run: Run, dense: Run, quality: TextQuality) -> tuple[str, ...]:
    return (
        run.label,
        f"{run.weight_bytes / _MIB:.2f}",
        f"{run.kv_cache_bytes / _MIB:.2f}",
        f"{run.weight_bytes / dense.weight_bytes:.0%}",
        f"{quality.kld.mean:.6f}",
        f"{quality.same_top1:.2%}",
        f"{quality.ppl:.3f}",
        f"{run.tokens_per_second:.1f}",
        run.kernel,
    )


def _table(cells: tuple[tuple[str, ...], ...], tokens: int) -> Table:
    from lowmem.benchmarks.report.document import Column, Table

    names = ("weights MiB", "KV cache MiB", "of bfloat16", "KL divergence", "same top token", "perplexity")
    columns = (
        Column("version", number=False),
        *map(Column, (*names, "tokens/s")),
        Column("kernel", number=False),
    )
    return Table(f"tiny-starchat on {tokens:,} tokens of held-out code", columns, cells)
