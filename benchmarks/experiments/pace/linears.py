"""Single linears at StarChat's dimensions, beside the memory bandwidth.

    python -m lowmem.benchmarks.experiments.pace.linears [--widths 4,8] [--rows 1,4] [--threads 2]

Enough copies of each linear are in one mapped file that no CPU cache holds them all, and a pass multiplies by
each copy once. Passes of lowmem's kernels, of a bare read loop over the same bytes, and of torch's own
operators take turns, so that a share of the bandwidth compares the same second.
"""

from __future__ import annotations

import argparse
import mmap
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from lowmem.benchmarks.experiments.pace.models import OUR_WIDTHS
from lowmem.benchmarks.experiments.workers.lowmem_worker import weights_of

from lowmem.kernels.native import library as native
from lowmem.kernels.native import linear as native_linear

SHAPES = ((6144, 24576), (24576, 6144), (6144, 6144), (6144, 6400))
ROWS = (1, 2, 4, 8, 16, 64, 512)
FILE_BYTES = 320 << 20
"""Of made-up weights: many times a CPU's cache."""
PASS_SECONDS = 0.5
"""How long passes of one case take turns, at least three times."""
_FINITE = 0xBFFFBFFF  # each half of a word, read as float16, is below 2


@dataclass(frozen=True)
class Linear:
    """Which linear."""

    bits: int
    group: int
    inputs: int
    outputs: int

    @property
    def nbytes(self) -> int:
        """Of its packed weights and float16 scales."""
        return self.inputs * self.outputs * self.bits // 8 + self.inputs // self.group * self.outputs * 2


@dataclass(frozen=True)
class LinearTimes:
    """One linear with a number of rows."""

    bits: int
    group: int
    inputs: int
    outputs: int
    rows: int
    bytes: int
    """Of weights and scales."""
    copies: int
    passes: int
    seconds: float
    """Of one product: the median of the passes."""
    read: float
    """Bytes a second of the bare loop, median."""
    share: float
    """bytes / seconds / read, each pass beside its own reads: the median, then the extremes."""
    share_low: float
    share_high: float
    torch_name: str
    """torch's operator of the same width; empty without one."""
    torch_seconds: float | None

    def __str__(self) -> str:
        flops = 2 * self.inputs * self.outputs * self.rows / self.seconds
        other = f", {self.torch_name} {1e3 * self.torch_seconds:.3f} ms" if self.torch_seconds else ""
        return (
            f"{self.bits}-bit g{self.group} {self.inputs}→{self.outputs}, {self.rows} rows: "
            f"{1e3 * self.seconds:.3f} ms, {self.bytes / self.seconds * 1e-9:.1f} of "
            f"{self.read * 1e-9:.1f} GB/s, share {self.share:.0%} ({self.share_low:.0%} to "
            f"{self.share_high:.0%}), {flops * 1e-9:.0f} GFLOP/s{other}"
        )


@dataclass(frozen=True)
class Case:
    """What is timed; `pass_` goes through all copies once."""

    name: str
    pass_: Callable[[], object]


class Pool:
    """A mapped file of made-up weights; tensors are cut out of it one after another."""

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

    def cut(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next bytes as a tensor."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        tensor = self.all[self._used : self._used + nbytes].view(dtype).view(shape)
        self._used += nbytes
        return tensor


def measure(
    pool: Pool,
    linear: Linear,
    all_rows: Sequence[int],
    *,
    panels: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[LinearTimes]:
    """One linear with each number of rows. panels: in the kernels' tiled layout, as in a loaded model;
    otherwise in the file's."""
    pool.reset()
    bits, group, inputs, outputs = linear.bits, linear.group, linear.inputs, linear.outputs
    copies: list[native_linear.Packed] = []
    for _ in range(FILE_BYTES // linear.nbytes):
        qweight = pool.cut((inputs * bits // 32, outputs), torch.int32)
        scales = pool.cut((inputs // group, outputs), torch.float16)
        copies.append(native_linear.Packed(qweight, scales, None, None, bits, group))
        if panels:
            copies[-1].to_tiled()
    for rows in all_rows:
        x = torch.randn((rows, inputs)).to(dtype)
        yield _measure(copies, linear, x, _torch_operator(pool, linear, x))


def _measure(
    copies: Sequence[native_linear.Packed], linear: Linear, x: torch.Tensor, other: tuple[Case, int] | None
) -> LinearTimes:
    nbytes = linear.nbytes
    read = [partial(native.read, tensor) for packed in copies for tensor in weights_of(packed)]
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
    # Each pass of ours is between two reads; their mean is the bandwidth that it could use.
    before, after = times["read"][:-1], times["read"][1:]
    shares = [(b + a) / 2 / t for t, b, a in zip(times["ours"], before, after, strict=True)]
    other_copies = FILE_BYTES // other_bytes
    return LinearTimes(
        **asdict(linear),
        rows=len(x),
        bytes=nbytes,
        copies=len(copies),
        passes=len(seconds),
        seconds=median(seconds),
        read=used / median(times["read"]),
        share=median(shares),
        share_low=min(shares),
        share_high=max(shares),
        torch_name=torch_name,
        torch_seconds=median(times[torch_name]) / other_copies if torch_name else None,
    )


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


def _torch_operator(pool: Pool, linear: Linear, x: torch.Tensor) -> tuple[Case, int] | None:
    """(torch's operator of this width over as many copies as the file holds, bytes of one copy), or None."""
    if x.dtype is not torch.bfloat16:
        return None
    pool.reset()
    group, inputs, outputs = linear.group, linear.inputs, linear.outputs
    if linear.bits == 4:
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
    if linear.bits == 8:  # one scale per output
        nbytes = inputs * outputs
        weights = [pool.cut((outputs, inputs), torch.int8) for _ in range(FILE_BYTES // nbytes)]
        scales = torch.ones(outputs, dtype=torch.bfloat16)
        multiply = torch.ops.aten._weight_int8pack_mm
        calls = [partial(multiply, x, weight, scales) for weight in weights]
        return Case("int8pack_mm", _each(calls)), nbytes
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each linear and number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser.add_argument("--widths", type=numbers, default=[bits for bits, _ in OUR_WIDTHS], metavar="LIST")
    parser.add_argument("--rows", type=numbers, default=list(ROWS), metavar="LIST")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(Path(folder) / "linears.dat")
        for bits, group in OUR_WIDTHS:
            for inputs, outputs in SHAPES if bits in args.widths else ():
                for times in measure(pool, Linear(bits, group, inputs, outputs), args.rows):
                    print(times, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
