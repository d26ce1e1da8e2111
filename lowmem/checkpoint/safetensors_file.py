"""Safetensors files: the header is parsed and checked here, the data read with plain file reads.

> 8 bytes: length n of the header, little-endian
> n bytes: {"name": {"dtype": "F16", "shape": [6400, 6144], "data_offsets": [begin, end]}, ...}
> the rest: the tensors' bytes, each at its offsets, without gaps or overlaps
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch

from lowmem.checkpoint.files import parse_json, read_exact, row_numbers, runs
from lowmem.checkpoint.source_base import Source, TensorInfo, check_readable, check_rows
from lowmem.errors import SourceError

MAX_HEADER = 100_000_000  # the format's own limit
MAX_NAME = 1024
MAX_DIMS = 32
# Spelt as in the format; looked up by name since older torch lack the narrow ones.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _DTYPES.items() if hasattr(torch, name)
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `begin` and `end` count from the start of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """A checked header: every tensor lies inside the file, and the file holds nothing else."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON bytes of the header and the file's size; SourceError when they cannot be."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            if size == 0:
                raise SourceError(f"{path.name} is empty (0 bytes)", _AGAIN)
            if len(prefix) < 8:
                raise SourceError(f"{path.name} is truncated: a file of {size} bytes has no header", _AGAIN)
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER:
                raise SourceError(
                    f"{path.name} is no safetensors file: its header would be {length} bytes long", _AGAIN
                )
            if 8 + length > size:
                raise SourceError(
                    f"{path.name} is truncated: header promises {8 + length} bytes, file has {size}", _AGAIN
                )
            return stream.read(length), size
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


_AGAIN = "Download or copy it again"


def read_header(path: Path) -> SafetensorsHeader:
    """Parse and check a file's header; nothing is allocated for what it claims.

    Raises SourceError naming the file, and the tensor at fault, when the file is truncated, too
    long, or its offsets lie.
    """
    data, size = read_header_bytes(path)
    start = 8 + len(data)
    entries = parse_json(data, f"the header of {path.name}")
    if not isinstance(entries, dict):
        raise SourceError(f"the header of {path.name} is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise SourceError(f"the header of {path.name} has a __metadata__ that is not an object")
    tensors = {name: _stored_tensor(path.name, name, entry, start) for name, entry in entries.items()}
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            what = "overlaps the tensor before it" if tensor.begin < position else "leaves a gap before it"
            raise SourceError(f"{path.name}: tensor {name!r} {what}", _AGAIN)
        position = tensor.end
    if position > size:
        raise SourceError(
            f"{path.name} is truncated: header promises {position} bytes, file has {size}", _AGAIN
        )
    if position < size:
        raise SourceError(f"{path.name} has {size - position} bytes after its last tensor", _AGAIN)
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    return SafetensorsHeader(path, tensors, texts)


def _stored_tensor(file: str, name: str, entry: object, start: int) -> StoredTensor:
    """One checked entry of a header."""

    def fault(what: str) -> SourceError:
        return SourceError(f"{file}: tensor {name[:MAX_NAME]!r} {what}", _AGAIN)

    if len(name) > MAX_NAME:
        raise fault(f"has a name of {len(name)} characters")
    if not isinstance(entry, dict):
        raise fault("has no description")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise fault(f"has dtype {str(code)[:40]!r}, which is not one we can read")
    if not _is_list_of_counts(shape) or len(shape) > MAX_DIMS:
        raise fault("has a shape that is not a list of whole numbers")
    if not _is_list_of_counts(offsets) or len(offsets) != 2:
        raise fault("has data_offsets that are not two whole numbers")
    begin, end = offsets
    # Beyond 2**63 torch cannot even name the shape of an empty tensor.
    if math.prod(max(dim, 1) for dim in shape) >= 2**63 or end >= 2**63:
        raise fault("has a shape or offsets beyond any file")
    if end < begin or end - begin != math.prod(shape) * dtype.itemsize:
        raise fault(f"of shape {shape} and dtype {code} cannot lie at offsets {begin} to {end}")
    return StoredTensor(tuple(shape), dtype, start + begin, start + end)


def _is_list_of_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def read_tensor(
    path: Path, name: str, stored: StoredTensor, rows: slice | torch.Tensor | None = None
) -> torch.Tensor:
    """A tensor, or rows of a 2-D one, in its stored dtype and memory of its own."""
    what = f"{path.name} (tensor {name!r})"
    try:
        with path.open("rb", buffering=0) as stream:
            if rows is None:
                out = torch.empty(stored.shape, dtype=stored.dtype)
                read_exact(stream, stored.begin, out, what)
                return out
            numbers = row_numbers(rows, stored.shape[0])
            out = torch.empty((len(numbers), stored.shape[1]), dtype=stored.dtype)
            row_bytes = stored.shape[1] * stored.dtype.itemsize
            for position, first, count in runs(numbers):
                read_exact(stream, stored.begin + first * row_bytes, out[position : position + count], what)
            return out
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


class SafetensorsSource(Source):
    """A folder of safetensors files; `files` maps each tensor's name to its file's header."""

    kind = "safetensors"

    def __init__(self, path: Path, display: str, files: Mapping[str, SafetensorsHeader]) -> None:
        infos = {}
        for name, header in files.items():
            stored = header.tensors[name]
            dtype = torch.float32 if stored.dtype == torch.float64 else stored.dtype
            infos[name] = TensorInfo(stored.shape, str(dtype).removeprefix("torch."), header.path.name)
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

    def shards(self) -> list[tuple[Path, bytes]]:
        """See Source.shards."""
        paths = {header.path.name: header.path for header in self._files_by_name.values()}
        return [(paths[name], read_header_bytes(paths[name])[0]) for name in sorted(paths)]
