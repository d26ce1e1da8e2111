"""`lowmem bench quality`: every form of a model against the unquantized one, as a table and a record."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.benchmarks.common.lineup import add_lineup_arguments, line_up
from lowmem.benchmarks.common.record_file import FOLDER, to_json

from lowmem.commands.answering import note

if TYPE_CHECKING:
    from lowmem.benchmarks.common.records import QualityRecord, SubjectQuality, TextQuality
    from lowmem.benchmarks.quality.measure import Listener

TEXTS = "code,prose,dialogues"
DESCRIPTION = """Measured on held-out texts, at every token: KL divergence from the unquantized model, share
of tokens that both put first, perplexity, and how long the greedy answer stays the same. The unquantized
model is computed one decoder layer at a time, so one of 16 billion parameters takes a few GiB; so are its
forms. What is kept of it (in lowmem's cache, under quality/) is the input of the head at every token, from
which the logits are computed again: nothing is lost, and StarChat Alpha's 24 rows of 512 tokens take 288 MiB
a text where its logits would take 2.25 GiB. An interrupted measurement goes on where it was when the same is
typed again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem bench quality`."""
    parser.description = DESCRIPTION
    add_lineup_arguments(parser)
    what = parser.add_argument_group("what it is measured on")
    what.add_argument(
        "--texts",
        default=None,
        metavar="LIST",
        help="built-in texts, parted by commas: code, prose, dialogues, humaneval "
        "(the first three; none with --text)",
    )
    what.add_argument(
        "--text", action="append", default=[], metavar="FILE", help="a text file of yours; may be repeated"
    )
    what.add_argument("--rows", type=int, default=24, metavar="N", help="rows of each text (%(default)s)")
    what.add_argument(
        "--row-length", type=int, default=512, metavar="N", help="tokens of a row (%(default)s)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="arithmetic of quantized forms (float32, so that the quantization alone is measured; with "
        "--through-kernels what lowmem run would choose)",
    )
    how.add_argument(
        "--reference-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="arithmetic of the unquantized model (%(default)s)",
    )
    how.add_argument(
        "--through-kernels",
        action="store_true",
        help="load each form whole, as lowmem run does, and measure the kernels that answer",
    )
    how.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (%(default)s)")
    how.add_argument("--no-greedy", action="store_true", help="leave the greedy answers out")
    how.add_argument(
        "--no-cache", action="store_true", help="keep nothing of the reference in lowmem's cache"
    )
    how.add_argument(
        "--no-record",
        action="store_true",
        help="leave converted folders as they are; else the plan ranks them by their measured divergence",
    )
    how.add_argument("--force", action="store_true", help="measure again what an earlier run has measured")
    parser.add_argument(
        "--out", default=FOLDER, metavar="DIR", help="where quality.json is written (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the record instead of the table")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")


def run(args: argparse.Namespace) -> int:
    """Measure, and show or print the record; exit code 0."""
    from lowmem.benchmarks.quality.measure import Settings, measure

    from lowmem.plan.request import find_card

    card = find_card(args.device)
    lineup = line_up(args.models, reference=args.reference, forms=args.forms, cuda=card is not None)
    names = args.texts if args.texts is not None else ("" if args.text else TEXTS)
    settings = Settings(
        texts=tuple(name.strip() for name in names.split(",") if name.strip()),
        files=tuple(args.text),
        rows=args.rows,
        row_length=args.row_length,
        dtype=args.dtype or (None if args.through_kernels else "float32"),
        reference_dtype=args.reference_dtype,
        device=str(card or "cpu"),
        kernels=args.through_kernels,
        greedy=not args.no_greedy,
        record=not args.no_record,
        cache=not args.no_cache,
        force=args.force,
    )
    out = Path(args.out).expanduser()
    listener = _listener(args.quiet)
    try:
        record = measure(lineup, settings, out, sys.argv[1:], listener)
    finally:
        listener.close()
    if args.json:
        print(json.dumps(to_json(record), indent=1))
    else:
        show(record)
        print(f"written to {out / 'quality.json'}; a page of it: lowmem bench report")
    return 0


def show(record: QualityRecord) -> None:
    """The record as a table a text, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 170)
    # At a narrow terminal, what says most; the record holds the rest.
    shown = [i for i, name in enumerate(COLUMNS) if console.width >= 160 or name in NARROW]
    for name in dict.fromkeys(text.text for subject in record.subjects for text in subject.texts):
        pairs = [(s, t) for s in record.subjects for t in s.texts if t.text == name]
        first = pairs[0][1]
        table = Table(
            title=f"{name}: {first.tokens:,} tokens, perplexity of the reference "
            f"({record.reference_dtype}) {first.reference_ppl:.3f}",
            title_justify="left",
        )
        for column in (COLUMNS[i] for i in shown):
            table.add_column(column, justify="left" if column == "form" else "right")
        for subject, text in sorted(pairs, key=lambda pair: pair[1].kld.mean):
            line = cells(subject, text)
            table.add_row(*(line[i] for i in shown), style="dim" if subject.noise_floor else "")
        console.print(table)
    console.print("noise floor: the unquantized model in bfloat16, what rounding alone does")


COLUMNS = (
    "form", "bits", "size", "ppl", "ratio ± se", "KL mean ± se", "median", "p99", "max", "same top-1",
    "rms Δp", "greedy",
)  # fmt: skip
NARROW = ("form", "bits", "size", "ratio ± se", "KL mean ± se", "p99", "same top-1", "greedy")


def cells(subject: SubjectQuality, text: TextQuality) -> tuple[str, ...]:
    """One line of the table: see COLUMNS."""
    from lowmem.text.units import format_bytes

    kld, greedy = text.kld, subject.greedy
    equal = "" if greedy is None else f"{sum(greedy.equal_tokens)}/{sum(greedy.answer_tokens)}"
    return (
        subject.subject.label + (" (noise floor)" if subject.noise_floor else ""),
        f"{subject.subject.bits_per_weight:.2f}",
        format_bytes(subject.subject.weight_bytes),
        f"{text.ppl:.3f}",
        f"{text.ppl_ratio:.4f} ± {text.ppl_ratio_standard_error:.4f}",
        f"{kld.mean:.6f} ± {kld.standard_error:.6f}",
        f"{kld.median:.6f}",
        f"{kld.p99:.4f}",
        f"{kld.max:.3f}",
        f"{text.same_top1:.4f}",
        f"{text.rms_dp:.4f}",
        equal,
    )


def _listener(quiet: bool) -> Listener:
    """A bar at a terminal, lines elsewhere, nothing with --quiet."""
    from lowmem.benchmarks.quality.measure import Listener

    if quiet:
        return Listener()
    return _bar() if sys.stderr.isatty() else _lines()


def _lines() -> Listener:
    from lowmem.benchmarks.quality.measure import Listener

    class Lines(Listener):
        """A line for each thing that begins."""

        def note(self, line: str) -> None:
            note(line)

        def begins(self, what: str) -> None:
            note(f"measuring {what}")

    return Lines()


def _bar() -> Listener:
    from lowmem.benchmarks.quality.measure import Listener
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("layers"),
        TimeElapsedColumn(),
    )  # fmt: skip
    progress = Progress(*columns, console=Console(stderr=True), transient=True)

    class Bar(Listener):
        """One bar: the layers of the form that is being measured."""

        def __init__(self) -> None:
            self.task = progress.add_task("", total=None)
            progress.start()

        def note(self, line: str) -> None:
            progress.console.print(line, style="dim", markup=False, highlight=False)

        def begins(self, what: str) -> None:
            progress.reset(self.task, description=what, total=None)

        def layers(self, done: int, count: int) -> None:
            progress.update(self.task, completed=done, total=count)

        def close(self) -> None:
            progress.stop()

    return Bar()
