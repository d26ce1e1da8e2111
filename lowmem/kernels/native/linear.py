"""Linears on the CPU by lowmem's own kernels. Weights are checked here once, when they are prepared."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

from lowmem.checkpoint.dequantize import PackedLinear
from lowmem.checkpoint.packing import all_middle, unpack_zeros
from lowmem.kernels.contract import Unsuitable
from lowmem.kernels.native.header import PAIRED, TILE_OUTPUTS, WIDTHS, LmDense, LmMatrix, LmPacked
from lowmem.kernels.native.library import TYPES, loaded, running, workspace

PLANES = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
"""Bytes of an activation's integer, by the dtype of the activations. 16-bit ones may take fewer: see
`activation_bits`."""
_PLANES_BY_BITS = {8: 1, 12: PAIRED, 16: 2}
ACTIVATION_BITS = tuple(_PLANES_BY_BITS)
"""Widths that the integer of a 16-bit activation can have."""
MOST_FEATURES = 1 << 30
"""Inputs or outputs of a linear, at most: C keeps the length of a group in an int."""


def activation_bits(bits: int) -> int:
    """Bits of a 16-bit activation's integer, by the weight's width: the fewest that cost no quality.

    Two inputs take two products of bytes with 8 bits, three with 12 (LM_PAIRED of csrc/linear/linear.h) and
    four with 16. To the KL divergence of the 4-bit tiny-starchat on code, 12 bits add 0.04 % and 8 bits 8 %.
    8 bits add 1.6 % to the 3-bit, 0.3 % to the 2-bit and 29 % to the 5-bit version, and many times its
    divergence to the 8-bit version. Measured with `python -m lowmem.benchmarks.experiments.activation_bits`.
    12 bits need two weights in a byte, so that they do not exist for more than 4 bits.
    """
    return 16 if bits > 4 else 12 if bits == 4 else 8


def planes_of(activation_bits: int) -> int:
    """`planes` of csrc/linear/linear.h for one of ACTIVATION_BITS. Raises ValueError for any other width."""
    if activation_bits not in ACTIVATION_BITS:
        raise ValueError(
            f"activations of {activation_bits} bits are not supported, only of {ACTIVATION_BITS}"
        )
    return _PLANES_BY_BITS[activation_bits]


@dataclass(frozen=True)
class Groups:
    """The groups of a weight, as passed to the C library."""

    size: int
    """Inputs that share a scale: a multiple of 32 that divides `in`."""
    index: torch.Tensor | None
    """The stored group of each group; None: they are in order."""
    order: torch.Tensor | None
    """The permutation of inputs (position → input) that brings each group together; None: none is needed."""


def groups_of(g_idx: torch.Tensor, count: int) -> Groups:
    """The groups that `g_idx` [in] describes, of `count` stored ones.

    Groups of different sizes, such as a last one that is not full, become groups of their greatest common
    divisor. Raises Unsuitable unless that is a multiple of 32.
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
        raise Unsuitable("its groups are not multiples of 32 inputs")
    return Groups(size, together[::size].long(), order)


def _common_size(g_idx: torch.Tensor) -> int:
    """The largest size of equal blocks of inputs that each belong to one group."""
    edges = (g_idx[1:] != g_idx[:-1]).nonzero()[:, 0] + 1
    size = g_idx.numel()
    for edge in edges.tolist():
        size = math.gcd(size, edge)
        if size < 32:
            break
    return size


class Packed:
    """A weight as the library reads it: pointers into tensors, which this object keeps alive.

    qweight: int32 [in * bits / 32, out], with its groups of `group` inputs in order. scales: [in / group,
    out]. zeros: uint8 of the same shape; None: all are 2^(bits - 1). bias: [out] or None. Raises Unsuitable
    for anything that the library cannot read safely.
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
        if bits not in WIDTHS:
            raise Unsuitable(f"weights of {bits} bits are not supported")
        words, self.out_features = qweight.shape
        self.in_features = words * 32 // bits
        if group < 32 or group % 32 or self.in_features == 0 or self.in_features % group:
            raise Unsuitable(f"groups of {group} of {self.in_features} inputs are not supported")
        if self.out_features == 0 or max(self.in_features, self.out_features) > MOST_FEATURES:
            raise Unsuitable(
                f"a linear of {self.in_features} to {self.out_features} features is not supported"
            )
        shape = (self.in_features // group, self.out_features)
        _check("qweight", qweight, (self.in_features // 32 * bits, self.out_features), torch.int32)
        _check("scales", scales, shape, *TYPES)
        if zeros is not None:
            _check("zeros", zeros, shape, torch.uint8)
        if bias is not None:
            _check("bias", bias, shape[1:], *TYPES)
        self.bits, self.group = bits, group
        self.planes = planes_of(activation_bits(bits))
        """Like PLANES, for 16-bit activations."""
        self._tensors: tuple[torch.Tensor | None, ...] = (qweight, scales, zeros, bias)
        self._next: list[torch.Tensor | None] = []
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
        """Of the `lm_packed`, which lives as long as this object."""

    def to_tiled(self, *, from_planes: bool = False) -> None:
        """Copy the weight into the tiled layout, which is read fastest, and use the copy from now on.

        from_planes: the weight is of 3 bits in planes, which only this copy makes usable.

        `struct` keeps its address. References to the old tensors are dropped: until the caller drops its own,
        the weight is in memory twice.
        """
        qweight, scales, zeros, bias = self._tensors
        if self.struct.tiled:
            return
        count = -(-self.out_features // TILE_OUTPUTS)
        copies = [
            None if t is None else torch.empty((count, t.shape[0], TILE_OUTPUTS), dtype=t.dtype)
            for t in (qweight, scales, zeros)
        ]
        addresses = [None if t is None else t.data_ptr() for t in copies]
        with running() as lib:
            tile = lib.lm_tile_planes if from_planes else lib.lm_tile_weight
            tile(self.address, *addresses)
            after = LmPacked.from_buffer_copy(self.struct)
            after.qweight, after.scales, after.zeros = addresses
            after.tiled = 1
            self._next = copies
            # In one call, so that an interrupt leaves one layout or the other.
            ctypes.memmove(self.address, ctypes.addressof(after), ctypes.sizeof(after))
        self._tensors, self._next = (*copies, bias), []

    @classmethod
    def of(cls, linear: PackedLinear) -> Packed:
        """Pack the weight of a quantized linear whose tensors are on the CPU.

        The library reads 3 bits as one stream: those in planes (layout gptq_p) are copied, into the tiled
        layout. Raises Unsuitable if the kernel does not support the tensors, for example if `g_idx` requires
        reordering the inputs.
        """
        if any(
            t is not None and t.device.type != "cpu" for t in (linear.qweight, linear.scales, linear.bias)
        ):
            raise Unsuitable("its tensors are not on the CPU")
        groups = groups_of(linear.g_idx, linear.scales.shape[0])
        if groups.order is not None:
            raise Unsuitable("its inputs are not in the order of their groups")
        layout = linear.format.layout
        symmetric = all_middle(linear.qzeros, linear.bits, layout)
        zeros = None if symmetric else unpack_zeros(linear.qzeros, linear.bits, layout)
        scales = linear.scales
        if groups.index is not None:
            scales, zeros = scales[groups.index], None if zeros is None else zeros[groups.index]
        packed = cls(linear.qweight, scales, zeros, linear.bias, linear.bits, groups.size)
        if linear.format.planar and linear.bits == 3:
            packed.to_tiled(from_planes=True)
        return packed


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise Unsuitable(f"its {name} is {tensor.dtype} {list(tensor.shape)}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.data_ptr() % tensor.itemsize:
        raise Unsuitable(f"its {name} is not contiguous, aligned memory on the CPU")


def takes(x: torch.Tensor) -> bool:
    """Whether `linear` supports these activations: on the CPU, of a dtype in TYPES, without gradients."""
    return x.dtype in TYPES and x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())


def linear(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """Multiply x [..., in] by the weight and add the bias; returns [..., out] in x's dtype.

    Raises ValueError if `takes(x)` is False or x's last dimension is not `in_features`.
    """
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
    lib, address, source, out = native.library, packed.address, native.x, native.y
    with native.lock:  # like `running`, without the cost of a generator for each of hundreds of linears
        native.set_threads()
        source.values, source.rows, source.stride, source.type = x.data_ptr(), rows, packed.in_features, kind
        out.values, out.rows, out.stride, out.type = result.data_ptr(), rows, packed.out_features, kind
        space = workspace(lib.lm_linear_workspace(address, rows, planes))
        lib.lm_linear(address, ctypes.byref(source), planes, ctypes.byref(out), space)
    return result


def takes_dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether `dense_linear` supports these: x as in `takes`, and a contiguous 16-bit weight [out, in].

    bias: [out] of a dtype in TYPES, or None.
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
    """Multiply x [..., in] by a float16 or bfloat16 weight [out, in] and add the bias.

    Returns [..., out] in x's dtype. Sums are float32, and a row's result does not depend on the other rows.
    Use it for few rows: the weight is read again for every four rows. Raises ValueError if `takes_dense` is
    False for the tensors.
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
    source, out = LmMatrix(x.data_ptr(), rows, inputs, kind), LmMatrix(result.data_ptr(), rows, outputs, kind)
    with running() as lib:
        space = workspace(rows * (inputs + outputs) * 4)
        lib.lm_dense_linear(ctypes.byref(dense), ctypes.byref(source), ctypes.byref(out), space)
    return result
