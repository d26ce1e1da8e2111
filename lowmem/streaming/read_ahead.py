"""Read the next layer's bytes into the page cache while the current layer is computed.

posix_fadvise tells the kernel which bytes will be needed. That takes none of the process's memory; on systems
without it, layers are read when they are needed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path

from lowmem.checkpoint.headers.bin import read_bin_header
from lowmem.checkpoint.source.open import Source
from lowmem.checkpoint.source.safetensors import SafetensorsSource
from lowmem.errors import SourceError

_LOCAL_HEADER = 1024
"""Bytes of a zip entry's local header with padding; PyTorch aligns the data to 64 bytes."""

Range = tuple[Path, int, int]
"""File, first byte, number of bytes."""


def ranges(source: Source, names: Iterable[str]) -> list[Range]:
    """The file ranges of tensors, given by stored name; empty for sources that cannot tell them."""
    if isinstance(source, SafetensorsSource):
        stored = [(source.headers[name].path, source.headers[name].tensors[name]) for name in names]
        return [(path, tensor.begin, tensor.end - tensor.begin) for path, tensor in stored]
    if source.kind != "bin":
        return []
    found: list[Range] = []
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(source.infos[name].file, []).append(name)
    for file, wanted in by_file.items():
        path = source.path / file
        tensors = read_bin_header(path)
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.rpartition("/data/")[2]: entry for entry in archive.infolist()}
        for name in wanted:
            entry = entries[tensors[name].key]
            found.append((path, entry.header_offset, entry.file_size + _LOCAL_HEADER))
    return found


def read_ahead(source: Source, names: Iterable[str]) -> threading.Thread | None:
    """Request the tensors' bytes in a new thread; None on systems without posix_fadvise."""
    if not hasattr(os, "posix_fadvise"):
        return None
    wanted = list(names)

    def ask() -> None:
        with contextlib.suppress(OSError, SourceError, KeyError, zipfile.BadZipFile):
            for path, begin, size in ranges(source, wanted):
                with path.open("rb", buffering=0) as stream:
                    os.posix_fadvise(stream.fileno(), begin, size, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=ask, name="read ahead", daemon=True)
    thread.start()
    return thread
