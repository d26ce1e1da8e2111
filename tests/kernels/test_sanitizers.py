"""The C kernels under AddressSanitizer and UBSan: no access outside a tensor, no undefined behaviour.

Bugs found this way, now fixed: a division by zero for a linear without inputs, a read past the layers of a
model without layers, overflows for NaN and for masked keys, misaligned reads of keys, and uninitialized
integers of the converter where no grid had a finite error.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPO
from tests.sanitizers.build import build, compiler, environment

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler with AddressSanitizer")
KINDS = ["packed", "dense", "attention", "step", "gemm", "layout", "rounding", "training", "reading"]


def run(program: Path, *arguments: str) -> list[str]:
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = result.stdout.splitlines()
    assert [line for line in lines if not line.startswith("with ")] == KINDS
    return lines


def test_random_shapes_touch_nothing_else(tmp_path: Path) -> None:
    """A quick build without the packed AVX-512 kernels, and few rounds; the slow test runs everything."""
    lines = run(build(tmp_path, quick=True), "1", "6")
    assert "with portable C" in lines and "with AVX-512 VNNI" not in lines


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_instruction_set_at_length_and_its_own_tests(tmp_path: Path) -> None:
    """About five minutes: 150 rounds of every kernel, then the kernels' tests on the sanitized library."""
    program = build(tmp_path)
    for seed in ("1", "2"):
        run(program, seed, "150")
    folders = (REPO / "tests" / "kernels", REPO / "tests" / "generate", REPO / "tests" / "convert")
    names = ("test_native_*.py", "test_repacking.py", "test_products.py", "test_rounding.py")
    tests = sorted(str(path) for folder in folders for name in names for path in folder.glob(name))
    tests = [path for path in tests if not path.endswith(("_build.py", "_header.py"))]
    assert len(tests) > 6
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "tests.sanitizers.plugin", *tests],
        cwd=REPO,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert " passed" in result.stdout
