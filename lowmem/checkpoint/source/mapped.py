"""Tensors of safetensors files used where they lie: mapped, not read.

The pages come from the file when they are touched, are shared with the page cache, and can be dropped and
read again when memory is short. Private maps: nothing is ever written to the file. Only files whose header
was checked against their size come here, and lowmem replaces files by renaming, never in place.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import torch

from lowmem.checkpoint.headers.safetensors import SafetensorsHeader

_PAGE = mmap.PAGESIZE
_DONTNEED = 4  # of Linux' sys/mman.h


class MappedFiles:
    """Maps each file once, for as long as a tensor of it lives."""

    def __init__(self) -> None:
        self._storages: dict[Path, torch.UntypedStorage | None] = {}

    def tensor(self, header: SafetensorsHeader, name: str) -> torch.Tensor | None:
        """The tensor over the file's own pages; None where it cannot be mapped, and must be read instead.

        That is: not aligned to its dtype, empty, or the system refuses the map.
        """
        stored = header.tensors[name]
        dtype: torch.dtype = stored.dtype
        if stored.begin % dtype.itemsize or stored.begin == stored.end:
            return None
        storage = self._storage(header.path)
        if storage is None or stored.end > storage.nbytes():
            return None
        whole: Any = torch.empty(0, dtype=dtype)
        whole.set_(storage, stored.begin // dtype.itemsize, stored.shape)
        whole.lies_in_file = True
        return whole  # type: ignore[no-any-return]

    def _storage(self, path: Path) -> torch.UntypedStorage | None:
        if path not in self._storages:
            try:
                size = path.stat().st_size
                storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
                self._storages[path] = storage
                _read_ahead(path, size)
            except (OSError, RuntimeError):  # no memory map on this file system, or too large a one
                self._storages[path] = None
        return self._storages[path]


def _read_ahead(path: Path, size: int) -> None:
    """Have the system read the file in its own order while we build the model."""
    if not hasattr(os, "posix_fadvise"):
        return
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, size, os.POSIX_FADV_WILLNEED)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether this very tensor came from `MappedFiles`, so that its pages may be forgotten."""
    return getattr(tensor, "lies_in_file", False)


def forget_pages(mapped: torch.Tensor) -> None:
    """Give back the whole pages inside a contiguous mapped tensor; they come again from the file.

    Advice to Linux, and nothing elsewhere.
    """
    if sys.platform != "linux":
        return
    first = -(-mapped.data_ptr() // _PAGE) * _PAGE
    size = (mapped.data_ptr() + mapped.nbytes - first) // _PAGE * _PAGE
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _DONTNEED)
