"""`lowmem bench quality`: every version of a model against the unquantized one."""

from __future__ import annotations

import argparse
import sys

from lowmem.benchmarks.common.lineup import add_lineup_arguments, line_up, lineup_of
from lowmem.benchmarks.common.output import add_output_arguments, output_of, print_json
from lowmem.benchmarks.common.record_file import FILES
from lowmem.benchmarks.common.records import QualityRecord

from lowmem.cards.find import DEVICES

TEXTS = "code,prose,dialogues"
DESCRIPTION = """Measures on held-out texts, for every token: KL divergence from the unquantized model, share
of tokens with the same most likely token, perplexity, and how long greedy answers stay equal. Models are
computed one decoder layer at a time, so one of 16 billion parameters takes a few GiB. The input of the
unquantized model's head is kept in lowmem's cache (quality/), and the exact logits are computed from it
again: for StarChat Alpha, 24 rows of 512 tokens take 288 MiB. The same command resumes an interrupted
measurement."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem bench quality`."""
    parser.description = DESCRIPTION
    add_lineup_arguments(parser)
    what = parser.add_argument_group("texts")
    what.add_argument(
        "--texts",
        metavar="LIST",
        help="built-in texts, separated by commas: code, prose, dialogues, humaneval "
        "(default: the first three; none with --text)",
    )
    what.add_argument(
        "--text", action="append", default=[], metavar="FILE", help="a text file of yours; may be repeated"
    )
    what.add_argument(
        "--rows", type=int, default=24, metavar="N", help="rows of each text (default: %(default)s)"
    )
    what.add_argument(
        "--row-length", type=int, default=512, metavar="N", help="tokens of a row (default: %(default)s)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="arithmetic of quantized versions (default: float32, which measures the quantization alone; "
        "with --through-kernels, the one that lowmem run would choose)",
    )
    how.add_argument(
        "--reference-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="arithmetic of the unquantized model (default: %(default)s)",
    )
    how.add_argument(
        "--through-kernels",
        action="store_true",
        help="load each version as lowmem run does, and measure with the kernels that answer",
    )
    how.add_argument("--device", default="cpu", help=f"{DEVICES} (default: %(default)s)")
    how.add_argument("--no-greedy", action="store_true", help="do not measure greedy answers")
    how.add_argument(
        "--no-cache", action="store_true", help="do not cache the reference model's hidden states"
    )
    how.add_argument(
        "--no-record",
        action="store_true",
        help="do not write the divergence into converted folders, where lowmem plan finds it",
    )
    add_output_arguments(parser, QualityRecord)


def run(args: argparse.Namespace) -> int:
    """Measure, write `quality.json` and print it; exit code 0."""
    from lowmem.benchmarks.common.progress import make_progress
    from lowmem.benchmarks.quality.measure import Settings, measure
    from lowmem.benchmarks.report.quality_sections import quality_tables
    from lowmem.benchmarks.report.terminal import print_tables

    from lowmem.plan.request import find_card

    card = find_card(args.device)
    lineup = line_up(lineup_of(args, cuda=card is not None))
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
    )
    output = output_of(args)
    progress = make_progress(output.quiet)
    try:
        record = measure(lineup, settings, output, sys.argv[1:], progress)
    finally:
        progress.close()
    if output.json:
        print_json(record)
    else:
        floors = [s.subject.label for s in record.subjects if s.noise_floor]
        print_tables(
            quality_tables(record),
            [
                f"{', '.join(floors)}: the noise floor, the effect of rounding in the arithmetic alone",
                f"wrote {output.folder / FILES[QualityRecord]}; make a page of it with: lowmem bench report",
            ],
        )
    return 0
