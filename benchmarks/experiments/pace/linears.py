"""`python -m lowmem.benchmarks.experiments.pace.command --linears`: linears at StarChat's dimensions beside the memory's own pace.

Each linear lies so many times side by side in one mapped file that no cache holds them all, and a pass goes
through all of them once; passes of lowmem's kernels, of a bare read loop over the same bytes, and of torch's
own operators take turns. So a share of the bandwidth is that of the same second.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lowmem.benchmarks.experiments.pace.models import WIDTHS
from lowmem.benchmarks.experiments.peers.run import say

from lowmem.kernels.native import library as native
from lowmem.kernels.native import linear as native_linear

SHAPES = ((6144, 24576), (24576, 6144), (6144, 6144), (6144, 6400))
ROWS = (1, 2, 4, 8, 16, 64, 512)
FILE_BYTES = 320 << 20
"""Of made-up weights: ten times the largest cache here."""
PASS_SECONDS = 0.5
"""Passes of one case take turns for about so long; three at least."""
_FINITE = 0xBFFFBFFF  # each half of a word, read as float16, is below 2


@dataclass(frozen=True)
class LinearTimes:
    """One linear with so many rows. seconds: of one product, median of the passes. bytes: of weights and
    scales. read: bytes a second of the bare loop, median. share: bytes / seconds / read of the passes
    beside, median and extremes. torch_seconds: of torch's operator of the same width, if it has one."""

    bits: int
    group: int
    inputs: int
    outputs: int
    rows: int
    bytes: int
    copies: int
    passes: int
    seconds: float
    read: float
    share: float
    share_low: float
    share_high: float
    torch_name: str
    torch_seconds: float | None

    @property
    def flops(self) -> float:
        """Operations a second: 2 a weight and row."""
        return 2 * self.inputs * self.outputs * self.rows / self.seconds


@dataclass(frozen=True)
class Case:
    """What is timed: `pass_` goes through all copies once."""

    name: str
    pass_: Callable[[], object]


class Pool:
    """A mapped file of made-up weights, which are cut out of it side by side."""

    def __init__(self, file: Path) -> None:
        if not file.is_file() or file.stat().st_size != FILE_BYTES:
            words = np.random.default_rng(0).integers(0, 1 << 32, FILE_BYTES // 4, dtype=np.uint32)
            (words & np.uint32(_FINITE)).tofile(file)
        with file.open("rb") as opened:
            self._map = mmap.mmap(opened.fileno(), FILE_BYTES, access=mmap.ACCESS_COPY)
        self.all = torch.frombuffer(self._map, dtype=torch.uint8)
        self._used = 0

    def reset(self) -> None:
        """Cut from the beginning again."""
        self._used = 0

    def left(self) -> int:
        """Bytes that can still be cut."""
        return FILE_BYTES - self._used

    def cut(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next bytes as a tensor."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        tensor = self.all[self._used : self._used + nbytes].view(dtype).view(shape)
        self._used += nbytes
        return tensor


def measure(
    pool: Pool, bits: int, group: int, inputs: int, outputs: int, all_rows: Sequence[int], *,
    panels: bool = True, dtype: torch.dtype = torch.bfloat16, peers: bool = True,
) -> Iterator[LinearTimes]:  # fmt: skip
    """One linear with each number of rows. panels: brought into the kernels' own order, as a loaded model's
    are, else as the file has it. peers: torch's operator too."""
    pool.reset()
    nbytes = inputs * outputs * bits // 8 + inputs // group * outputs * 2
    copies: list[native_linear.Packed] = []
    for _ in range(FILE_BYTES // nbytes):
        qweight = pool.cut((inputs * bits // 32, outputs), torch.int32)
        scales = pool.cut((inputs // group, outputs), torch.float16)
        copies.append(native_linear.Packed(qweight, scales, None, None, bits, group))
        if panels:
            copies[-1].to_tiled()
    for rows in all_rows:
        x = torch.randn((rows, inputs)).to(dtype)
        other = _torch_operator(pool, bits, group, inputs, outputs, x) if peers else None
        yield _measure(copies, nbytes, x, other)


def _measure(
    copies: Sequence[native_linear.Packed], nbytes: int, x: torch.Tensor, other: tuple[Case, int] | None
) -> LinearTimes:
    one = copies[0]
    bits, group, inputs, outputs = one.bits, one.group, one.in_features, one.out_features
    read = [partial(native.read, tensor) for packed in copies for tensor in weights(packed)]
    cases = [
        Case("ours", _each([partial(native_linear.linear, packed, x) for packed in copies])),
        Case("read", _each(read)),
    ]
    torch_name, other_bytes = (other[0].name, other[1]) if other else ("", nbytes)
    if other:
        cases.append(other[0])
    times = _turns(cases)
    used = len(copies) * nbytes
    seconds = [value / len(copies) for value in times["ours"]]
    # Each pass of ours lies between two reads, whose mean is what it could have had.
    before, after = times["read"][:-1], times["read"][1:]
    shares = [(b + a) / 2 / t for t, b, a in zip(times["ours"], before, after, strict=True)]
    other_copies = FILE_BYTES // other_bytes
    return LinearTimes(
        bits, group, inputs, outputs, len(x), nbytes, len(copies), len(seconds), median(seconds),
        used / median(times["read"]), median(shares), min(shares), max(shares), torch_name,
        median(times[torch_name]) / other_copies if torch_name else None,
    )  # fmt: skip


def weights(packed: native_linear.Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels read of a weight: words and scales, wherever they lie by now."""
    words, scales = packed._tensors[:2]
    assert words is not None and scales is not None
    return words, scales


def _each(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _turns(cases: Sequence[Case]) -> dict[str, list[float]]:
    """Seconds of each pass. Reads come before and after every round of the others."""
    read = next(case for case in cases if case.name == "read")
    others = [case for case in cases if case.name != "read"]
    times: dict[str, list[float]] = {case.name: [] for case in cases}

    def take(case: Case, keep: bool = True) -> None:
        start = time.perf_counter()
        case.pass_()
        if keep:
            times[case.name].append(time.perf_counter() - start)

    for case in cases:
        take(case, keep=False)
    start = time.perf_counter()
    take(read)
    while len(times["read"]) < 4 or time.perf_counter() - start < PASS_SECONDS:
        for case in others:
            take(case)
        take(read)
    return times


def _torch_operator(
    pool: Pool, bits: int, group: int, inputs: int, outputs: int, x: torch.Tensor
) -> tuple[Case, int] | None:
    """(torch's operator of this width over as many copies as the file holds, bytes of one)."""
    if x.dtype is not torch.bfloat16:
        return None
    pool.reset()
    if bits == 4:
        nbytes = inputs * outputs // 2 + inputs // group * outputs * 4
        copies = [
            (
                pool.cut((outputs, inputs // 2), torch.uint8),
                pool.cut((inputs // group, outputs, 2), torch.bfloat16),
            )
            for _ in range(FILE_BYTES // nbytes)
        ]
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        calls = [partial(multiply, x, weight, group, scales) for weight, scales in copies]
        return Case("int4pack_mm", _each(calls)), nbytes
    if bits == 8:  # a scale an output
        nbytes = inputs * outputs
        weights = [pool.cut((outputs, inputs), torch.int8) for _ in range(FILE_BYTES // nbytes)]
        scales = torch.ones(outputs, dtype=torch.bfloat16)
        multiply = torch.ops.aten._weight_int8pack_mm
        calls = [partial(multiply, x, weight, scales) for weight in weights]
        return Case("int8pack_mm", _each(calls)), nbytes
    return None


# --- the command -------------------------------------------------------------------------------------------


def measure_all(args: Any) -> tuple[LinearTimes, ...]:
    """Those of `lowmem.benchmarks.experiments.pace.command`'s --widths and --rows, in --work, with --threads."""
    torch.set_num_threads(args.threads)
    pool = Pool(args.work / "linears.dat")
    found = []
    for bits, group in WIDTHS:
        if args.widths is not None and str(bits) not in args.widths:
            continue
        for inputs, outputs in SHAPES:
            for times in measure(pool, bits, group, inputs, outputs, args.rows or ROWS):
                say(
                    f"{bits}-bit g{group} {inputs}→{outputs}, {times.rows} rows: "
                    f"{1e3 * times.seconds:.3f} ms, "
                    f"{times.bytes / times.seconds * 1e-9:.1f} of {times.read * 1e-9:.1f} GB/s, "
                    f"share {times.share:.0%}, {times.flops * 1e-9:.0f} GFLOP/s"
                )
                found.append(times)
    return tuple(found)
