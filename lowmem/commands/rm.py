"""`lowmem rm NAME…`: remove converted checkpoints and unfinished conversions from lowmem's cache."""

from __future__ import annotations

import argparse
import sys

from lowmem.errors import InvalidRequestError

DECLINED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem rm`."""
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="a name from `lowmem list`; its beginning is enough"
    )
    parser.add_argument("-y", "--yes", action="store_true", help="remove without asking")


def run(args: argparse.Namespace) -> int:
    """Remove the named entries, or none if a name is unknown. Returns 1 if the user declines."""
    from lowmem.checkpoint.cache import find, remove
    from lowmem.text.units import format_bytes

    chosen = {entry.name: entry for entry in map(find, args.names)}
    if not args.yes:
        if not sys.stdin.isatty():
            raise InvalidRequestError(
                "standard input is not a terminal", "Give --yes to remove without asking"
            )
        for entry in chosen.values():
            print(f"{entry.name}: {format_bytes(entry.nbytes)}, {entry.state}")
        try:
            answer = input("Remove? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            return DECLINED
    for name in chosen:
        print(f"removed {name}: {format_bytes(remove(name))}")
    return 0
