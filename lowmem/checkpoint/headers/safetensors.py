"""Headers of safetensors files, parsed and checked; needs no torch.

> 8 bytes: length n of the header, little-endian
> n bytes: {"name": {"dtype": "F16", "shape": [6400, 6144], "data_offsets": [begin, end]}, ...}
> the rest: the tensors' bytes, each at its offsets, without gaps or overlaps
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from lowmem.checkpoint.files.reading import parse_json
from lowmem.errors import SourceError

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # the format's own limit
MAX_NAME = 1024
MAX_DIMS = 32
DTYPE_NAMES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}
"""The format's spelling → torch's, and the bytes of one element."""
_AGAIN = "Download or copy it again"


@dataclass(frozen=True)
class StoredTensor:
    """Shape, dtype and place of a tensor in its file."""

    shape: tuple[int, ...]
    dtype_name: str
    """As torch spells it, "float16"."""
    begin: int
    """First byte, from the start of the file."""
    end: int
    """One past the last byte."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as a torch.dtype; imports torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype


@dataclass(frozen=True)
class SafetensorsHeader:
    """A checked header: every tensor is inside the file, and the file holds nothing else."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON bytes of the header and the file's size; raises SourceError when they cannot be read."""
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
                    f"{path.name} is not a safetensors file: its header would be {length} bytes long", _AGAIN
                )
            if 8 + length > size:
                raise SourceError(
                    f"{path.name} is truncated: header promises {8 + length} bytes, file has {size}", _AGAIN
                )
            return stream.read(length), size
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def read_header(path: Path) -> SafetensorsHeader:
    """Parse and check a file's header; nothing is allocated by its claims.

    Raises SourceError naming the file, and the tensor at fault, when the file is truncated or too long, or
    when offsets do not match shapes.
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
    known = DTYPE_NAMES.get(code) if isinstance(code, str) else None
    if known is None:
        raise fault(f"has dtype {str(code)[:40]!r}, which cannot be read")
    if not _is_list_of_counts(shape) or len(shape) > MAX_DIMS:
        raise fault("has a shape that is not a list of whole numbers")
    if not _is_list_of_counts(offsets) or len(offsets) != 2:
        raise fault("has data_offsets that are not two whole numbers")
    (dtype, itemsize), (begin, end) = known, offsets
    # torch cannot represent shapes of 2**63 elements or more, even of empty tensors.
    if math.prod(max(dim, 1) for dim in shape) >= 2**63 or end >= 2**63:
        raise fault("has a shape or offsets larger than any file")
    if end < begin or end - begin != math.prod(shape) * itemsize:
        raise fault(f"of shape {shape} and dtype {code} cannot lie at offsets {begin} to {end}")
    return StoredTensor(tuple(shape), dtype, start + begin, start + end)


def _is_list_of_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
