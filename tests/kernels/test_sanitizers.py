"""The kernels in C under AddressSanitizer and UBSan: no byte beside a tensor, nothing undefined.

Found this way, and mended: a division by zero for a linear without inputs, a read behind the layers of a
model without any, sums that overflowed for NaN and for keys that count nothing, keys read as if they lay at
multiples of 4 bytes, and integers of the converter that nobody had written where no grid left a finite error.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPO
from tests.sanitizers.build import LEFT_OUT, build, compiler, environment

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler with AddressSanitizer")
KINDS = ["packed", "dense", "attention", "step", "gemm", "layout", "rounding", "reading"]


def run(program: Path, *arguments: str) -> list[str]:
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = result.stdout.splitlines()
    assert [line for line in lines if not line.startswith("with ")] == KINDS
    return lines


def test_random_shapes_touch_nothing_else(tmp_path: Path) -> None:
    """A quick build, without the packed kernels of AVX-512, and few rounds: the slow test has them all."""
    lines = run(build(tmp_path, quick=True), "1", "6", LEFT_OUT)
    assert "with portable C" in lines and f"with {LEFT_OUT}" not in lines


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_instruction_set_at_length_and_its_own_tests(tmp_path: Path) -> None:
    """About five minutes: 150 rounds of every kernel, then the kernels' own tests on the library."""
    program = build(tmp_path)
    for seed in ("1", "2"):
        run(program, seed, "150")
    tests = sorted(path.name for path in (REPO / "tests").glob("test_native_*.py"))
    tests = [name for name in tests if name != "test_native_build.py"]
    tests += ["test_rearranging.py", "test_convert_products.py", "test_convert_rounding.py"]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "tests.sanitizers.plugin",
            *(f"tests/{t}" for t in tests),
        ],
        cwd=REPO,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert " passed" in result.stdout
