"""The rows of JSON, JSON Lines, CSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lowmem.convert.reading.files import FILE_LIMIT, INSTALL
from lowmem.convert.reading.layouts import FIELDS, KNOWN, document_of_row, is_dialogue
from lowmem.convert.reading.oasst import COLUMNS

from lowmem.errors import CalibrationError

LINES = (".jsonl", ".ndjson", ".jsonlines", ".jsonl5")
JSON = (".json", *LINES)
CSV = {".csv": None, ".tsv": "\t"}
"""Suffix → the delimiter; None is found out from the header."""
TABLES = (".parquet", ".arrow", ".feather")
CONTAINERS = ("data", "rows", "train", "examples", "instances", "records", "items", "samples", "entries")
"""Fields of an object that holds the list of rows."""
MOST_ROWS = 20_000
"""Rows that are read from a Parquet or Arrow file, or a data set of the hub, of any size."""
_JSON_BEGINNING = re.compile(r'\s*(?:\[\s*)*\{\s*"(?:[^"\\\n]|\\.)*"\s*:|\s*\[\s*"(?:[^"\\\n]|\\.)*"\s*[,\]]')


@dataclass(frozen=True)
class Row:
    """One row as it was read."""

    place: str
    """Where it is: "line 3" or "row 3"."""
    value: Any
    """What JSON or a table gives; without meaning if `problem` is set."""
    problem: str | None = None
    """Why it could not be read."""


def looks_like_json(text: str) -> bool:
    """Whether a text begins as JSON objects, or as a list of objects or texts."""
    return _JSON_BEGINNING.match(text) is not None


def json_rows(text: str, name: str, lines: bool) -> Iterable[Row]:
    """The rows of a JSON document, or of JSON Lines if the text is not one document.

    lines: the name says JSON Lines. Raises CalibrationError for other text, and for objects without rows.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if lines or any(map(_is_json_row, islice(filter(str.strip, text.split("\n")), 3))):
            return _line_rows(text)
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise CalibrationError(
            f"{name}, line {line} is not JSON: {reason}",
            "Give a JSON array of objects, or one JSON object per line",
        ) from error
    return [Row(f"row {number}", row) for number, row in enumerate(rows_of_value(value, name), start=1)]


def _line_rows(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield Row(f"line {number}", json.loads(line))
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            yield Row(f"line {number}", None, f"not JSON ({reason})")


def _is_json_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), (dict, list, str))
    except (ValueError, RecursionError):
        return False


def rows_of_value(value: Any, name: str) -> Sequence[Any]:
    """The rows of a parsed JSON document: a list, an object that holds one, or an object of columns.

    Raises CalibrationError for values without rows.
    """
    if is_dialogue(value):
        return [value]
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping):
        if (found := _contained(value)) is not None:
            return found
        try:
            document_of_row(value)
        except ValueError:
            found = _columns(value)
        else:
            return [value]
        if found is not None:
            return found
        if value and all(isinstance(row, Mapping) for row in value.values()):
            return list(value.values())  # an object of rows by their index
        what = f"an object with {', '.join(str(key)[:40] for key in list(value)[:8]) or 'no fields'}"
    else:
        what = "a text" if isinstance(value, str) else "a number or another single value"
    raise CalibrationError(f"{name} holds {what}, and no rows", f"Give a list of objects. {KNOWN}")


def _contained(value: Mapping[str, Any]) -> list[Any] | None:
    """The rows of an object such as {"data": [...]}, {"rows": [{"row": ...}]} or pandas' split form."""
    for field in CONTAINERS:
        rows = value.get(field)
        if not isinstance(rows, list) or not rows or not isinstance(rows[0], (Mapping, list, str)):
            continue
        names = value.get("columns")
        if isinstance(names, list) and all(isinstance(row, list) and len(row) == len(names) for row in rows):
            return [dict(zip(map(str, names), row, strict=True)) for row in rows]
        wrapped = all(isinstance(row, Mapping) and "row" in row and "row_idx" in row for row in rows)
        return [row["row"] for row in rows] if wrapped else rows
    return None


def _columns(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of an object of columns: lists of one length, or objects with the same indices."""
    columns: dict[str, list[Any]] = {}
    indices = None
    for name, column in value.items():
        if isinstance(column, Mapping):
            if indices is not None and list(column) != indices:
                return None
            indices = list(column)
            columns[name] = list(column.values())
        elif isinstance(column, list):
            columns[name] = column
        else:
            return None
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1 or not any(name.lower() in FIELDS for name in columns):
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def csv_rows(text: str, name: str, delimiter: str | None) -> Iterator[Row]:
    """The rows of a CSV text whose first line names the columns.

    delimiter: None is the one of , ; tab | that gives the most known names. Raises CalibrationError for a
    header without a known name, and for quotes that do not end.
    """
    header_line = text.split("\n", 1)[0]
    if delimiter is None:
        delimiter = max(",;\t|", key=lambda sign: sum(_known(cell) for cell in header_line.split(sign)))
    before = csv.field_size_limit(FILE_LIMIT)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(reader, [])
        if not any(map(_known, header)):
            found = ", ".join(cell[:40] for cell in header[:8])
            raise CalibrationError(
                f"{name} has the columns {found or 'none'} in its first line, and none is known",
                f"Name the columns in the first line. {KNOWN}",
            )
        for cells in reader:
            place = f"line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                yield Row(place, None, f"{len(cells)} cells for {len(header)} columns")
            else:  # an empty cell is a missing value
                yield Row(place, {key: cell or None for key, cell in zip(header, cells, strict=True)})
    except csv.Error as error:
        raise CalibrationError(
            f"{name}, line {reader.line_num} is not CSV: {error}", "Check the quotes before this line"
        ) from error
    finally:
        csv.field_size_limit(before)


def _known(cell: str) -> bool:
    return cell.strip().strip('"').lower() in FIELDS


def table_rows(path: Path, kind: str) -> tuple[Iterator[Row], str]:
    """The first rows of a Parquet or Arrow file, and a remark where there are more.

    Raises CalibrationError for a file without known columns, a damaged one, and without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise CalibrationError(
            f"{path} is a {kind.capitalize()} file, which needs the package pyarrow",
            f"Install it with: {INSTALL}. Or give JSON Lines",
        ) from error
    try:
        if kind == "parquet":
            file = parquet.ParquetFile(path)
            columns = _known_columns(file.schema_arrow.names, path)
            total = file.metadata.num_rows
            batches: Iterator[Any] = file.iter_batches(batch_size=1000, columns=columns)
        else:
            table = _arrow_table(pyarrow, ipc, path)
            columns = _known_columns(table.schema.names, path)
            total = table.num_rows
            batches = iter(table.select(columns).slice(0, MOST_ROWS).to_batches(1000))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    remark = f"the first {MOST_ROWS:,} of {total:,} rows are read" if total > MOST_ROWS else ""
    return _batch_rows(batches, path), remark


def _arrow_table(pyarrow: Any, ipc: Any, path: Path) -> Any:
    source = pyarrow.memory_map(str(path))
    try:
        return ipc.open_file(source).read_all()
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return ipc.open_stream(source).read_all()


def _batch_rows(batches: Iterator[Any], path: Path) -> Iterator[Row]:
    number = 0
    try:
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", value)
                if number == MOST_ROWS:
                    return
    except (OSError, ValueError, ArithmeticError) as error:
        raise _damaged(path, error) from error


def _known_columns(names: Sequence[str], path: Path) -> list[str]:
    if not any(map(_known, names)):
        found = ", ".join(name[:40] for name in names[:8]) or "none"
        raise CalibrationError(f"{path} has the columns {found}, and none is known", KNOWN)
    return [name for name in dict.fromkeys(names) if _known(name) or name in COLUMNS]


def _damaged(path: Path, error: Exception) -> CalibrationError:
    if isinstance(error, CalibrationError):
        return error
    reason = str(error).strip().split("\n")[0][:200]
    return CalibrationError(f"{path} cannot be read ({reason})", "Copy or download it again")
