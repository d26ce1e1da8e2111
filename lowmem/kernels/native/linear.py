"""Linears on the CPU by our own kernels (native.py): what they need of a weight is checked here, once."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

from lowmem.checkpoint.packing import pack_rows, unpack_rows, unpack_zeros
from lowmem.config import BITS
from lowmem.kernels.native.library import TYPES, loaded, running, workspace
from lowmem.kernels.trial import PackedLinear

PLANES = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
"""Bytes of an activation's integer, by the dtype of the activations; fewer may do, see `activation_bits`."""
_PLANES_BY_BITS = {8: 1, 12: 4, 16: 2}  # 4: LM_PAIRED
ACTIVATION_BITS = tuple(_PLANES_BY_BITS)
"""Bits that the integer of a 16-bit activation can have."""
FEW_ROWS = 16
"""LM_FEW: rows of a decode step, at most."""
MOST_FEATURES = 1 << 30
"""Inputs, or outputs, of a linear: a group's length is an int in C."""
PANEL = 64
"""LM_PANEL: outputs that lie side by side in a panel."""
_ORDER_VALUES = 1 << 22  # weights that are unpacked at a time while rows are put in order


def activation_bits(bits: int) -> int:
    """Bits of the integer that a 16-bit activation becomes, by a weight's width: as few as are free.

    12 bits take three products of bytes for two inputs, where 16 take four and 8 take two (LM_PAIRED of
    csrc/lowmem.h). To the KL divergence of tiny-starchat on code 12 add 0.04 % at 4 bits; 8 add 8 % there,
    1.6 % at 3 bits, 0.3 % at 2, and many times what there is at 8 (`python -m lowmem.benchmarks.experiments.data.activations`).
    """
    return {8: 16, 4: 12}.get(bits, 8)


def planes_of(activation_bits: int) -> int:
    """`planes` of csrc/lowmem.h for integers of so many bits, one of ACTIVATION_BITS. Raises ValueError."""
    if activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"activations of {activation_bits} bits: there are {ACTIVATION_BITS}")
    return _PLANES_BY_BITS[activation_bits]


class Unsuitable(ValueError):
    """A weight that the library cannot multiply by; the text says why."""


class LmPacked(ctypes.Structure):
    """`lm_packed` of csrc/lowmem.h."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("qweight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scales_type", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
        ("panels", ctypes.c_int32),
    )


class LmDense(ctypes.Structure):
    """`lm_dense` of csrc/lowmem.h."""

    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("bias_type", ctypes.c_int32),
        ("weight_type", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Groups:
    """How a weight's groups lie, as the library can take them.

    size: inputs that share a scale, a multiple of 32 that divides `in`. index: the stored group of each, or
    None where they are in their order. order: the permutation of inputs that brings them together (position →
    input), or None.
    """

    size: int
    index: torch.Tensor | None
    order: torch.Tensor | None


def groups_of(g_idx: torch.Tensor, count: int) -> Groups:
    """What `g_idx` [in] with `count` stored groups comes to. Raises Unsuitable when no size of 32 or more
    fits.

    Groups of several sizes, as a last one that is not full, become groups of their greatest common divisor.
    """
    inputs = g_idx.numel()
    if inputs and count and inputs % count == 0:
        size = inputs // count
        numbers = torch.arange(count, dtype=g_idx.dtype)[:, None]
        if size % 32 == 0 and bool((g_idx.view(count, size) == numbers).all()):
            return Groups(size, None, None)
    size = _common_size(g_idx)
    if size % 32 == 0:
        return Groups(size, g_idx[::size].long(), None)
    order = torch.argsort(g_idx, stable=True)
    together = g_idx[order]
    size = _common_size(together)
    if size == 0 or size % 32:
        raise Unsuitable("its groups are no multiples of 32 inputs")
    return Groups(size, together[::size].long(), order)


def _common_size(g_idx: torch.Tensor) -> int:
    """The greatest size of equal blocks that lie in one group each."""
    edges = (g_idx[1:] != g_idx[:-1]).nonzero()[:, 0] + 1
    size = g_idx.numel()
    for edge in edges.tolist():
        size = math.gcd(size, edge)
        if size < 32:
            break
    return size


def rows_in_order(qweight: torch.Tensor, bits: int, order: torch.Tensor) -> torch.Tensor:
    """`qweight` [in * bits / 32, out] of the inputs in another order (position → input), in new memory."""
    result = torch.empty(qweight.shape, dtype=torch.int32)
    step = max(32, _ORDER_VALUES // max(1, order.numel()))
    for start in range(0, qweight.shape[1], step):
        columns = slice(start, start + step)
        result[:, columns] = pack_rows(unpack_rows(qweight[:, columns], bits)[order], bits)
    return result


class Packed:
    """A weight as the library reads it: pointers into tensors, which it keeps.

    qweight int32 [in * bits / 32, out], the groups of `group` inputs in their order; scales [in / group,
    out]; zeros uint8 of scales' shape, or None when all are 2^(bits - 1); bias [out] or None. Raises
    Unsuitable for anything that the library could not read safely.
    """

    def __init__(
        self,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        bits: int,
        group: int,
    ) -> None:
        if bits not in BITS:
            raise Unsuitable(f"{bits} bits")
        words, self.out_features = qweight.shape
        self.in_features = words * 32 // bits
        if group < 32 or group % 32 or self.in_features == 0 or self.in_features % group:
            raise Unsuitable(f"groups of {group} of {self.in_features} inputs")
        if self.out_features == 0 or max(self.in_features, self.out_features) > MOST_FEATURES:
            raise Unsuitable(f"{self.in_features} to {self.out_features} features")
        shape = (self.in_features // group, self.out_features)
        _check("qweight", qweight, (self.in_features // 32 * bits, self.out_features), torch.int32)
        _check("scales", scales, shape, *TYPES)
        if zeros is not None:
            _check("zeros", zeros, shape, torch.uint8)
        if bias is not None:
            _check("bias", bias, shape[1:], *TYPES)
        self.bits, self.group = bits, group
        self.planes = planes_of(activation_bits(bits))
        """As PLANES, of 16-bit activations."""
        self._tensors: tuple[torch.Tensor | None, ...] = (qweight, scales, zeros, bias)
        self._coming: list[torch.Tensor | None] = []
        self.struct = LmPacked(
            bits,
            group,
            self.in_features,
            self.out_features,
            qweight.data_ptr(),
            scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            None if bias is None else bias.data_ptr(),
            TYPES[scales.dtype],
            TYPES[torch.float32 if bias is None else bias.dtype],
            0,
        )
        self.address = ctypes.addressof(self.struct)
        """Of the `lm_packed`; it lives as long as this object."""

    def to_panels(self) -> None:
        """Have a copy of the weight in the order that is read fastest (lm_to_panels), in this very struct.

        What was read before is let go. The memory is the weight's once more, for whoever keeps its tensors.
        """
        qweight, scales, zeros, bias = self._tensors
        if self.struct.panels:
            return
        count = -(-self.out_features // PANEL)
        copies = [
            None if t is None else torch.empty((count, t.shape[0], PANEL), dtype=t.dtype)
            for t in (qweight, scales, zeros)
        ]
        addresses = [None if t is None else t.data_ptr() for t in copies]
        with running() as lib:
            lib.lm_to_panels(self.address, *addresses)
            after = LmPacked.from_buffer_copy(self.struct)
            after.qweight, after.scales, after.zeros = addresses
            after.panels = 1
            self._coming = copies
            # In one call: an interrupt finds the one layout or the other.
            ctypes.memmove(self.address, ctypes.addressof(after), ctypes.sizeof(after))
        self._tensors, self._coming = (*copies, bias), []

    @classmethod
    def of(cls, linear: PackedLinear) -> Packed:
        """Of a packed linear on the CPU whose inputs need no other order. Raises Unsuitable."""
        if any(
            t is not None and t.device.type != "cpu" for t in (linear.qweight, linear.scales, linear.bias)
        ):
            raise Unsuitable("its tensors are not on the CPU")
        groups = groups_of(linear.g_idx, linear.scales.shape[0])
        if groups.order is not None:
            raise Unsuitable("its inputs do not lie group by group")
        zeros = None if _symmetric(linear) else unpack_zeros(linear.qzeros, linear.bits, v2=linear.zeros_v2)
        scales = linear.scales
        if groups.index is not None:
            scales, zeros = scales[groups.index], None if zeros is None else zeros[groups.index]
        return cls(linear.qweight, scales, zeros, linear.bias, linear.bits, groups.size)


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise Unsuitable(f"its {name} is {tensor.dtype} {list(tensor.shape)}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.data_ptr() % tensor.itemsize:
        raise Unsuitable(f"its {name} is not one piece of aligned memory")


def _symmetric(linear: PackedLinear) -> bool:
    """All zero-points are 2^(bits - 1), told from a few words' comparison."""
    bits, middle = linear.bits, (1 << (linear.bits - 1)) - (0 if linear.zeros_v2 else 1)
    value = torch.full((32, 1), middle, dtype=torch.uint8)
    words = pack_rows(value, bits)[: 3 if bits == 3 else 1, 0]
    return bool((linear.qzeros.reshape(-1, len(words)) == words).all())


def takes(x: torch.Tensor) -> bool:
    """Whether `linear` takes these activations: on the CPU, of a known dtype, and no gradient asked for."""
    return x.dtype in TYPES and x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())


def linear(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """x [..., in] times the weight, plus bias: [..., out] in x's dtype. Raises ValueError for another x."""
    if not takes(x) or x.shape[-1] != packed.in_features:
        raise ValueError(f"{x.dtype} {list(x.shape)} on {x.device}, for {packed.in_features} inputs")
    x = x.contiguous()
    result = torch.empty((*x.shape[:-1], packed.out_features), dtype=x.dtype)
    rows, kind, planes = x.numel() // packed.in_features, TYPES[x.dtype], PLANES[x.dtype]
    if rows == 0:
        return result
    if planes == 2:
        planes = packed.planes
    native = loaded()
    lib, address = native.library, packed.address
    with native.lock:  # as `running`, without what a generator costs each of hundreds of linears
        native.set_threads()
        space = workspace(lib.lm_linear_workspace(address, rows, planes))
        lib.lm_linear(address, x.data_ptr(), kind, rows, planes, result.data_ptr(), kind, space)
    return result


def takes_dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether `dense_linear` takes these: `takes` x, and a weight [out, in] of 16 bits in one piece.

    bias [out] or None, of any of TYPES.
    """
    if not takes(x) or weight.dim() != 2 or not weight.numel() or x.dim() == 0:
        return False
    try:
        _check("weight", weight, (weight.shape[0], x.shape[-1]), torch.float16, torch.bfloat16)
        if bias is not None:
            _check("bias", bias, (weight.shape[0],), *TYPES)
    except Unsuitable:
        return False
    return True


def dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] times a float16 or bfloat16 weight [out, in], plus bias: [..., out] in x's dtype.

    All sums are in float32, and a row's do not depend on the others. Made for few rows: the weight is read
    again for every few of them. Raises ValueError for anything that `takes_dense` refuses.
    """
    if not takes_dense(x, weight, bias):
        raise ValueError(f"{x.dtype} {list(x.shape)} on {x.device}, for {weight.dtype} {list(weight.shape)}")
    x = x.contiguous()
    outputs, inputs = weight.shape
    result = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    rows, kind = x.numel() // inputs, TYPES[x.dtype]
    if rows == 0:
        return result
    dense = LmDense(
        inputs,
        outputs,
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        TYPES[torch.float32 if bias is None else bias.dtype],
        TYPES[weight.dtype],
    )
    with running() as lib:
        space = workspace(rows * (inputs + outputs) * 4)
        lib.lm_dense_linear(ctypes.addressof(dense), x.data_ptr(), kind, rows, result.data_ptr(), kind, space)
    return result
