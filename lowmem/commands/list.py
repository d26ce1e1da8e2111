"""`lowmem list`: list the converted checkpoints in lowmem's cache."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from lowmem.text.standard import print_json

if TYPE_CHECKING:
    from lowmem.checkpoint.cache import Entry

_HEADINGS = ("NAME", "SOURCE", "BITS", "SIZE", "LAST USED", "STATE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem list`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the table, or how to fill the cache. Returns 0."""
    from lowmem.checkpoint.cache import cache_root, entries

    found = entries()
    if args.json:
        print_json({"cache": str(cache_root()), "entries": [_record(entry) for entry in found]})
    elif found:
        rows = [_HEADINGS, *(_row(entry) for entry in found)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
        for row in rows:
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    else:
        print(
            f"the cache is empty: lowmem convert MODEL writes into {cache_root()}",
            file=sys.stderr,
        )
    return 0


def _row(entry: Entry) -> tuple[str, ...]:
    from lowmem.text.units import format_bytes

    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    bits = f"{entry.bits:.1f}" if entry.mixed else f"{entry.bits:g}"
    bits = (bits if entry.bits else "?") + ", mixed" * entry.mixed
    return entry.name, entry.source, bits, format_bytes(entry.nbytes), when, entry.state


def _record(entry: Entry) -> dict[str, object]:
    return {**vars(entry), "path": str(entry.path), "state": entry.state}
