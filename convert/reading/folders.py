"""The files of a folder that hold text: source files, or the files of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lowmem.convert.reading.files import FILE_LIMIT, decode, plain_text, read_bytes, suffix_of
from lowmem.convert.reading.tables import LINES, TABLES, Row

from lowmem.errors import CalibrationError

_CODE = """
.agda .asm .bash .bat .c .cc .cjs .clj .cmake .coq .cpp .cs .css .cu .cuh .cxx .d .dart .el .erl .ex .exs .f90
.fish .for .fs .go .gradle .groovy .h .hh .hpp .hs .java .jl .js .jsx .kt .kts .lean .less .lisp .lua .m .mjs
.mk .ml .mli .mm .nim .pas .php .pl .pm .proto .ps1 .py .pyi .pyx .r .rb .rkt .rs .scala .scm .scss .sh .sol
.sql .sv .svelte .swift .tex .tf .thrift .ts .tsx .v .vb .vhd .vhdl .vue .zig .zsh
"""
_PROSE = ".adoc .htm .html .log .markdown .md .org .rst .text .txt"
CODE = frozenset(_CODE.split())
"""Suffixes of source code."""
PROSE = frozenset(_PROSE.split())
"""Suffixes of other text."""
_LEFT_OUT = {"node_modules", "__pycache__", "venv", "site-packages", "target", "dist", "build"}
"""Folders of generated files; those that begin with a dot are left out too."""


def folder_rows(folder: Path) -> tuple[Iterator[Row], str]:
    """One row for each text file of a folder of source code or prose, and a remark on the other files.

    Raises CalibrationError for a folder that cannot be read, is too large, or has no such file.
    """
    files = _walk(folder)
    chosen = [file for file in files if suffix_of(file) in CODE | PROSE]
    if not chosen:
        raise CalibrationError(
            f"the folder {folder} has no text file", "Give a file, or a folder of source code"
        )
    left = len(files) - len(chosen)
    return _rows(folder, chosen), f"{left} other file{'s' * (left > 1)} left out" if left else ""


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that holds a data set and no source code; of those for training, if so named."""
    files = _walk(folder)
    if any(suffix_of(file) in CODE for file in files):
        return []
    data = [file for file in files if suffix_of(file) in (*LINES, *TABLES)]
    return [file for file in data if "train" in file.relative_to(folder).as_posix().lower()] or data


def _walk(folder: Path) -> list[Path]:
    """The regular files below a folder in a fixed order. Links are not followed."""
    found: list[Path] = []

    def failed(error: OSError) -> None:
        raise CalibrationError(
            f"{error.filename} cannot be read: {error.strerror}", "Check its permissions"
        ) from error

    for place, folders, names in os.walk(folder, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _LEFT_OUT)
        paths = [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        found += [path for path in paths if path.is_file() and not path.is_symlink()]
    return found


def _rows(folder: Path, files: list[Path]) -> Iterator[Row]:
    size = 0
    for file in files:
        place = f"file {file.relative_to(folder).as_posix()}"
        try:
            raw = read_bytes(file)
            size += len(raw)
            row = Row(place, {"text": plain_text(decode(raw), file)})
        except CalibrationError as error:
            row = Row(place, None, error.message.removeprefix(f"{file} "))
        if size > FILE_LIMIT:
            raise CalibrationError(
                f"the folder {folder} has more than {FILE_LIMIT >> 20} MiB of text", "Use a part of it"
            )
        yield row
