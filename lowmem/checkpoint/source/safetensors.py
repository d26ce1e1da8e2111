"""Safetensors files as sources: the header is checked first, the data read with plain file reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from lowmem.checkpoint.files.reading import read_exact, row_numbers, runs
from lowmem.checkpoint.headers.safetensors import (
    DTYPE_NAMES,
    SafetensorsHeader,
    StoredTensor,
    read_header,
    read_header_bytes,
)
from lowmem.checkpoint.source.base import Source, TensorInfo, check_readable, check_rows
from lowmem.errors import OutOfMemoryError, SourceError

__all__ = ["DTYPES", "SafetensorsHeader", "SafetensorsSource", "StoredTensor", "read_header", "read_tensor"]

DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, (name, _) in DTYPE_NAMES.items()}


def read_tensor(
    path: Path, name: str, stored: StoredTensor, rows: slice | torch.Tensor | None = None
) -> torch.Tensor:
    """A tensor, or rows of a 2-D one, in its stored dtype and memory of its own.

    Raises SourceError when the file cannot be read or ends before, OutOfMemoryError when it does not fit.
    """
    what = f"{path.name} (tensor {name!r})"
    try:
        with path.open("rb", buffering=0) as stream:
            if rows is None:
                out = _empty(stored.shape, stored.dtype, what)
                read_exact(stream, stored.begin, out, what)
                return out
            numbers = row_numbers(rows, stored.shape[0])
            out = _empty((len(numbers), stored.shape[1]), stored.dtype, what)
            row_bytes = stored.shape[1] * stored.dtype.itemsize
            for position, first, count in runs(numbers):
                read_exact(stream, stored.begin + first * row_bytes, out[position : position + count], what)
            return out
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _empty(shape: tuple[int, ...], dtype: torch.dtype, what: str) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:  # torch's own is of no kind: the shape was checked against the file
        nbytes = math.prod(shape) * dtype.itemsize
        raise OutOfMemoryError(
            f"{what} needs {nbytes} bytes of memory, which the system does not have",
            "Close other programs, or check where the file comes from: it may be mostly a hole",
        ) from error


class SafetensorsSource(Source):
    """A folder of safetensors files; `files` maps each tensor's name to its file's header."""

    kind = "safetensors"

    def __init__(self, path: Path, display: str, files: Mapping[str, SafetensorsHeader]) -> None:
        infos = {}
        for name, header in files.items():
            stored = header.tensors[name]
            dtype = "float32" if stored.dtype_name == "float64" else stored.dtype_name
            infos[name] = TensorInfo(stored.shape, dtype, header.path.name)
        super().__init__(path, display, infos)
        self._files_by_name = dict(files)

    def read(self, name: str, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        """See Source.read."""
        info, header = self.infos[name], self._files_by_name[name]
        check_readable(name, info)
        if rows is not None:
            check_rows(name, info)
        tensor = read_tensor(header.path, name, header.tensors[name], rows)
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    @property
    def headers(self) -> Mapping[str, SafetensorsHeader]:
        """The header of the file that each tensor is in."""
        return self._files_by_name

    def shards(self) -> list[tuple[Path, bytes]]:
        """See Source.shards."""
        paths = {header.path.name: header.path for header in self._files_by_name.values()}
        return [(paths[name], read_header_bytes(paths[name])[0]) for name in sorted(paths)]
