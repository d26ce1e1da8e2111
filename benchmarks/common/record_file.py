"""A benchmark's record in its JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, cast

from lowmem.benchmarks.common.records import from_json, to_json

from lowmem.errors import SourceError

Record = TypeVar("Record")


def read(kind: type[Record], file: Path, module: str) -> Record:
    """The record of this kind in a file. Raises SourceError where there is none, or it is damaged.

    module: `python -m` of it measures again.
    """
    try:
        return cast(Record, from_json(kind, json.loads(file.read_bytes())))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{file} cannot be read: {error}", f"Measure with: python -m {module}") from error


def write(record: Any, file: Path) -> None:
    """Write a record, a dataclass, whole or not at all. Raises OutputError."""
    from lowmem.checkpoint.files.whole import as_output_error, write_whole

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_output_error(error, file.parent) from error
    write_whole(file, [(json.dumps(to_json(record), indent=1) + "\n").encode()])
