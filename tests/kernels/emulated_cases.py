"""Cases for driver.c: their bytes, and their results as arrays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lowmem.kernels.native.header import PAIRED, WIDTHS

PACKED, DENSE, ATTENTION, GEMM, ROUNDING = range(5)
F32, F16, BF16 = range(3)
_NAMES = ("packed", "dense", "attention", "gemm", "rounding")
_TOLERANCES = (0.0, 2.0**-18, 2.0**-7, 2.0**-18, 0.0)
"""Sums in another order differ in float32's last bits; attention's results are bfloat16."""
_MAY_DIFFER = (0.0, 0.0, 0.0, 0.0, 0.1)
"""Of a tensor: where two scales or integers are almost equally good, rounding may choose either."""
Array = np.ndarray


@dataclass(frozen=True)
class Result:
    """A tensor of a case's result: how many elements it has, and how its bytes become numbers."""

    count: int
    type: int
    """F32, F16, BF16, or 3 for bytes."""

    @property
    def size(self) -> int:
        return self.count * (4, 2, 2, 1)[self.type]

    def values(self, data: bytes) -> Array:
        """float32; NaN is the same NaN on every machine."""
        if self.type == 3:
            return np.frombuffer(data, np.uint8).astype(np.float32)
        if self.type == BF16:
            wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32)
        return np.frombuffer(data, np.float16 if self.type == F16 else np.float32).astype(np.float32)


@dataclass(frozen=True)
class Case:
    name: str
    data: bytes
    results: tuple[Result, ...]
    tolerance: float
    """Of the largest number of a tensor; 0: machines compute equal bits."""
    may_differ: float
    """The share of a tensor's numbers that may be others, within no tolerance."""

    def split(self, data: bytes, at: int) -> tuple[list[Array], int]:
        """Its results, which begin at byte `at`, and where they end."""
        found = []
        for result in self.results:
            found.append(result.values(data[at : at + result.size]))
            at += result.size
        return found, at


def _case(
    kind: int, numbers: Sequence[int], tensors: Sequence[Array | None], results: Sequence[Result]
) -> Case:
    head = np.array([kind, *numbers], np.int64).tobytes()
    data = head + b"".join(t.tobytes() for t in tensors if t is not None)
    return Case(
        f"{_NAMES[kind]} {tuple(numbers)}", data, tuple(results), _TOLERANCES[kind], _MAY_DIFFER[kind]
    )


def _as(type_: int, values: Array) -> Array:
    """Values as stored; bfloat16 is truncated."""
    if type_ == BF16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if type_ == F16 else np.float32)


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    """Normal, with a few far larger numbers, like hidden states."""
    x = rng.standard_normal(shape).astype(np.float32)
    x[rng.random(shape) < 0.01] *= 30
    return x


def packed(rng: np.random.Generator, bits: int, planes: int, group: int, rows: int) -> Case:
    """Of random size, with or without zero-points, bias and tiles, and with scales of both signs."""
    inputs, outputs = group * int(rng.integers(1, 4 if group < 256 else 2)), int(rng.integers(1, 90))
    zeros, bias, tiled = (int(n) for n in rng.integers(0, 2, 3))
    types = [int(n) for n in rng.integers(0, 3, 3)]
    x = _normal(rng, rows, inputs)
    if rng.random() < 0.1:
        x[rng.integers(rows), rng.integers(inputs)] = rng.choice([np.nan, np.inf, -np.inf])
    if rng.random() < 0.1:
        x[rng.integers(rows)] = 0
    shape = (inputs // group, outputs)
    tensors = (
        rng.integers(0, 1 << 32, (inputs // 32 * bits, outputs), dtype=np.uint32),
        _as(types[0], rng.normal(0, 0.02, shape)),
        rng.integers(0, 1 << bits, shape, dtype=np.uint8) if zeros else None,
        _normal(rng, outputs) if bias else None,
        _as(types[1], x),
    )
    numbers = (bits, group, inputs, outputs, types[0], zeros, bias, tiled, rows, types[1], planes, types[2])
    return _case(PACKED, numbers, tensors, [Result(rows * outputs, types[2])])


def dense(rng: np.random.Generator, rows: int) -> Case:
    inputs, outputs, type_ = int(rng.integers(1, 150)), int(rng.integers(1, 60)), int(rng.integers(1, 3))
    weight, bias, x = _normal(rng, outputs, inputs), _normal(rng, outputs), _normal(rng, rows, inputs)
    tensors = (_as(type_, weight), bias, x)
    return _case(DENSE, (inputs, outputs, type_, rows), tensors, [Result(rows * outputs, F32)])


def attention(rng: np.random.Generator, length: int) -> Case:
    kv_heads, share, size = (int(n) for n in rng.integers(1, 4, 3))
    heads, size, rows = kv_heads * share, 16 * size, int(rng.integers(1, min(length, 20) + 1))
    stored = kv_heads * length * size
    tensors = [_as(BF16, rng.standard_normal(n)) for n in (stored, stored, rows * heads * size)]
    results = [Result(rows * heads * size, BF16)]
    return _case(ATTENTION, (heads, kv_heads, size, length, rows), tensors, results)


def gemm(rng: np.random.Generator, k: int) -> Case:
    m, n = (int(size) for size in rng.integers(1, 60, 2))
    upper, bf16 = (int(n) for n in rng.integers(0, 2, 2))
    tensors = (_normal(rng, m, k), _normal(rng, k, n))
    return _case(GEMM, (m, n, k, upper, bf16), tensors, [Result(m * n, F32)])


def rounding(rng: np.random.Generator, search: int) -> Case:
    width = int(rng.choice([16, 32, 64]))
    columns, out = width * int(rng.integers(1, 4 if width < 64 else 2)), int(rng.integers(40, 90))
    maxq, sym = (1 << int(rng.choice([2, 3, 4, 8]))) - 1, int(rng.integers(0, 2))
    r = np.triu(rng.normal(0, 0.1, (columns, columns)), 1) + np.diag(rng.uniform(0.5, 1.5, columns))
    tensors = (_normal(rng, columns, out), 0.1 * _normal(rng, columns, out), r.astype(np.float32))
    weights, grids = columns * out, columns // width * out
    numbers = (columns, width, out, maxq, sym, search, 2 if search == 2 else 0)
    return _case(ROUNDING, numbers, tensors, [Result(weights, 3), Result(grids, F32), Result(weights, F32)])


def packed_cases(seed: int, turns: int) -> list[Case]:
    """Every width with every number of planes, `turns` times; rows for each kernel, prefill above 32."""
    rng = np.random.default_rng(seed)
    rows = itertools.cycle((1, 2, 3, 4, 5, 33, 1, 38, 7))
    groups = itertools.cycle((32, 64, 128, 96, 256, 32, 160, 288))
    each = [(bits, planes) for bits in WIDTHS for planes in (1, 2, 3, PAIRED)]
    return [packed(rng, *widths, next(groups), next(rows)) for _ in range(turns) for widths in each]


def other_cases(seed: int, turns: int) -> list[Case]:
    """The kernels whose results have an error bound."""
    rng = np.random.default_rng(seed)
    kinds: list[tuple[Callable[[np.random.Generator, int], Case], tuple[int, ...]]] = [
        (dense, (1, 2, 3, 4, 9)),
        (attention, (3, 40, 257, 300)),
        (gemm, (1, 37, 600)),
        (rounding, (1, 2)),
    ]
    return [make(rng, size) for _ in range(turns) for make, sizes in kinds for size in sizes]
