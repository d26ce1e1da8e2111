"""A few seconds of the coverage-guided fuzzer, so that it keeps working; its long runs are started by hand.

atheris has wheels for CPython 3.10 to 3.14 on x86-64 Linux with glibc. Where there is one, CI must have it;
elsewhere the same targets are fuzzed by test_formats.py alone.
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
# Of the quick ones: transformers reads what the others give it, and takes seconds to begin.
QUICK = ("bin_pickle", "gguf")


@pytest.fixture(autouse=True)
def atheris() -> None:
    """Skips where atheris is not installed, but for CI, where it could be."""
    if importlib.util.find_spec("atheris") is None:
        if os.environ.get("CI") and HAS_WHEEL:
            pytest.fail("atheris is not installed, and there is a wheel of it: pip install -e .[dev]")
        pytest.skip("atheris is not installed")


def check(run: Run) -> None:
    print(run)
    assert not run.fault, f"{run.fault}\n{run.traceback}"
    assert run.executions > 5 and run.edges > 20 and run.corpus > 2, run  # it really ran, instrumented


def test_a_short_run_finds_no_fault_and_tells_one(tmp_path: Path) -> None:
    """And of a target that is broken on purpose the input is kept and the traceback told."""
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
