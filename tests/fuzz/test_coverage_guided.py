"""Run the coverage-guided fuzzer for a few seconds to check that it works. Long runs are started by hand.

atheris has wheels for CPython 3.10 to 3.14 on x86-64 Linux with glibc. CI must install it where a wheel
exists; elsewhere only test_formats.py fuzzes the targets.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

import pytest

from tests.fuzz.coverage_guided import Run, fuzz
from tests.fuzz.fuzz_targets import TARGETS

HAS_WHEEL = (
    sys.platform == "linux"
    and platform.machine() == "x86_64"
    and platform.libc_ver()[0] == "glibc"
    and platform.python_implementation() == "CPython"
    and (3, 10) <= sys.version_info[:2] <= (3, 14)
)
SHORT = 1
LONG = int(os.environ.get("LOWMEM_FUZZ_SECONDS", "60"))
# Quick targets only: the others import transformers, which takes seconds.
QUICK = ("bin_pickle", "gguf")


@pytest.fixture(autouse=True)
def atheris() -> None:
    """Skip if atheris is not installed. Fail in CI where a wheel exists."""
    if importlib.util.find_spec("atheris") is None:
        if os.environ.get("CI") and HAS_WHEEL:
            pytest.fail(
                "atheris is not installed, although it has a wheel for this platform: pip install -e .[dev]"
            )
        pytest.skip("atheris is not installed")


def check(run: Run) -> None:
    print(run)
    assert not run.fault, f"{run.fault}\n{run.traceback}"
    assert run.executions > 5 and run.edges > 20 and run.corpus > 2, run  # it ran with instrumentation


def test_a_short_run_passes_and_reports_a_deliberate_fault(tmp_path: Path) -> None:
    """The real targets pass. For a target that fails on purpose, the input is kept and the traceback
    reported."""
    *sound, broken = fuzz((*QUICK, "broken"), SHORT, tmp_path)
    for run in sound:
        check(run)
    assert Path(broken.fault).read_bytes()[:1] == b"x"
    assert "broken on purpose" in broken.traceback


@pytest.mark.slow
@pytest.mark.timeout(2 * LONG + 900)
@pytest.mark.parametrize("target", TARGETS)
def test_a_long_run_finds_no_fault(target: str, tmp_path: Path) -> None:
    check(*fuzz([target], LONG, tmp_path))
