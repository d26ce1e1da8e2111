"""`lowmem bench report`: a Markdown and an HTML page of the records in a folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from pathlib import Path

from lowmem.benchmarks.common.records import FOLDER

from lowmem.errors import OutputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem bench report`."""
    parser.add_argument(
        "folder", nargs="?", default=FOLDER, metavar="DIR", help="of the records (%(default)s)"
    )
    parser.add_argument("--out", metavar="DIR", help="where the pages go (where the records are)")
    parser.add_argument("--json", action="store_true", help="print the files' names and the summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="say nothing")


def run(args: argparse.Namespace) -> int:
    """Write `report.md` and `report.html`; 0. SourceError without records, OutputError without room."""
    from lowmem.benchmarks.report.markdown import to_markdown
    from lowmem.benchmarks.report.page import to_html
    from lowmem.benchmarks.report.report import make_report, read_records

    folder = Path(args.folder)
    records = read_records(folder)
    report = make_report(records, command_of(args))
    out = Path(args.out) if args.out else folder
    files = {out / "report.md": to_markdown(report), out / "report.html": to_html(report)}
    for file, text in files.items():
        write_whole(file, text)
    if args.json:
        told = {"files": [str(file) for file in files], "title": report.title, "story": list(report.story)}
        print(json.dumps(told))
    elif not args.quiet:
        for sentence in report.story:
            print(sentence)
        print(f"written: {', '.join(map(str, files))}", file=sys.stderr)
    return 0


def command_of(args: argparse.Namespace) -> str:
    """What makes the pages again."""
    words = ["lowmem", "bench", "report"]
    words += [args.folder] if args.folder != FOLDER else []
    words += ["--out", args.out] if args.out else []
    return shlex.join(words)


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all. OutputError where that fails."""
    part = file.with_name(file.name + ".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {file}: {reason}", "Name another folder with --out") from error
