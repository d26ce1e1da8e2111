"""Build the C kernels with AddressSanitizer and UBSan: the library, and a program that fuzzes the kernels.

    python -m tests.sanitizers.build FOLDER            write the library (`_native.so`) and `fuzz` to FOLDER
    FOLDER/fuzz SEED ROUNDS                            run every kernel on random shapes and values

To run Python tests with this library, start `pytest -p tests.sanitizers.plugin` in `environment(FOLDER)`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lowmem.kernels.building.compilers import SOURCES, BuildError, call, compile_all

HERE = Path(__file__).parent
SLOW_TO_COMPILE = ("avx512_decode.c", "avx512_prefill.c")
"""Compiling these takes as long as all other sources together. A `quick` build leaves them out, and `fuzz`
skips the instruction sets that use them."""
_CHECKS = "-fsanitize=address,undefined,float-cast-overflow"
_FLAGS = (
    *("-g1", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-pthread"),
    *("-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
)
_STUB = """\
#include "linear/kernels.h"
#if defined(__x86_64__)
const lm_linear_kernels lm_linear_avx512 = {0};
#endif
"""


def compiler() -> str | None:
    """A C compiler with both sanitizers, or None."""
    found = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if found is None:
        return None
    tried = subprocess.run(
        [found, _CHECKS, "-x", "c", "-", "-o", "/dev/null"],
        input="int main(void) { return 0; }\n",
        text=True,
        capture_output=True,
    )
    return found if tried.returncode == 0 else None


def build(folder: Path, *, quick: bool = False) -> Path:
    """Compile into `folder` in two to three minutes, or 10 seconds if `quick`; returns the path of `fuzz`.

    quick: build without optimization, and leave out the packed AVX-512 kernels and the library. Raises
    BuildError with the compiler's output.
    """
    cc = compiler()
    if cc is None:
        raise BuildError("no C compiler with AddressSanitizer was found")
    words = [cc, "-O0" if quick else "-O1", *_FLAGS, _CHECKS]
    kernels = compile_all(words, folder, SLOW_TO_COMPILE if quick else ())
    libraries = ["-lm", "-ldl", "-pthread"]
    others = [HERE / "fuzz.c"]
    if quick:
        others.append(folder / "stub.c")
        others[-1].write_text(_STUB)
    else:
        call([*words, "-shared", *kernels, "-o", str(folder / "_native.so"), *libraries])
    program = folder / "fuzz"
    call([*words, f"-I{SOURCES}", *map(str, others), *kernels, "-o", str(program), *libraries])
    return program


def environment(folder: Path) -> dict[str, str]:
    """Environment variables for a Python process that loads the library of `folder` through the plugin."""
    cc = compiler() or "gcc"
    runtime = [_output([cc, f"-print-file-name=lib{name}.so"]) for name in ("asan", "ubsan")]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(runtime),
        "LOWMEM_SANITIZED": str(folder / "_native.so"),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python never frees some objects
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
