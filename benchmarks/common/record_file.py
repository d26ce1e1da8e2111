"""Records in JSON files: read with their types checked, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, cast

from lowmem.benchmarks.common.records import FORMAT, HumanEvalRecord, LatencyRecord, QualityRecord

from lowmem.checkpoint.files.whole import as_output_error, write_whole
from lowmem.errors import SourceError

FOLDER = "lowmem-bench"
"""Default folder for records and reports."""
FILES: dict[type, str] = {
    QualityRecord: "quality.json",
    HumanEvalRecord: "humaneval.json",
    LatencyRecord: "latency.json",
}
T = TypeVar("T")
Record = TypeVar("Record", QualityRecord, HumanEvalRecord, LatencyRecord)


def to_json(record: Any) -> dict[str, Any]:
    """Convert a dataclass to JSON types."""
    return dataclasses.asdict(record)


def write_file(file: Path, data: bytes) -> None:
    """Write a file whole or not at all, and create its folder. Raises OutputError if the disk refuses."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_output_error(error, file.parent) from error
    write_whole(file, [data])


def write(record: Any, file: Path) -> None:
    """Write any dataclass as JSON. Raises OutputError if the file cannot be written."""
    write_file(file, (json.dumps(to_json(record), indent=1) + "\n").encode())


def read(kind: type[T], file: Path, module: str) -> T:
    """Read a dataclass from a file.

    Raises SourceError if the file is missing or damaged; the message says to run `python -m module`.
    """
    try:
        return cast(T, from_json(kind, json.loads(file.read_bytes())))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{file} cannot be read: {error}", f"Measure with: python -m {module}") from error


def write_record(record: QualityRecord | HumanEvalRecord | LatencyRecord, folder: Path) -> Path:
    """Write a record to its file in `folder` and return the path. Raises OutputError if it cannot be
    written.
    """
    file = folder / FILES[type(record)]
    write(record, file)
    return file


def read_record(kind: type[Record], folder: Path) -> Record | None:
    """Read the record of this kind in `folder`; None if there is no file. Raises SourceError if it is
    damaged.
    """
    file = folder / FILES[kind]
    try:
        data = json.loads(file.read_bytes())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError("another version of lowmem wrote it")
        return cast(Record, from_json(kind, data))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{file} cannot be read: {error}", "Remove it and measure again") from error


def from_json(kind: Any, data: Any) -> Any:
    """Convert JSON data to a value of type `kind`; missing fields get their defaults.

    Raises TypeError, ValueError or KeyError if the data does not have this type.
    """
    if dataclasses.is_dataclass(kind):
        make: Any = kind
        if not isinstance(data, dict):
            raise TypeError(f"{data!r} is not a {make.__name__}")
        hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
        if unknown := set(data) - {field.name for field in fields}:
            raise KeyError(f"unknown field {min(unknown)}")
        needed = [f for f in fields if f.name in data or f.default is dataclasses.MISSING]
        return make(**{field.name: from_json(hints[field.name], data[field.name]) for field in needed})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(data, list):
            raise TypeError(f"{data!r} is not a list")
        if arguments[-1] is Ellipsis:
            return tuple(from_json(arguments[0], value) for value in data)
        return tuple(from_json(one, value) for one, value in zip(arguments, data, strict=True))
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return from_json(next(one for one in arguments if one is not type(None)), data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise TypeError(f"{data!r} is not of type {kind.__name__}")
    return data
