"""Headers of pickle shards (`pytorch_model*.bin`), off the zip directory and the pickle; needs no torch.

Nothing is unpickled, imported or called. The opcodes that torch.save writes move plain values and names
on a stack here; the few names that mean a tensor become its description, any other is an error:

> data.pkl:  {"h.0.w": _rebuild_tensor_v2(("storage", HalfStorage, "0", "cpu", 39321600), 0, (6400, 6144), …
> data/0:    the storage's bytes
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from lowmem.checkpoint.files.reading import one_line
from lowmem.errors import SourceError

# The pickle of a 10 GB shard is a few tens of KB, and so is its zip directory.
MAX_PICKLE = MAX_DIRECTORY = 8 * 2**20
MAX_OPCODES = 1_000_000  # a tensor takes about 35
MAX_NAME = 1024
MAX_DIMS = 32
# Storage classes by what torch calls their elements, and the bytes of one.
_ITEMSIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
    # Without a storage class of their own: written as bytes, and the dtype beside them.
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_AGAIN = "Download or copy it again"


@dataclass(frozen=True)
class BinTensor:
    """One tensor of a shard. stride and offset count elements of its storage, `data/<key>` in the zip.

    dtype: as torch spells it, "float16". storage_nbytes: bytes of the whole storage, which several tensors
    may share.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    offset: int
    key: str
    storage_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return math.prod(self.shape) * _ITEMSIZES[self.dtype]


@dataclass(frozen=True)
class Archive:
    """The zip directory of a shard: the entry of its pickle, and the bytes of every entry by name."""

    path: Path
    pickle: zipfile.ZipInfo
    sizes: Mapping[str, int]

    def storage_size(self, key: str) -> int | None:
        """Bytes of the storage `key`, or None if there is no such entry."""
        return self.sizes.get(f"{self.pickle.filename.removesuffix('data.pkl')}data/{key}")


class _Bounded(io.FileIO):
    """A file that gives no more at once than a directory or a pickle may be long."""

    def read(self, size: int | None = -1, /) -> bytes:
        rest = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        size = rest if size is None or size < 0 else min(size, rest)
        if size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory is larger than {MAX_DIRECTORY} bytes")
        return super().read(size) or b""


# What zipfile raises for a directory whose bytes are anyone's.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    ValueError,
    NotImplementedError,
    EOFError,
    RuntimeError,
    struct.error,
    OverflowError,
)


def check_archive(path: Path) -> Archive:
    """The checked directory of a zip that torch.save wrote.

    SourceError for a truncated or damaged archive, for compressed entries (torch never writes
    them; they could unpack to any size) and for the old format that cannot be mapped.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            magic = stream.read(4)
        if size == 0:
            raise SourceError(f"{path.name} is empty (0 bytes)", _AGAIN)
        if magic != b"PK\x03\x04":
            if magic[:1] == b"\x80":  # a bare pickle: torch before 1.6
                raise SourceError(
                    f"{path.name} is in torch's old format, which cannot be read piece by piece",
                    "Where it fits in memory, torch.load(weights_only=True) it and torch.save it again",
                )
            raise SourceError(f"{path.name} is not a file that torch.save wrote", _AGAIN)
        with _Bounded(path, "rb") as bounded, zipfile.ZipFile(bounded) as archive:
            entries = archive.infolist()
    except _ZIP_ERRORS as error:
        raise SourceError(f"{path.name} is truncated or damaged: {one_line(error)}", _AGAIN) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise SourceError(f"{path.name} has compressed entries, which torch.save does not write", _AGAIN)
        if entry.header_offset + entry.file_size > size:
            raise SourceError(
                f"{path.name} is truncated: entry {entry.filename[:200]!r} ends after the file", _AGAIN
            )
    pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
        raise SourceError(f"{path.name} is not a file that torch.save wrote", _AGAIN)
    return Archive(path, pickles[0], {entry.filename: entry.file_size for entry in entries})


def read_bin_header(path: Path) -> dict[str, BinTensor]:
    """Every tensor of a shard by name, off its zip directory and pickle; no storage is read.

    SourceError for anything but a flat dictionary of plain tensors that lie inside their storages.
    """
    archive = check_archive(path)
    try:
        with _Bounded(path, "rb") as stream, zipfile.ZipFile(stream) as zipped:
            data = zipped.read(archive.pickle)
    except _ZIP_ERRORS as error:
        raise SourceError(f"{path.name} is damaged: {one_line(error)}", _AGAIN) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        loaded = _Machine(archive).run(data)
    except _NeedsCode as error:
        raise SourceError(
            f"{path.name} needs code to be run to be read, or is damaged; nothing of it was run",
            "Use a safetensors copy of the checkpoint",
        ) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise SourceError(f"{path.name} is damaged: {one_line(error)}", _AGAIN) from error
    if not isinstance(loaded, dict):
        raise SourceError(f"{path.name} holds {_kind(loaded)}, not a dictionary of tensors")
    for name, tensor in loaded.items():
        if not isinstance(tensor, BinTensor):
            raise SourceError(f"{path.name}: entry {name[:200]!r} is {_kind(tensor)}, no tensor")
        if not _lies_in_file(tensor, archive):
            raise SourceError(
                f"{path.name}: tensor {name!r} of shape {list(tensor.shape)} is not in the file"
            )
    return loaded


def _lies_in_file(tensor: BinTensor, archive: Archive) -> bool:
    """Whether the storage is an entry of its size, and holds every element of the tensor, once each.

    A stride of 0 would let a few bytes claim any shape.
    """
    if archive.storage_size(tensor.key) != tensor.storage_nbytes or tensor.nbytes > tensor.storage_nbytes:
        return False
    if 0 in tensor.shape:
        return True
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    return (last + 1) * _ITEMSIZES[tensor.dtype] <= tensor.storage_nbytes


class _NeedsCode(Exception):
    """The pickle asks for something that only running it would give."""


@dataclass(frozen=True)
class _Name:
    """Something that the pickle would import, as "torch.HalfStorage"; it is only ever compared."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """A storage; dtype None: bytes, whose dtype the tensor says."""

    dtype: str | None
    key: str
    nbytes: int


class _Mark:
    """Where the arguments of TUPLE, SETITEMS and APPENDS begin on the stack."""


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Their argument is the value.
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")


class _Machine:
    """The part of the pickle machine that torch.save uses, on descriptions instead of objects.

    Protocols 2 and 3, as torch's own restricted unpickler: what it cannot load need not be described.
    """

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """The value of the pickle; _NeedsCode, or what Python raises for one that makes no sense."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > MAX_OPCODES:
                raise ValueError(f"its pickle has more than {MAX_OPCODES} steps")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("its pickle has no end")

    def step(self, name: str, argument: Any) -> None:
        """One opcode."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            if argument > MAX_OPCODES:
                raise ValueError(f"its pickle remembers {argument} values")
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_Mark)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise IndexError("its pickle takes more values than it has")
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self.above_mark()))
        elif name == "APPEND":
            value = stack.pop()
            self.top(list).append(value)
        elif name == "APPENDS":
            values = self.above_mark()
            self.top(list).extend(values)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self.set_items([key, value])
        elif name == "SETITEMS":
            self.set_items(self.above_mark())
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(_Name(f"{module}.{attribute}"))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_result(function, arguments))
        elif name == "BUILD":
            stack.pop()  # the attributes of a state dict (its `_metadata`), which say nothing of a tensor
            self.top(dict)
        elif name != "PROTO":
            raise _NeedsCode(name)

    def above_mark(self) -> list[Any]:
        """Take everything above the last mark, and the mark."""
        stack = self.stack
        start = len(stack) - 1
        while stack[start] is not _Mark:
            start -= 1
            if start < 0:
                raise ValueError("its pickle has no mark")
        values = stack[start + 1 :]
        del stack[start:]
        return values

    def top(self, kind: type) -> Any:
        """The value on top of the stack, which must be of `kind`."""
        if type(self.stack[-1]) is not kind:
            raise _NeedsCode(f"{_kind(self.stack[-1])} changed as a {kind.__name__}")
        return self.stack[-1]

    def set_items(self, flat: list[Any]) -> None:
        """Put keys and values, one after the other, into the dictionary on top of the stack."""
        target = self.top(dict)
        if len(flat) % 2:
            raise ValueError("its pickle has a key without a value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) is not str or len(key) > MAX_NAME:  # numbers could be chosen to collide
                raise SourceError(
                    f"{self.archive.path.name} holds a dictionary whose keys are not all names of tensors"
                )
            key.encode()  # a lone surrogate is no name: ValueError
            target[key] = value


def _storage(value: Any) -> _Storage:
    """A persistent id ("storage", class, key, device, elements) → the storage; the device is only a wish."""
    if type(value) is not tuple or len(value) != 5 or value[0] != "storage":
        raise _NeedsCode("a persistent id that is no storage")
    _, kind, key, device, numel = value
    if not isinstance(kind, _Name) or type(key) is not str or type(device) is not str:
        raise TypeError("its pickle has a malformed storage")
    if type(numel) is not int or not 0 <= numel < 2**63 or len(key) > MAX_NAME:
        raise ValueError("its pickle has a storage of impossible size")
    if kind.text == "torch.storage.UntypedStorage":
        return _Storage(None, key, numel)
    dtype = _STORAGES.get(kind.text.removeprefix("torch."))
    if dtype is None or not kind.text.startswith("torch."):
        raise _NeedsCode(kind.text)
    return _Storage(dtype, key, numel * _ITEMSIZES[dtype])


def _result(function: Any, arguments: Any) -> Any:
    """What calling `function` would give, of the four functions that are known."""
    name = function.text if isinstance(function, _Name) else ""
    if type(arguments) is not tuple:
        raise TypeError("its pickle calls without a tuple of arguments")
    if name == "collections.OrderedDict" and not arguments:
        return {}
    if name == "torch._utils._rebuild_tensor_v2" and len(arguments) in (6, 7):
        storage, rest = arguments[0], arguments[6:]
        dtype = storage.dtype if isinstance(storage, _Storage) else None
        return _tensor(storage, dtype, arguments[1:6], rest)
    if name == "torch._utils._rebuild_tensor_v3" and len(arguments) in (7, 8):
        storage, kind, rest = arguments[0], arguments[6], arguments[7:]
        text = kind.text if isinstance(kind, _Name) else ""
        dtype = text.removeprefix("torch.")
        if not text.startswith("torch.") or dtype not in _ITEMSIZES:
            raise _NeedsCode(f"a tensor of {text}")
        return _tensor(storage, dtype, arguments[1:6], rest)
    if name == "torch._utils._rebuild_parameter" and len(arguments) == 3:
        if not isinstance(arguments[0], BinTensor):
            raise _NeedsCode("a parameter of no tensor")
        return arguments[0]
    raise _NeedsCode(name or "a call of no name")


def _tensor(
    storage: Any, dtype: str | None, described: tuple[Any, ...], metadata: tuple[Any, ...]
) -> BinTensor:
    """The tensor of (offset, shape, stride, requires_grad, hooks)."""
    offset, shape, stride, _requires_grad, hooks = described
    if not isinstance(storage, _Storage) or dtype is None:
        raise _NeedsCode("a tensor of no storage")
    if hooks or any(metadata):  # metadata: a conjugated or negated view
        raise _NeedsCode("a tensor with hooks or as a view")
    if not _are_counts(shape) or not _are_counts(stride) or not _are_counts((offset,)):
        raise ValueError("its pickle has a tensor whose shape is not of whole numbers")
    if len(shape) != len(stride):
        raise ValueError(f"its pickle has a tensor of {len(shape)} dimensions and {len(stride)} strides")
    if math.prod(max(n, 1) for n in shape) >= 2**63:
        raise ValueError("its pickle has a tensor whose shape is beyond any file")
    return BinTensor(shape, stride, dtype, offset, storage.key, storage.nbytes)


def _are_counts(value: Any) -> TypeGuard[tuple[int, ...]]:
    """A tuple of whole numbers that torch could name, no more than dimensions."""
    return (
        type(value) is tuple
        and len(value) <= MAX_DIMS
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def _kind(value: object) -> str:
    """What a value of the pickle is, in a word."""
    if isinstance(value, BinTensor):
        return "Tensor"
    return value.text[:200] if isinstance(value, _Name) else type(value).__name__.lstrip("_")
