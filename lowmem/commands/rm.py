"""`lowmem rm NAME…`: remove converted checkpoints, and unfinished conversions, from lowmem's cache."""

from __future__ import annotations

import argparse
import sys

from lowmem.errors import InvalidRequestError

DECLINED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem rm`."""
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="as `lowmem list` shows it; its beginning is enough"
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    """Remove what the names mean, all of them or, if one means nothing, none; 1 when the user says no."""
    from lowmem.checkpoint.cache import find, remove
    from lowmem.text.units import format_bytes

    chosen = {entry.name: entry for entry in map(find, args.names)}
    if not args.yes:
        if not sys.stdin.isatty():
            raise InvalidRequestError("nobody can be asked here", "Give --yes to remove without asking")
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
