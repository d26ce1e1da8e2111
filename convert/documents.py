"""Calibration documents: plain texts and dialogues, from the built-in text, files, folders and the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lowmem.convert.reading import tables
from lowmem.convert.reading.collect import Collected, collect
from lowmem.convert.reading.files import decode, head_of, plain_text, read_bytes, suffix_of, table_kind
from lowmem.convert.reading.folders import CODE, PROSE, data_files, folder_rows
from lowmem.convert.reading.hub import HUB_LICENSES, HUB_NAMES, USE_LOCAL, hub_rows
from lowmem.convert.reading.layouts import Document
from lowmem.convert.reading.oasst import oasst_dialogues
from lowmem.convert.reading.tables import MOST_ROWS, Row

from lowmem.checkpoint.files.home import typed_path
from lowmem.errors import CalibrationError

BUILTIN = "lowmem's built-in text (source code in twelve languages, English, questions and answers)"
FILE_SUFFIXES = CODE | PROSE | {*tables.JSON, *tables.CSV, *tables.TABLES}
"""A source with one of these is a file, not a data set of the hub."""


@dataclass(frozen=True)
class Documents:
    """What a source gives."""

    documents: list[Document]
    label: str
    """The source, for the model card: where from, what was taken, how many rows were skipped."""
    notes: tuple[str, ...] = ()
    """Remarks for the user."""


def read_documents(source: str) -> Documents:
    """Read the documents of a source (see `CalibrationSpec.source`).

    Raises CalibrationError for a source that cannot be read, is empty, is of an unknown kind, or has too many
    rows of unknown layout.
    """
    if source == "builtin":
        lines = resources.files("lowmem").joinpath("data/calibration/builtin.jsonl").read_text("utf-8")
        return Documents(
            [*collect(tables.json_rows(lines, "builtin.jsonl", True), "builtin").documents], BUILTIN
        )
    if source == "oasst1":
        found = Documents(oasst_dialogues(hub_rows(HUB_NAMES[source], None)), _hub_label(source))
    elif source in HUB_NAMES:
        found = _of_hub(hub_rows(HUB_NAMES[source], None), source, _hub_label(source))
    elif (path := _existing(source)) is not None:
        found = read_path(path)
    elif suffix_of(Path(source)) in FILE_SUFFIXES or source.startswith(("/", ".", "~")):
        raise CalibrationError(f"the calibration file {source} does not exist", "Check the path")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        label = f"the data set {source} (under its own licence)"
        found = _of_hub(hub_rows(source, MOST_ROWS), source, label)
    else:
        raise CalibrationError(
            f"{source!r} is neither a file nor a data set",
            "Use builtin, oasst1, dolly, a file, a folder, or owner/name",
        )
    if not found.documents:
        raise CalibrationError(f"{found.label} holds no text", USE_LOCAL)
    return found


def read_path(path: Path) -> Documents:
    """Read the documents of a file or a folder. Raises CalibrationError as `read_documents` does."""
    if not path.is_dir():
        return _of_file(path)
    files = data_files(path)
    if not files:
        rows, remark = folder_rows(path)
        return _found(collect(rows, path.name), f"the folder {path.name}", path.name, remark)
    parts = [(file, *_rows_of_file(file)) for file in files]
    rows = (
        Row(f"{file.relative_to(path).as_posix()}, {row.place}", row.value, row.problem)
        for file, found, _ in parts
        for row in ([Row("row 1", found)] if isinstance(found, str) else found)
    )
    remarks = "; ".join(f"{file.name}: {remark}" for file, _, remark in parts if remark)
    return _found(collect(rows, path.name), f"the folder {path.name}", path.name, remarks)


def _existing(source: str) -> Path | None:
    """The file or folder that a source names, if it is there."""
    try:
        path = typed_path(source)
        return path if source and path.exists() else None
    except PermissionError:
        return path  # reading it says why
    except OSError:  # a name that is too long
        return None


def _of_file(path: Path) -> Documents:
    """The documents of one file; a file without rows is one text."""
    label = f"the file {path.name}"
    rows, remark = _rows_of_file(path)
    if isinstance(rows, str):
        return Documents([rows] if rows.strip() else [], label)
    return _found(collect(rows, path.name), label, path.name, remark)


def _rows_of_file(path: Path) -> tuple[Iterable[Row] | str, str]:
    """The rows of a file and a remark on them; the text of a file that is not made of rows."""
    if kind := table_kind(head_of(path), path):
        return tables.table_rows(path, kind)
    suffix, text = suffix_of(path), decode(read_bytes(path))
    if not text.strip():
        return [], ""
    if suffix in tables.JSON or (suffix not in CODE and tables.looks_like_json(text)):
        return tables.json_rows(text, path.name, suffix in tables.LINES), ""
    if suffix in tables.CSV:
        return tables.csv_rows(text, path.name, tables.CSV[suffix]), ""
    if suffix in tables.TABLES:
        raise CalibrationError(f"{path} is not a {suffix[1:].capitalize()} file", "Copy or download it again")
    return plain_text(text, path), ""


def _found(collected: Collected, label: str, name: str, remark: str) -> Documents:
    details = "; ".join(part for part in (collected.taken, collected.skipped_words, remark) if part)
    notes = collected.notes(name) + ([f"{name}: {remark}"] if remark else [])
    return Documents([*collected.documents], f"{label} ({details})", tuple(notes))


def _of_hub(rows: Iterable[Mapping[str, Any]], name: str, label: str) -> Documents:
    collected = collect((Row(f"row {number}", row) for number, row in enumerate(rows, start=1)), name)
    more = f" ({collected.skipped_words})" if collected.skipped else ""
    return Documents([*collected.documents], label + more, tuple(collected.notes(name)))


def _hub_label(name: str) -> str:
    return f"{HUB_NAMES[name]} ({HUB_LICENSES[name]})"
