"""The library for Windows, compiled by zig and run by Wine: exports, kernels, the report of a lost file."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.kernels.building.compilers import SOURCES, compile_library
from lowmem.kernels.building.targets import TARGETS
from lowmem.kernels.native import header
from lowmem.kernels.native import library as native
from tests.helpers import REPO

TARGET = TARGETS["windows-x86_64"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ziglang") is None or shutil.which("wine") is None,
        reason="no zig or no Wine",
    ),
]
_LOADER = """
#include <stdio.h>
#include <windows.h>
int main(int count, char **words)
{
    HMODULE library = LoadLibraryA(words[1]);
    if (!library)
        return 3;
    static const char *const names[] = {NAMES};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!GetProcAddress(library, names[i])) {
            printf("no %s\\n", names[i]);
            return 4;
        }
    if (GetProcAddress(library, "lm_isa_selected"))
        return 5; /* only the exported functions are visible */
    printf("%s\\n", ((const char *(*)(void))(void *)GetProcAddress(library, "lm_isa_name"))());
    fflush(stdout);
    if (count > 2) {
        void *found = GetProcAddress(library, "lm_tell_bus_errors");
        int (*tell)(const char *, int) = (int (*)(const char *, int))found;
        if (tell("first\\n", 1) || tell(NULL, 0) || tell("the file was lost\\n", 41))
            return 6;
        RaiseException(EXCEPTION_IN_PAGE_ERROR, 0, 0, NULL);
    }
    return 0;
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, and its objects in `o`."""
    made = tmp_path_factory.mktemp("windows")
    objects = REPO / "build" / "objects" / TARGET.name  # what `make wheels` has compiled
    compile_library(made / TARGET.library, objects, TARGET)
    (made / "o").symlink_to(objects)
    return made


def compiled(folder: Path, source: Path, *objects: Path) -> Path:
    """A program for Windows."""
    program = folder / f"{source.stem}.exe"
    words = ["-target", TARGET.triple, "-O1", "-std=c11", "-ffp-contract=off", f"-I{SOURCES}", str(source)]
    command = [sys.executable, "-m", "ziglang", "cc", *words, *map(str, objects), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program for Windows."""
    environment = {**os.environ, "WINEPREFIX": str(folder / "wine"), "WINEDEBUG": "-all"}
    return subprocess.run(
        ["wine", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )


def test_the_library_loads_and_reports_a_lost_file(folder: Path) -> None:
    source = folder / "loader.c"
    source.write_text(_LOADER.replace("NAMES", ", ".join(f'"{name}"' for name in header.FUNCTIONS)))
    program = compiled(folder, source)
    done = run(folder, program.name, TARGET.library)
    assert (done.returncode, done.stdout.strip()) == (0, native.isa_name() if native.available() else "AVX2")
    done = run(folder, program.name, TARGET.library, "lose a file")
    assert done.returncode == 41 and "the file was lost" in done.stderr and "first" not in done.stderr


def test_its_kernels_have_the_same_bits(folder: Path) -> None:
    """The fuzzer compares every instruction set with portable C, with 1 to 4 threads and guarded memory."""
    program = compiled(folder, REPO / "tests/sanitizers/fuzz.c", *sorted((folder / "o").glob("*.o")))
    done = run(folder, program.name, "5", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"packed", "attention", "gemm", "training", "with portable C"} <= set(done.stdout.splitlines())
    if native.available():
        assert f"with {native.isa_name()}" in done.stdout.splitlines()
