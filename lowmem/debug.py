"""Unexpected errors: one line that says what to report, and the traceback for `--debug` or LOWMEM_DEBUG=1."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem import __version__
from lowmem.errors import printable

VARIABLE = "LOWMEM_DEBUG"
_HERE = Path(__file__).parent
_MOST = 500  # characters of an exception's text in the line


def enabled() -> bool:
    """Whether tracebacks are shown."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--debug`."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def enable(wanted: bool) -> None:
    """Show tracebacks in this process and its children, if `wanted`."""
    if wanted:
        os.environ[VARIABLE] = "1"


def show(error: BaseException) -> None:
    """Print the traceback to standard error, if tracebacks are shown."""
    if enabled():
        traceback.print_exception(error, file=sys.stderr)


def describe(error: BaseException) -> str:
    """The type, the message and the last place of lowmem's code: `KeyError: 'x' (lowmem/session.py:12)`."""
    text = " ".join(str(error).split())[:_MOST]
    return printable(type(error).__name__ + (f": {text}" if text else "") + place_of(error))


def place_of(error: BaseException) -> str:
    """The last place of lowmem's code that an exception passed, ` (lowmem/session.py:12)`, or ""."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((_place(f.filename, f.lineno) for f in reversed(frames) if _is_ours(f.filename)), "")
    if not place and frames:
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return f" ({place})" if place else ""


def report(error: BaseException, command: Sequence[str]) -> str:
    """The line about an error that lowmem did not expect."""
    name = " ".join(command[:2])
    again = shlex.join([*command, *([] if "--debug" in command else ["--debug"])])
    return printable(
        f"{name}: unexpected {describe(error)}. This is a bug in lowmem {__version__}: "
        f"please report it with what this prints: {again}"
    )


def report_in_lines(name: str) -> None:
    """Report errors of threads, of finalizers and in libraries' logs in one line each, without --debug."""

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            show(args.exc_value)
            print(f"{name}: unexpected {describe(args.exc_value)} in a thread", file=sys.stderr)

    def in_finalizer(args: Any) -> None:
        if enabled():
            sys.__unraisablehook__(args)

    threading.excepthook = in_thread
    sys.unraisablehook = in_finalizer
    if logging.lastResort is not None:  # of loggers without a handler, such as asyncio's
        logging.lastResort.setFormatter(_Line())


class _Line(logging.Formatter):
    """A log record in one line; with --debug its traceback follows."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        error = record.exc_info[1] if record.exc_info else None
        if enabled() or error is None:
            return super().format(record)
        return printable(f"{record.getMessage()}: {describe(error)}")


def _is_ours(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(_HERE) or any(
        path.is_relative_to(_HERE.parent / name) for name in ("convert", "benchmarks")
    )


def _place(file: str, line: int | None) -> str:
    return f"{Path(file).relative_to(_HERE.parent)}:{line}"
