"""driver.c and the CPU kernels, compiled for another CPU or for this one, and run in QEMU's user mode.

Needs ziglang, a C compiler for every target, and QEMU (`qemu-user-static`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lowmem.kernels.building.compilers import SOURCES, call, compile_all
from lowmem.kernels.native.lost_files import library_path

DRIVER = Path(__file__).parent / "driver.c"
ARM, X86 = "aarch64", "x86_64"
CPUS = {"cortex-a53": 1, "neoverse-n1": 2, "max": 3}
"""ARM CPUs of QEMU, and how many of the NEON instruction sets each has."""
LEFT_OUT = ("avx512_decode.c", "avx512_prefill.c", "avx512_digits.c", "avx512_dense.c")
"""Sources that a driver for x86 has no use for: QEMU knows no AVX-512, and they compile for minutes."""
_STUB = '#include "linear/kernels.h"\nconst lm_linear_kernels lm_linear_avx512 = {0};\n'
_OPTIONS = ("-std=c11", "-ffp-contract=off", "-pthread", f"-I{SOURCES}")
_ZIG = (sys.executable, "-m", "ziglang", "cc", *_OPTIONS, "-Wall", "-Wextra", "-Werror")


@dataclass(frozen=True)
class Driver:
    """A compiled driver.c and how it is started."""

    command: tuple[str, ...]

    def sets(self) -> list[str]:
        """The instruction sets that its CPU has, best first."""
        return self._run(b"").decode().splitlines()

    def results(self, isa: str, cases: bytes, fill: int = 0) -> bytes:
        """What one instruction set computes, with workspaces and outputs filled with a byte before.

        Raises RuntimeError if it fails.
        """
        return self._run(cases, isa, str(fill))

    def _run(self, cases: bytes, *arguments: str) -> bytes:
        done = subprocess.run([*self.command, *arguments], input=cases, capture_output=True, timeout=500)
        if done.returncode:
            raise RuntimeError(
                f"{self.command} {arguments}: {done.returncode}, {done.stderr.decode()[-2000:]}"
            )
        return done.stdout


def emulator(machine: str) -> str | None:
    """QEMU's user mode for ARM or X86, or None."""
    return shutil.which(f"qemu-{machine}-static") or shutil.which(f"qemu-{machine}")


def missing() -> str:
    """What an emulated driver lacks, with the command that installs it; "" if nothing."""
    if find_spec("ziglang") is None:
        return "ziglang is not installed: pip install ziglang"
    if emulator(ARM) is None:
        return "QEMU is not installed: apt-get install qemu-user-static"
    return ""


def emulated(program: Path, machine: str, cpu: str, *options: str) -> Driver:
    """A program of `compiled` in QEMU."""
    return Driver((emulator(machine) or f"qemu-{machine}", "-cpu", cpu, *options, str(program)))


def compiled(folder: Path, machine: str, level: str) -> Path:
    """Compile the kernels and the driver with `level`, such as "-O3", into `folder`. Returns the program.

    Warnings are errors. Raises BuildError with the compiler's output.
    """
    words = (*_ZIG, "-target", f"{machine}-linux-musl", level)
    kernels = compile_all(words, folder, LEFT_OUT if machine == X86 else ())
    others = [DRIVER]
    if machine == X86:
        others.append(folder / "stub.c")
        others[-1].write_text(_STUB)
    program = folder / "driver"
    call([*words, *map(str, others), *kernels, "-static", "-lm", "-o", str(program)])
    return program


def driver_here(folder: Path) -> Driver:
    """The driver with this machine's library of kernels. Raises RuntimeError if that is not compiled."""
    library = library_path()
    if library is None:
        raise RuntimeError("the library of kernels is not compiled")
    program, cc = folder / "driver-here", shutil.which("cc") or shutil.which("gcc")
    options = _ZIG if cc is None else (cc, *_OPTIONS)
    call([*options, str(DRIVER), str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program)])
    return Driver((str(program),))
