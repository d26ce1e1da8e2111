"""Memory-mapped tensors of safetensors files.

Pages are read when they are touched, are shared with the page cache, and can be dropped and read again when
memory is short. Maps are private: nothing is written to the file. Only files whose header was checked against
their size are mapped, and lowmem replaces files by renaming, never in place.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch

from lowmem.checkpoint.headers.safetensors import SafetensorsHeader
from lowmem.platform import system

_PAGE = mmap.PAGESIZE


class MappedFiles:
    """Maps each file once; a map lives as long as a tensor of it."""

    def __init__(self) -> None:
        self._storages: dict[Path, torch.UntypedStorage | None] = {}

    def tensor(self, header: SafetensorsHeader, name: str) -> torch.Tensor | None:
        """The tensor over the file's own pages, or None where it must be read instead.

        That is the case when it is empty, not aligned to its dtype, or the system refuses the map.
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
            except (OSError, RuntimeError):  # no maps on this file system, or the file is too large
                self._storages[path] = None
        return self._storages[path]


def _read_ahead(path: Path, size: int) -> None:
    """Have the system read the file sequentially while the model is built."""
    with path.open("rb") as stream:
        system.will_need(stream.fileno(), 0, size)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether this very tensor came from `MappedFiles`, so that `forget_pages` may take it."""
    return getattr(tensor, "lies_in_file", False)


def forget_pages(mapped: torch.Tensor) -> None:
    """Drop the whole pages inside a contiguous mapped tensor; they are read again when touched.

    Does nothing where the system cannot be told.
    """
    first = -(-mapped.data_ptr() // _PAGE) * _PAGE
    size = (mapped.data_ptr() + mapped.nbytes - first) // _PAGE * _PAGE
    if size > 0:
        system.drop_pages(first, size)
