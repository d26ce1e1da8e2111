"""`lowmem doctor`: check what works on this machine."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from lowmem.text.standard import print_json

if TYPE_CHECKING:
    from lowmem.doctor.report import Check

SICK = 1
_COLOURS = {"ok": "green", "warning": "yellow", "missing": "red", "skipped": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem doctor`."""
    parser.add_argument(
        "--quick", action="store_true", help="skip checks that run computations or measurements"
    )
    parser.add_argument("--refresh", action="store_true", help="measure the memory bandwidth again")
    parser.add_argument(
        "--online", action="store_true", help="also check that the Hugging Face hub can be reached"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print a line per check. Returns 0, or 1 when a requirement is missing.

    A warning, such as a slow kernel or a missing compiler, does not count: models run.
    """
    from lowmem.doctor.examination import examine
    from lowmem.doctor.machine import look
    from lowmem.doctor.report import passed

    found: list[Check] = []
    table = sys.stdout.isatty() and not args.json
    for check in examine(look(), quick=args.quick, refresh=args.refresh, online=args.online):
        found.append(check)
        if table:
            print(f"\r\x1b[K{check.area}: {check.name}", end="", file=sys.stderr, flush=True)
        elif not args.json:
            print(check, flush=True)
    if table:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        _print_table(found)
    if args.json:
        print_json({"ok": passed(found), "checks": [vars(check) for check in found]})
    else:
        print(verdict(found))
    return 0 if passed(found) else SICK


def verdict(checks: list[Check]) -> str:
    """The last line: how many checks, and the result."""
    missing = sum(check.status == "missing" for check in checks)
    warnings = sum(check.status == "warning" for check in checks)
    skipped = sum(check.status == "skipped" for check in checks)
    counted = f"{len(checks) - skipped} checks, {warnings} warning{'s' * (warnings != 1)}"
    if skipped:
        counted += f", {skipped} not tried"
    if missing:
        return f"{counted}, {missing} requirement{'s' * (missing != 1)} missing"
    return f"{counted}: all requirements are met"


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for heading in ("", "", "result", "advice"):
        table.add_column(heading, overflow="fold")
    area = ""
    for check in checks:
        if check.area != area:
            table.add_row("", Text(check.area, style="bold"))
            area = check.area
        # As Text: messages of drivers and errors are not markup.
        table.add_row(
            Text(check.status, style=_COLOURS[check.status]),
            Text(check.name),
            Text(check.detail),
            Text(check.advice),
        )
    Console().print(table)
