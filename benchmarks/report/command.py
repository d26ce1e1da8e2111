"""`lowmem bench report`: the records in a folder as a Markdown and an HTML page."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from lowmem.benchmarks.common.record_file import FOLDER, write_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem bench report`."""
    parser.add_argument(
        "folder",
        nargs="?",
        default=FOLDER,
        metavar="DIR",
        help="folder with the records (default: %(default)s)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder for the pages (default: the folder of the records)"
    )
    parser.add_argument("--json", action="store_true", help="print file names and the summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing")


def run(args: argparse.Namespace) -> int:
    """Write `report.md` and `report.html`; exit code 0.

    Raises SourceError if the folder has no records, OutputError if a page cannot be written.
    """
    from lowmem.benchmarks.report.build import make_report
    from lowmem.benchmarks.report.inputs import read_records
    from lowmem.benchmarks.report.markdown import to_markdown
    from lowmem.benchmarks.report.page import to_html

    folder = Path(args.folder)
    report = make_report(read_records(folder), command_of(args))
    out = Path(args.out) if args.out else folder
    files = {out / "report.md": to_markdown(report), out / "report.html": to_html(report)}
    for file, text in files.items():
        write_file(file, text.encode())
    if args.json:
        summary = {"files": [str(file) for file in files], "title": report.title, "story": list(report.story)}
        print(json.dumps(summary))
    elif not args.quiet:
        for sentence in report.story:
            print(sentence)
        print(f"wrote {', '.join(map(str, files))}", file=sys.stderr)
    return 0


def command_of(args: argparse.Namespace) -> str:
    """Return the command line that produces the pages again."""
    words = ["lowmem", "bench", "report"]
    words += [args.folder] if args.folder != FOLDER else []
    words += ["--out", args.out] if args.out else []
    return shlex.join(words)
