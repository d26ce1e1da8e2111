"""The pickle of a torch.save archive, followed symbolically: nothing is unpickled, imported or called.

The opcodes that torch.save writes move plain values and names on a stack. The few names that build a tensor
become its description; any other is an error.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from typing import Any, TypeGuard

MAX_OPCODES = 1_000_000
"""Steps of a pickle; a tensor takes about 35."""
MAX_NAME = 1024
MAX_DIMS = 32
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
    # Dtypes without a storage class: written as bytes, with the dtype beside them.
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
"""Bytes of an element, by torch's name of its dtype."""
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
"""torch's storage classes → the dtype of their elements."""


@dataclass(frozen=True)
class BinTensor:
    """One tensor of a shard."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""
    dtype: str
    """As torch spells it, "float16"."""
    offset: int
    """In elements of its storage."""
    key: str
    """The storage is the zip entry `data/<key>`; several tensors may share it."""
    storage_nbytes: int
    """Bytes of the whole storage."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return _ITEMSIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return math.prod(self.shape) * self.itemsize


class NeedsCodeError(Exception):
    """The pickle holds something that only running it could build."""


@dataclass(frozen=True)
class _Name:
    """A name that the pickle would import, such as "torch.HalfStorage"; it is only compared."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """A storage; dtype None: bytes, whose dtype the tensor states."""

    dtype: str | None
    key: str
    nbytes: int


class _Mark:
    """The beginning of the arguments of TUPLE, SETITEMS and APPENDS on the stack."""


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Their argument is the value.
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")


def follow_pickle(data: bytes) -> Any:
    """The value of a pickle, with a BinTensor for each tensor.

    Understands protocols 2 and 3, as torch's restricted unpickler does. Raises NeedsCodeError, or ValueError,
    IndexError, KeyError, TypeError or OverflowError for a damaged pickle.
    """
    return _Machine().run(data)


class _Machine:
    """The part of the pickle machine that torch.save uses, on descriptions instead of objects."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """See `follow_pickle`."""
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
            stack.pop()  # attributes of a state dict (`_metadata`), which describe no tensor
            self.top(dict)
        elif name != "PROTO":
            raise NeedsCodeError(name)

    def above_mark(self) -> list[Any]:
        """Pop everything above the last mark, and the mark."""
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
            raise NeedsCodeError(f"{describe(self.stack[-1])} changed as a {kind.__name__}")
        return self.stack[-1]

    def set_items(self, flat: list[Any]) -> None:
        """Put alternating keys and values into the dictionary on top of the stack."""
        target = self.top(dict)
        if len(flat) % 2:
            raise ValueError("its pickle has a key without a value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) is not str or len(key) > MAX_NAME:  # numbers could be chosen to collide
                raise ValueError("its pickle has a dictionary whose keys are not all names of tensors")
            key.encode()  # raises ValueError for a lone surrogate
            target[key] = value


def _storage(value: Any) -> _Storage:
    """A persistent id ("storage", class, key, device, elements) → the storage; the device is ignored."""
    if type(value) is not tuple or len(value) != 5 or value[0] != "storage":
        raise NeedsCodeError("a persistent id that is not a storage")
    _, kind, key, device, numel = value
    if not isinstance(kind, _Name) or type(key) is not str or type(device) is not str:
        raise TypeError("its pickle has a malformed storage")
    if type(numel) is not int or not 0 <= numel < 2**63 or len(key) > MAX_NAME:
        raise ValueError("its pickle has a storage of impossible size")
    if kind.text == "torch.storage.UntypedStorage":
        return _Storage(None, key, numel)
    dtype = _STORAGES.get(kind.text.removeprefix("torch."))
    if dtype is None or not kind.text.startswith("torch."):
        raise NeedsCodeError(kind.text)
    return _Storage(dtype, key, numel * _ITEMSIZES[dtype])


def _result(function: Any, arguments: Any) -> Any:
    """The result of calling `function`, one of the four that are known."""
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
            raise NeedsCodeError(f"a tensor of {text}")
        return _tensor(storage, dtype, arguments[1:6], rest)
    if name == "torch._utils._rebuild_parameter" and len(arguments) == 3:
        if not isinstance(arguments[0], BinTensor):
            raise NeedsCodeError("a parameter that is not a tensor")
        return arguments[0]
    raise NeedsCodeError(name or "a call without a name")


def _tensor(
    storage: Any, dtype: str | None, described: tuple[Any, ...], metadata: tuple[Any, ...]
) -> BinTensor:
    """The tensor of (offset, shape, stride, requires_grad, hooks)."""
    offset, shape, stride, _requires_grad, hooks = described
    if not isinstance(storage, _Storage) or dtype is None:
        raise NeedsCodeError("a tensor without a storage")
    if hooks or any(metadata):  # metadata: a conjugated or negated view
        raise NeedsCodeError("a tensor with hooks or as a view")
    if not _are_counts(shape) or not _are_counts(stride) or not _are_counts((offset,)):
        raise ValueError("its pickle has a tensor whose shape is not made of whole numbers")
    if len(shape) != len(stride):
        raise ValueError(f"its pickle has a tensor of {len(shape)} dimensions and {len(stride)} strides")
    if math.prod(max(n, 1) for n in shape) >= 2**63:
        raise ValueError("its pickle has a tensor whose shape is larger than any file")
    return BinTensor(shape, stride, dtype, offset, storage.key, storage.nbytes)


def _are_counts(value: Any) -> TypeGuard[tuple[int, ...]]:
    """Whether this is a tuple of at most MAX_DIMS non-negative 64-bit integers."""
    return (
        type(value) is tuple
        and len(value) <= MAX_DIMS
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def describe(value: object) -> str:
    """The type of a value in the pickle."""
    if isinstance(value, BinTensor):
        return "Tensor"
    return value.text[:200] if isinstance(value, _Name) else type(value).__name__.lstrip("_")
