"""The kernels for ARM, in an emulator: linears have the bits that this machine computes.

The same program runs here, on the installed library, and in QEMU, compiled for AArch64. It computes the same
cases with every instruction set.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from lowmem.benchmarks.experiments.emulated.build import (
    ARM,
    CPUS,
    Driver,
    compiled,
    driver_here,
    emulated,
    missing,
)

from lowmem.kernels.native import library as native
from tests.kernels.emulated_cases import Case, other_cases, packed_cases

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())
REFERENCE = "portable C"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulated driver, for AArch64."""
    return _built(tmp_path_factory.mktemp("emulated"), "-O1")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return driver_here(tmp_path_factory.mktemp("here"))


def _built(folder: Path, level: str) -> Path:
    """Skip the test if a tool is missing. In CI, where the tools are required, fail."""
    if lacks := missing():
        if os.environ.get("CI"):
            pytest.fail(lacks)
        pytest.skip(lacks)
    return compiled(folder, ARM, level)


def compare(there: Driver, here: Driver, cases: list[Case]) -> None:
    """Every instruction set there against portable C here, within the cases' tolerances."""
    data = b"".join(case.data for case in cases)
    expected = here.results(REFERENCE, data)
    for isa in there.sets():
        got, at = there.results(isa, data), 0
        assert len(got) == len(expected)
        for case in cases:
            left, _ = case.split(expected, at)
            right, at = case.split(got, at)
            for a, b in zip(left, right, strict=True):
                worst = case.tolerance * np.abs(a).max() if case.tolerance else 0
                different = ~np.isclose(b, a, rtol=0, atol=worst, equal_nan=True)
                assert different.mean() <= case.may_differ, (isa, case.name, np.flatnonzero(different)[:9])


def test_an_emulated_cpu_has_its_instruction_sets(program: Path) -> None:
    """The system's report of features decides: one that the CPU lacks would end the process."""
    names = ["NEON i8mm", "NEON dotprod", "NEON", "portable C"]
    for cpu, count in CPUS.items():
        assert emulated(program, ARM, cpu).sets() == names[3 - count :], cpu


def test_packed_linears_have_the_bits_of_this_machine(program: Path, here: Driver) -> None:
    compare(emulated(program, ARM, "max"), here, packed_cases(seed=1, turns=3))


def test_other_kernels_agree_with_this_machine(program: Path, here: Driver) -> None:
    compare(emulated(program, ARM, "max"), here, other_cases(seed=2, turns=2))


def test_no_result_depends_on_unwritten_memory(program: Path, here: Driver) -> None:
    """Workspaces and outputs that hold NaN (as integers, -1) give the bits of those that hold zeros."""
    cases = [*packed_cases(seed=3, turns=2), *other_cases(seed=3, turns=1)]
    data = b"".join(case.data for case in cases)
    for driver in (emulated(program, ARM, "max"), here):
        for isa in driver.sets():
            assert driver.results(isa, data, fill=0xFF) == driver.results(isa, data, fill=0), isa


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_optimized_kernels_at_length(tmp_path: Path, here: Driver) -> None:
    """As the library is compiled, on each CPU that lacks some of the sets, with many more sizes."""
    program = _built(tmp_path, "-O3")
    for seed, cpu in enumerate(CPUS):
        compare(emulated(program, ARM, cpu), here, packed_cases(seed=10 + seed, turns=24))
        compare(emulated(program, ARM, cpu), here, other_cases(seed=20 + seed, turns=8))
