"""Where a measurement writes: its folder of records, disk space, and the options that say so."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowmem.benchmarks.common.record_file import FILES, FOLDER, to_json
from lowmem.benchmarks.common.records import HumanEvalRecord, LatencyRecord, QualityRecord

from lowmem.checkpoint.files.home import typed_path
from lowmem.checkpoint.files.lock import take
from lowmem.checkpoint.files.whole import DiskFullError, refusals, require_room
from lowmem.errors import OutputError
from lowmem.text.units import format_bytes

_OTHERWISE = "measure fewer --rows, or set LOWMEM_CACHE (with --no-cache: TMPDIR) to a folder on another disk"


@dataclass(frozen=True)
class Output:
    """Where to write the record, and how to print it."""

    folder: Path
    json: bool = False
    """Print the record in place of tables."""
    quiet: bool = False
    """Print no progress."""
    fresh: bool = False
    """Forget the results of an interrupted run."""


def add_output_arguments(parser: argparse.ArgumentParser, kind: type) -> None:
    """Declare --out, --json, --quiet and --fresh. kind: of the record."""
    parser.add_argument("--fresh", "--force", action="store_true", help="ignore the results of earlier runs")
    parser.add_argument(
        "--out", default=FOLDER, metavar="DIR", help=f"folder for {FILES[kind]} (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the record instead of tables")
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def output_of(args: argparse.Namespace) -> Output:
    """Convert command-line arguments to an Output."""
    return Output(typed_path(args.out), args.json, args.quiet, args.fresh)


def print_json(record: QualityRecord | HumanEvalRecord | LatencyRecord) -> None:
    """Print a record as the JSON text of its file."""
    print(json.dumps(to_json(record), indent=1))


@contextlib.contextmanager
def exclusive(folder: Path, kind: str) -> Iterator[None]:
    """Lock the folder against other measurements of this kind, which would overwrite the record.

    Raises OutputError at once if such a measurement is running, or if the folder cannot be created.
    """
    file = folder / f"{kind}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take(file, f"another lowmem bench {kind} is writing to {folder}")
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}", "Choose another folder with --out"
        ) from error
    with lock, refusals(folder):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.unlink()


@contextlib.contextmanager
def with_disk_space(folder: Path, needed: int) -> Iterator[None]:
    """Check that `folder` has `needed` free bytes before the work.

    Raises OutputError if it has not, or if the disk fills up during the work; the message names the bytes.
    """
    require_room(folder, needed, "the measurement", _OTHERWISE)
    try:
        yield
    except DiskFullError as error:
        raise DiskFullError(
            f"{error.message}; the whole measurement needs {format_bytes(needed)} in {folder}", error.hint
        ) from error
