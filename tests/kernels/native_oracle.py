"""The rule of csrc/linear/linear.h in numpy, to the last bit, and direct calls of the library.

Integer sums are exact in float64 (below 2^53); every other step is one float32 operation or `fma32`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lowmem.checkpoint.packing import pack_rows
from lowmem.kernels.native import library as native
from lowmem.kernels.native import linear as native_linear
from lowmem.kernels.native.header import PAIRED, WIDTHS, LmDense, LmMatrix, LmPacked

ISAS = native.isa_names() if native.available() else ("portable C",)
"""Every instruction set of the library; this CPU may lack some."""
LIMITS = {1: 127, 2: 32639, 3: 8355711, PAIRED: 30448}
"""L by the number of planes."""


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c, rounded once.

    The product of two float32 is exact in float64. The sum is rounded there to odd (its last bit is set if
    anything was cut off); rounding that to float32 gives the same as rounding the exact sum.
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    back = total - product
    cut = (product - (total - back)) + (c - back)
    bits = np.atleast_1d(total).view(np.int64).reshape(total.shape).copy()
    even = (bits & 1 == 0) & (cut != 0) & np.isfinite(total)
    bits[even] += np.where((cut > 0) == (total > 0), 1, -1)[even]  # one step towards what was cut off
    with np.errstate(over="ignore"):
        result: np.ndarray = bits.view(np.float64).astype(np.float32)
    return result


@dataclass(frozen=True)
class Weight:
    """A GPTQ weight as integers: q uint8 [in, out], scales [in / group, out], zeros uint8 of that shape."""

    bits: int
    group: int
    q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def packed(self) -> native_linear.Packed:
        """As the library reads it."""
        packed = native_linear.Packed(
            pack_rows(self.q, self.bits), self.scales, self.zeros, self.bias, self.bits, self.group
        )
        packed.planes = 2  # the rule is the same for any number of rows
        return packed

    def exact(self) -> torch.Tensor:
        """float64 [in, out]."""
        zeros = torch.full(self.scales.shape, 1 << (self.bits - 1)) if self.zeros is None else self.zeros
        wide = [t.double().repeat_interleave(self.group, 0) for t in (zeros, self.scales)]
        return (self.q.double() - wide[0]) * wide[1]


def random_weight(
    bits: int,
    group: int,
    inputs: int,
    outputs: int,
    *,
    zeros: bool = False,
    bias: torch.dtype | None = None,
    scales: torch.dtype = torch.float16,
    seed: int = 0,
) -> Weight:
    """Integers, zero-points and scales at random; group -1 is one group."""
    rng = torch.Generator().manual_seed(seed)
    group = inputs if group == -1 else group
    shape = (inputs // group, outputs)
    return Weight(
        bits,
        group,
        torch.randint(0, 1 << bits, (inputs, outputs), generator=rng, dtype=torch.uint8),
        (torch.rand(shape, generator=rng) * 0.02 + 0.001).to(scales),
        torch.randint(0, 1 << bits, shape, generator=rng, dtype=torch.uint8) if zeros else None,
        None if bias is None else torch.randn(outputs, generator=rng).to(bias),
    )


def kernel_group(group: int) -> int:
    """The group in which activations are quantized."""
    return group if group <= 256 else next(width for width in (256, 128, 64, 32) if group % width == 0)


def quantized(x: np.ndarray, planes: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, inputs of a group], finite → (q int64 of its shape, scale float32 [rows])."""
    limit = np.float32(LIMITS[planes])
    largest = np.abs(x).max(axis=1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = limit / largest
    inverse[~np.isfinite(inverse)] = 0
    q = np.rint(x * inverse[:, None]).clip(-limit, limit).astype(np.int64)
    return q, largest / limit


def paired(q: np.ndarray) -> np.ndarray:
    """int64 [rows, inputs] in LM_PAIRED's form. A pair must be two upper digits and a lower one."""
    even, odd = q[:, ::2], (q[:, 1::2] + 8) // 16 * 16
    rest = odd // 16 % 16
    even = rest + (even - rest + 8) // 16 * 16
    lower = (even + 128) % 256 - 128
    upper = np.stack([even - lower, odd - 16 * lower])
    assert not (upper % 256).any() and (upper // 256).min() >= -128 and (upper // 256).max() <= 127
    return np.stack([even, odd], axis=2).reshape(q.shape)


def rule(x: torch.Tensor, weight: Weight, planes: int) -> torch.Tensor:
    """The product by the rule of linear.h: float32 [rows, out], for finite x [rows, in]."""
    values = x.float().numpy()
    scales = weight.scales.float().numpy()
    integers = weight.q.numpy().astype(np.float64)
    y = np.zeros((x.shape[0], weight.q.shape[1]), np.float32)
    width = kernel_group(weight.group)
    if planes == PAIRED and weight.bits > 4:
        planes = 2
    for start in range(0, x.shape[1], width):
        row = start // weight.group
        q, scale = quantized(values[:, start : start + width], planes)
        if planes == PAIRED:
            q = paired(q)
        zero = (
            1 << (weight.bits - 1) if weight.zeros is None else weight.zeros[row].numpy().astype(np.float64)
        )
        w = integers[start : start + width] - zero
        digits = []
        for _ in range({PAIRED: 2}.get(planes, planes) - 1):
            low = (q + 128) % 256 - 128
            digits.append(low)
            q = (q - low) // 256
        sums = [(digit.astype(np.float64) @ w).astype(np.int64) for digit in (*digits, q)]
        low_sums = sums[0] + 256 * sums[1] if planes > 1 else sums[0]
        assert np.abs(low_sums).max() < 1 << 31
        c = low_sums.astype(np.float32)
        if planes == 3:
            c = fma32(sums[2].astype(np.float32), np.float32(65536), c)
        y = fma32(c, scale[:, None] * scales[row], y)
    if weight.bias is not None:
        y += weight.bias.float().numpy()
    return torch.from_numpy(y)


@contextlib.contextmanager
def using(isa: str) -> Iterator[bool]:
    """Select an instruction set for a while; False if the CPU lacks it."""
    library, before = native.library(), native.isa_name()
    can = bool(library.lm_use_isa(isa.encode()))
    try:
        yield can
    finally:
        library.lm_use_isa(before.encode())


def call(struct: LmPacked, x: LmMatrix, planes: int, y: LmMatrix) -> None:
    """lm_linear."""
    with native.running() as library:
        space = native.workspace(library.lm_linear_workspace(ctypes.byref(struct), x.rows, planes))
        library.lm_linear(ctypes.byref(struct), ctypes.byref(x), planes, ctypes.byref(y), space)


def matrix(address: int, rows: int, columns: int, dtype: torch.dtype) -> LmMatrix:
    """A matrix without gaps."""
    return LmMatrix(address, rows, columns, native.TYPES[dtype])


def multiply(
    packed: native_linear.Packed, x: torch.Tensor, planes: int, out: torch.dtype = torch.float32
) -> torch.Tensor:
    """x [rows, in] times the weight with `planes` planes, as `out`."""
    rows, result = x.shape[0], torch.full((x.shape[0], packed.out_features), -77.0, dtype=out)
    source = matrix(x.data_ptr(), rows, packed.in_features, x.dtype)
    call(packed.struct, source, planes, matrix(result.data_ptr(), rows, packed.out_features, out))
    return result


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits are equal; any NaN equals any other."""
    kind = torch.int32 if a.dtype is torch.float32 else torch.int16
    return a.dtype is b.dtype and bool(((a.view(kind) == b.view(kind)) | (a.isnan() & b.isnan())).all())


def dense(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """lm_dense_linear: x [rows, in] times a bfloat16 weight [out, in], in x's dtype."""
    outputs, inputs = weight.shape
    struct = LmDense(
        inputs,
        outputs,
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        0 if bias is None else native.TYPES[bias.dtype],
        native.TYPES[weight.dtype],
    )
    result = torch.full((x.shape[0], outputs), -77.0, dtype=x.dtype)
    dense_call(struct, x.data_ptr(), x.dtype, x.shape[0], result.data_ptr())
    return result


def dense_call(struct: LmDense, x: int, dtype: torch.dtype, rows: int, out: int) -> None:
    """lm_dense_linear on addresses."""
    source, result = matrix(x, rows, struct.inputs, dtype), matrix(out, rows, struct.outputs, dtype)
    with native.running() as library:
        space = native.workspace(4 * rows * (struct.inputs + struct.outputs))
        library.lm_dense_linear(ctypes.byref(struct), ctypes.byref(source), ctypes.byref(result), space)


class Fenced:
    """Memory that ends at a page without access."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._maps: list[mmap.mmap] = []

    def copy(self, tensor: torch.Tensor) -> int:
        """Copy a tensor, its last byte before the fence; the address of the copy."""
        size = tensor.numel() * tensor.itemsize
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        room = mmap.mmap(-1, whole + mmap.PAGESIZE)
        self._maps.append(room)
        start = ctypes.addressof(ctypes.c_char.from_buffer(room))
        failed = self._libc.mprotect(ctypes.c_void_p(start + whole), ctypes.c_size_t(mmap.PAGESIZE), 0)
        assert not failed, ctypes.get_errno()
        ctypes.memmove(start + whole - size, tensor.data_ptr(), size)
        return start + whole - size


def run_fenced() -> None:
    """Run every kernel on tensors that end at a fence: reading past it crashes. For a process of its own."""
    torch.set_num_threads(1)
    for isa in ISAS:
        with using(isa) as can:
            if can:
                for bits in WIDTHS:
                    for outputs in (8, 24, 40, 129, 200):
                        _run_fenced_packed(bits, outputs)
                _run_fenced_dense()
        print(isa, "stayed inside" if can else "not supported")


def _run_fenced_packed(bits: int, outputs: int) -> None:
    for kind in native.TYPES:
        weight = random_weight(bits, 32, 64, outputs, zeros=True, bias=kind, scales=kind)
        assert weight.zeros is not None and weight.bias is not None
        for rows, planes in ((1, 1), (3, 2), (2, 3), (35, 2), (3, PAIRED), (35, PAIRED)):
            fenced = Fenced()
            x = torch.randn(rows, 64).to(kind)
            struct = LmPacked(
                bits,
                32,
                64,
                outputs,
                fenced.copy(pack_rows(weight.q, bits)),
                fenced.copy(weight.scales),
                fenced.copy(weight.zeros),
                fenced.copy(weight.bias),
                native.TYPES[kind],
                native.TYPES[kind],
            )
            out = fenced.copy(torch.zeros(rows, outputs, dtype=kind))
            source = matrix(fenced.copy(x), rows, 64, kind)
            call(struct, source, planes, matrix(out, rows, outputs, kind))


def _run_fenced_dense() -> None:
    for inputs, outputs in ((33, 7), (64, 24), (100, 13), (7, 3)):
        for rows in (1, 2, 3, 4, 5, 8, 11):
            fenced = Fenced()
            weight, bias = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).half()
            struct = LmDense(
                inputs,
                outputs,
                fenced.copy(weight),
                fenced.copy(bias),
                native.TYPES[bias.dtype],
                native.TYPES[weight.dtype],
            )
            out = fenced.copy(torch.zeros(rows, outputs))
            dense_call(struct, fenced.copy(torch.randn(rows, inputs)), torch.float32, rows, out)
