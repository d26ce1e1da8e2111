"""Safetensors files as a source: headers are checked first, data is read with plain reads or mapped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowmem.checkpoint.files.reading import read_exact, row_numbers, runs
from lowmem.checkpoint.formats import QuantizationFormat
from lowmem.checkpoint.headers.safetensors import (
    SafetensorsHeader,
    StoredTensor,
    read_header_bytes,
)
from lowmem.checkpoint.source.base import ByteRange, Source, TensorInfo
from lowmem.checkpoint.source.mapped import MappedFiles
from lowmem.errors import OutOfMemoryError, SourceError


def read_tensor(
    path: Path, name: str, stored: StoredTensor, rows: slice | torch.Tensor | None = None
) -> torch.Tensor:
    """A tensor, or rows of a 2-D one, in its stored dtype and memory of its own.

    Raises SourceError when the file cannot be read or is too short, OutOfMemoryError when it does not fit.
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
    except RuntimeError as error:  # torch has no type for it; the shape was checked against the file
        nbytes = math.prod(shape) * dtype.itemsize
        raise OutOfMemoryError(
            f"{what} needs {nbytes} bytes of memory, which the system does not have",
            "Close other programs, or check where the file comes from: it may be a sparse file",
        ) from error


class SafetensorsSource(Source):
    """A folder of safetensors files, or one of them."""

    _kind = "safetensors"

    def __init__(
        self,
        path: Path,
        display: str,
        headers: Mapping[str, SafetensorsHeader],
        config_json: Mapping[str, Any],
        format: QuantizationFormat | None = None,
    ) -> None:
        """headers: each tensor's name → the header of its file."""
        infos = {}
        for name, header in headers.items():
            stored = header.tensors[name]
            dtype = "float32" if stored.dtype_name == "float64" else stored.dtype_name
            infos[name] = TensorInfo(stored.shape, dtype, header.path.name)
        super().__init__(path, display, infos, config_json, format)
        self._headers = dict(headers)
        self._mapped = MappedFiles()

    def _read(self, name: str, rows: slice | torch.Tensor | None) -> torch.Tensor:
        """See Source.read."""
        self._check_read(name, rows)
        header = self._headers[name]
        tensor = read_tensor(header.path, name, header.tensors[name], rows)
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    def _map(self, name: str) -> torch.Tensor | None:
        return self._mapped.tensor(self._headers[name], name)

    def shards(self) -> list[tuple[Path, bytes]]:
        """See Source.shards."""
        paths = {header.path.name: header.path for header in self._headers.values()}
        return [(paths[name], read_header_bytes(paths[name])[0]) for name in sorted(paths)]

    def _byte_ranges(self, stored: list[str]) -> list[ByteRange]:
        places = [(self._headers[name].path, self._headers[name].tensors[name]) for name in stored]
        return [ByteRange(path, tensor.begin, tensor.end - tensor.begin) for path, tensor in places]
