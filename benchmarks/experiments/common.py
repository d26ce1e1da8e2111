"""Shared by all experiments: where a measurement comes from, its file, and Markdown tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from lowmem.benchmarks.common import record_file
from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.records import Origin, Repeated

from lowmem.errors import LowmemError

RESULTS = ROOT / "benchmarks" / "results"
PLACES = ("--llama-python", "--autoround-python", "--work", "--out")
"""Options whose values are paths of one machine; recorded commands leave them out."""
Record = TypeVar("Record")


def say(text: str) -> None:
    """Print a line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def typed_command(name: str, words: Sequence[str]) -> str:
    """The command as typed, without PLACES. name: of the module below lowmem.benchmarks.experiments."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word.split("=")[0] in PLACES:
            skip = "=" not in word
        else:
            kept.append(word)
    return shlex.join(["python", "-m", f"lowmem.benchmarks.experiments.{name}", *kept])


def origin_here(name: str, words: Sequence[str], source: str, digest: str = "") -> Origin:
    """The Origin of an experiment that begins now. source: what is measured; digest: of its weights."""
    from lowmem.benchmarks.common.origin import origin_of

    return dataclasses.replace(origin_of((), source, digest), command=typed_command(name, words))


def write(record: Any, file: Path) -> None:
    """Write a record, a dataclass, as JSON. Raises OutputError."""
    record_file.write_file(file, (rows(record_file.to_json(record)) + "\n").encode())


def rows(data: Any, indent: str = "") -> str:
    """JSON with one row to a line: what is short, and every list of plain values, takes one line."""
    text = json.dumps(data)
    flat = isinstance(data, (list, tuple)) and not any(isinstance(x, (dict, list, tuple)) for x in data)
    if len(indent) + len(text) <= 110 or flat or not isinstance(data, (dict, list, tuple)):
        return text
    inner = indent + " "
    if isinstance(data, dict):
        lines = [f"{json.dumps(key)}: {rows(value, inner)}" for key, value in data.items()]
    else:
        lines = [rows(value, inner) for value in data]
    first, last = "{}" if isinstance(data, dict) else "[]"
    return f"{first}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{last}"


def table(heads: Sequence[str], cells: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A Markdown table. cells: of each row. numbers: align all columns but the first to the right."""
    lines = [heads, ["---", *["---:" if numbers else "---"] * (len(heads) - 1)], *cells]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def cell(text: str) -> str:
    """Text that does not break a Markdown table."""
    return text.replace("|", "/").replace("\n", " ")


def made_with(origin: Origin, more: Iterable[tuple[str, str]] = ()) -> str:
    """Command, date, machine and versions on one line. more: further (package, version)."""
    versions = ", ".join(f"{name} {number}" for name, number in (dict(origin.versions) | dict(more)).items())
    machine = origin.machine
    return f"`{origin.command}`, {origin.date[:10]}, {machine.cpu}, {machine.cores} cores; {versions}."


def repeated(values: Sequence[float]) -> Repeated:
    """All values, with their median and extremes."""
    return Repeated(median(values), min(values), max(values), tuple(values))


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """The median and, in brackets, the extremes. form: of each."""
    middle, low, high = (form.format(f(values)) for f in (median, min, max))
    return f"{middle} ({low} to {high})"


def add_timing_options(parser: argparse.ArgumentParser, work: Path, rounds: int) -> None:
    """Declare --work, --llama-python, --rounds and --threads. work, rounds: their defaults."""
    add = parser.add_argument
    add("--work", type=Path, default=work, metavar="DIR", help="where models are kept (%(default)s)")
    add("--llama-python", metavar="PYTHON", help="the interpreter that has llama-cpp-python")
    add("--rounds", type=int, default=rounds, metavar="N", help="(%(default)s)")
    add("--threads", type=int, default=2, metavar="N", help="(%(default)s)")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The command of one experiment: measure and write a record, or show one."""

    name: str
    """Of its module, below lowmem.benchmarks.experiments."""
    kind: type[Any]
    """The record, a dataclass."""
    out: Path
    """Where the committed record is."""
    render: Callable[[Any], str]
    """The record as Markdown."""

    def parser(self, description: str | None) -> argparse.ArgumentParser:
        """A parser with --show and --out."""
        parser = argparse.ArgumentParser(
            prog=f"python -m lowmem.benchmarks.experiments.{self.name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--show", action="store_true", help="print the record in --out, measure nothing")
        parser.add_argument(
            "--out", type=Path, default=self.out, metavar="FILE", help="the record to write (%(default)s)"
        )
        return parser

    def read(self, file: Path | None = None) -> Any:
        """The record in a file (the committed one). Raises SourceError."""
        module = f"lowmem.benchmarks.experiments.{self.name}"
        return record_file.read(self.kind, file or self.out, module)

    def run(self, args: argparse.Namespace, measure: Callable[[], Any], keep: bool = True) -> int:
        """Show the record, or measure, write it (if `keep`) and show it; the exit code."""
        try:
            record = self.read(args.out) if args.show else measure()
            if keep and not args.show:
                write(record, args.out)
        except LowmemError as error:
            say(f"error: {error}")
            return 2
        print(self.render(record))
        return 0
