"""`lowmem verify DIR`: check every file and tensor of a checkpoint."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from lowmem.errors import printable
from lowmem.text.standard import print_json

if TYPE_CHECKING:
    from lowmem.checkpoint.verify.converted import VerifyReport

DAMAGED = 2
_NOTES_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem verify`."""
    parser.add_argument("folder", metavar="DIR", help="a checkpoint folder, or a .gguf file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check the folder. Returns 0, or 2 after a line for each problem. Raises VerifyError if it is not a
    checkpoint."""
    from lowmem.checkpoint.verify.converted import verify

    show = sys.stderr.isatty() and not args.json
    report = verify(args.folder, _show_progress if show else None)
    if show:
        print("\r\x1b[K", end="", file=sys.stderr)
    if args.json:
        print_json(_record(report))
    else:
        for problem in report.problems:
            print(problem)
        for note in report.notes[:_NOTES_SHOWN]:
            print(f"note: {printable(note)}", file=sys.stderr)
        if len(report.notes) > _NOTES_SHOWN:
            print(f"note: … and {len(report.notes) - _NOTES_SHOWN} more (see --json)", file=sys.stderr)
        print(summary(report))
    return 0 if report.ok else DAMAGED


def summary(report: VerifyReport) -> str:
    """One line: the result, and how much was checked."""
    count = len(report.problems)
    verdict = "ok" if report.ok else f"{count} problem{'s' * (count != 1)}"
    format = report.format
    packed = f", {report.linears} linears of {format.widths} bits" if format else ""
    if format and format.uniform:
        packed += f" (g{format.default.group_size})"
    return f"{verdict}: {report.files} files, {report.bytes:,} bytes, {report.tensors} tensors{packed}"


def _record(report: VerifyReport) -> dict[str, object]:
    format = report.format if report.format and report.format.uniform else None
    return {
        "ok": report.ok,
        "folder": str(report.folder),
        "manifest": report.ours,
        "label": report.format.label if report.format else None,
        "bits": format.default.bits if format else None,
        "group_size": format.default.group_size if format else None,
        "files": report.files,
        "tensors": report.tensors,
        "linears": report.linears,
        "bytes": report.bytes,
        "problems": [vars(problem) for problem in report.problems],
        "notes": list(report.notes),
    }


def _show_progress(done: int, total: int) -> None:
    percent = 100 * done // max(total, 1)
    print(f"\r{percent:3d} %", end="", file=sys.stderr, flush=True)
