"""Instructions that a decode kernel executes for each weight: NEON beside AVX2.

    python -m lowmem.benchmarks.experiments.emulated [--rows N] [--group N]

QEMU executes a linear one instruction at a time and logs each; those inside the decode kernels are counted.
Both sets are compiled by the same compiler with -O3. An AVX2 register has twice as many bytes, so the last
column halves the ratio. A count is no time: it says nothing of latency, nor of memory.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from lowmem.benchmarks.experiments.common import say
from lowmem.benchmarks.experiments.emulated.build import ARM, X86, compiled, emulated, emulator, missing

from lowmem.kernels.native.header import PAIRED, WIDTHS

INPUTS, OUTPUTS = 512, 256
SETS = (("AVX2", X86), ("NEON", ARM), ("NEON dotprod", ARM))
LIMIT = 1.5
"""Instructions per byte of register, as a multiple of AVX2's, at most."""
_KERNEL = re.compile(rb"^Trace .* (decode_\w+|plane_\w+|multiply_rows)$", re.MULTILINE)


def case(bits: int, rows: int, group: int) -> bytes:
    """A packed linear for driver.c with float16 scales, symmetric, and activations as lowmem chooses them."""
    planes = 2 if bits > 4 else PAIRED if bits == 4 else 1
    numbers = np.array([0, bits, group, INPUTS, OUTPUTS, 1, 0, 0, 1, rows, 0, planes, 0], np.int64)
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 1 << 32, (INPUTS // 32 * bits, OUTPUTS), dtype=np.uint32)
    scales = np.full((INPUTS // group, OUTPUTS), 0.01, np.float16)
    x = rng.standard_normal((rows, INPUTS)).astype(np.float32)
    return numbers.tobytes() + words.tobytes() + scales.tobytes() + x.tobytes()


def instructions(program: Path, machine: str, isa: str, data: bytes) -> int:
    """How many instructions of decode kernels are executed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = ("-singlestep", "-d", "exec,nochain", "-D", str(log))
        emulated(program, machine, "max", *options).results(isa, data)
        return len(_KERNEL.findall(log.read_bytes()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1, help="rows of activations (default: 1)")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale (default: 128)")
    options = parser.parse_args()
    if lacks := missing() or ("" if emulator(X86) else "QEMU for x86_64 is not installed"):
        parser.error(lacks)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        say("compiling for both machines: two to five minutes")
        programs = {machine: compiled(Path(folder) / machine, machine, "-O3") for machine in (X86, ARM)}
        print(f"| bits | {' | '.join(isa for isa, _ in SETS)} | NEON, dotprod / AVX2 per byte of register |")
        print("|---" * (len(SETS) + 2) + "|")
        for bits in WIDTHS:
            data, weights = case(bits, options.rows, options.group), INPUTS * OUTPUTS * options.rows
            counts = [instructions(programs[machine], machine, isa, data) / weights for isa, machine in SETS]
            ratios = [count / counts[0] / 2 for count in counts[1:]]
            worst = max(worst, *ratios)
            cells = [str(bits), *(f"{count:.2f}" for count in counts), ", ".join(f"{r:.2f}" for r in ratios)]
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"largest ratio {worst:.2f}, limit {LIMIT}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
