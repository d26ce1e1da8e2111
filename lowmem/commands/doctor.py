"""`lowmem doctor`: what works on this machine. Exit code 0 when all that is needed works, else 1."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowmem.doctor.report import Check

SICK = 1
_COLOURS = {"ok": "green", "warning": "yellow", "missing": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem doctor`."""
    parser.add_argument("--quick", action="store_true", help="only look; compute and measure nothing")
    parser.add_argument("--refresh", action="store_true", help="measure the memory's bandwidth anew")
    parser.add_argument("--online", action="store_true", help="also ask whether the Hugging Face hub answers")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Examine the machine and print a line for each finding; 0, or 1 when something needed does not work.

    A warning (no compiler, a slow kernel, a decode that stays eager) is not a failure: models run.
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
        print(
            json.dumps({"ok": passed(found), "checks": [vars(check) for check in found]}, ensure_ascii=False)
        )
    else:
        print(verdict(found))
    return 0 if passed(found) else SICK


def verdict(checks: list[Check]) -> str:
    """The last line."""
    missing = sum(check.status == "missing" for check in checks)
    warnings = sum(check.status == "warning" for check in checks)
    counted = f"{len(checks)} checks, {warnings} warning{'s' * (warnings != 1)}"
    if missing:
        return f"{counted}, {missing} thing{'s' * (missing != 1)} needed and missing"
    return f"{counted}: all that is needed works"


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for heading in ("", "", "found", "to do"):
        table.add_column(heading, overflow="fold")
    area = ""
    for check in checks:
        if check.area != area:
            table.add_row("", Text(check.area, style="bold"))
            area = check.area
        # As texts: what drivers and errors say is not markup.
        table.add_row(
            Text(check.status, style=_COLOURS[check.status]),
            Text(check.name),
            Text(check.detail),
            Text(check.advice),
        )
    Console().print(table)
