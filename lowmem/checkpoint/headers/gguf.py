"""GGUF headers, parsed and checked before any other reader opens the file.

> "GGUF", version u32, tensor count u64, key count u64
> keys: name, type, value        (a string is a u64 length and its bytes)
> tensors: name, dimensions (the fastest first), ggml type, offset in the data
> padding to general.alignment (32), then the data
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lowmem.errors import SourceError

MAGIC = b"GGUF"
MAX_HEADER = 512 * 2**20
MAX_ARRAY = 1_000_000
"""Elements of an array; the largest vocabularies have 260,000 tokens and 515,000 merges."""
MAX_ELEMENTS = 2_500_000
"""Elements of all arrays: other readers create an object for each."""
MAX_KEYS = 65_536
MAX_TENSORS = 200_000
MAX_KEY = 1024
MAX_STRING = 16 * 2**20
MAX_DIMS = 4
# Scalar value types: struct format by type number.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Tensor types by number: name, values in a block, bytes of a block. The `gguf` package has them too, but
# imports numpy; it is only used for newer types.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}
_AGAIN = "Download or copy it again"


@dataclass(frozen=True)
class GgufTensor:
    """A stored tensor."""

    name: str
    shape: tuple[int, ...]
    """In torch's order."""
    type_name: str
    """As ggml spells it ("Q4_1")."""
    begin: int
    """First byte, from the start of the file."""
    nbytes: int
    row_bytes: int
    """Bytes of one run along the last axis."""


@dataclass(frozen=True)
class GgufHeader:
    """A checked header."""

    path: Path
    values: Mapping[str, int | float | bool | str]
    """Keys with scalar or string values; arrays are skipped."""
    tensors: Mapping[str, GgufTensor]
    data_start: int


class _Reader:
    """Sequential reads within the file and the limits."""

    def __init__(self, stream: BinaryIO, file: str, size: int) -> None:
        self.stream, self.file, self.size = stream, file, size
        self.position = 0
        self.elements = 0

    def fault(self, what: str) -> SourceError:
        return SourceError(f"{self.file} {what}", _AGAIN)

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise self.fault(f"is truncated: its header continues after its {self.size} bytes")
        if self.position + count > MAX_HEADER:
            raise self.fault(f"has a header of more than {MAX_HEADER} bytes")
        data = self.stream.read(count)
        if len(data) != count:
            raise self.fault("is truncated: its header cannot be read to the end")
        self.position += count
        return data

    def number(self, code: str) -> int:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return int(value)

    def string(self, what: str) -> str:
        length = self.number("Q")
        if length > MAX_STRING:
            raise self.fault(f"has {what} of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fault(f"has {what} that is not UTF-8") from error

    def value(self, key: str) -> int | float | bool | str | None:
        """A key's value; None for an array, which is skipped."""
        kind = self.number("I")
        if kind == _STRING:
            return self.string(f"a value of {key!r}")
        if kind in _SCALARS:
            (scalar,) = struct.unpack("<" + _SCALARS[kind], self.take(struct.calcsize("<" + _SCALARS[kind])))
            return scalar  # type: ignore[no-any-return]
        if kind != _ARRAY:
            raise self.fault(f"has a value of unknown type {kind} at {key!r}")
        element, count = self.number("I"), self.number("Q")
        if count > MAX_ARRAY:
            raise self.fault(f"has an array of {count} elements at {key!r}")
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            raise self.fault(f"has arrays of more than {MAX_ELEMENTS} elements in all")
        if element == _STRING:
            for _ in range(count):
                self.string(f"a value of {key!r}")
        elif element in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[element]))
        else:
            raise self.fault(f"has an array of unknown type {element} at {key!r}")
        return None


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check a GGUF header (versions 2 and 3, little-endian).

    Raises SourceError for a wrong magic or version, counts and lengths that the file cannot hold, an unknown
    tensor type, and tensors that overlap or end after the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            return _parse(_Reader(stream, path.name, size), path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(reader: _Reader, path: Path) -> GgufHeader:
    size = reader.size
    if size == 0:
        raise reader.fault("is empty (0 bytes)")
    if size < 24:
        raise reader.fault(f"is truncated: a file of {size} bytes has no header")
    if reader.take(4) != MAGIC:
        raise reader.fault("is not a GGUF file: it does not begin with 'GGUF'")
    version = reader.number("I")
    if version not in (2, 3):
        raise reader.fault(f"is GGUF version {version}; versions 2 and 3, little-endian, can be read")
    tensor_count, key_count = reader.number("Q"), reader.number("Q")
    # The smallest description of a tensor (8 + 4 + 4 + 8) and the smallest key (8 + 4 + 1).
    if tensor_count > size // 24 or key_count > size // 13:
        raise reader.fault(f"claims {tensor_count} tensors and {key_count} keys in {size} bytes")
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise reader.fault(f"has {tensor_count} tensors and {key_count} keys, which no model has")
    values: dict[str, int | float | bool | str] = {}
    seen: set[str] = set()
    for _ in range(key_count):
        key = reader.string("a key")
        if len(key) > MAX_KEY:
            raise reader.fault(f"has a key of {len(key)} characters")
        if key in seen:
            raise reader.fault(f"has the key {key!r} twice")
        seen.add(key)
        value = reader.value(key)
        if value is not None:
            values[key] = value
    described = [_describe(reader) for _ in range(tensor_count)]
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise reader.fault(f"has an alignment of {alignment}, which is not a power of two")
    data_start = -(-reader.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_number, offset in described:
        if name in tensors:
            raise reader.fault(f"has the tensor {name!r} twice")
        tensors[name] = _place(reader, name, shape, type_number, data_start + offset)
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.nbytes)):
        if tensor.begin < end:
            raise reader.fault(f"is damaged: tensor {tensor.name!r} overlaps the one before it")
        end = tensor.begin + tensor.nbytes
    if end > size:
        raise reader.fault(f"is truncated: header promises {end} bytes, file has {size}")
    return GgufHeader(path, values, tensors, data_start)


def _describe(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.string("a tensor's name")
    if len(name) > 1024:
        raise reader.fault(f"has a tensor name of {len(name)} characters")
    dims = reader.number("I")
    if not 0 < dims <= MAX_DIMS:
        raise reader.fault(f"is damaged: tensor {name!r} has {dims} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dims))[::-1]
    return name, shape, reader.number("I"), reader.number("Q")


def _place(reader: _Reader, name: str, shape: tuple[int, ...], type_number: int, begin: int) -> GgufTensor:
    kind, per_block, block_bytes = _type(reader, name, type_number)
    if 0 in shape or shape[-1] % per_block:
        raise reader.fault(f"is damaged: tensor {name!r} of type {kind} has shape {list(shape)}")
    row_bytes = shape[-1] // per_block * block_bytes
    return GgufTensor(name, shape, kind, begin, math.prod(shape[:-1]) * row_bytes, row_bytes)


def _type(reader: _Reader, tensor: str, number: int) -> tuple[str, int, int]:
    """A tensor type: its name, values in a block, bytes of a block."""
    if number in TYPES:
        return TYPES[number]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
        return (kind.name, *GGML_QUANT_SIZES[kind])
    except (ValueError, KeyError) as error:
        raise reader.fault(f"has tensor {tensor!r} of unknown ggml type {number}") from error


def check_whole_model(header: GgufHeader) -> None:
    """Raise SourceError for a part of a split model, and for a file without an architecture or tensors."""
    file = header.path.name
    if not isinstance(header.values.get("general.architecture"), str):
        raise SourceError(f"{file} does not name its architecture, so it is not a model")
    parts = header.values.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise SourceError(f"{file} is one of {parts} parts", "Join them first: llama-gguf-split --merge")
    if not header.tensors:
        raise SourceError(f"{file} holds no tensors (a vocabulary only)")


def is_gguf(path: Path) -> bool:
    """Whether the file begins with GGUF's magic, whatever its name."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False
