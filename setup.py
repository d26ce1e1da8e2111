"""Compile the CPU kernels (lowmem/kernels/csrc) when lowmem is installed. pyproject.toml has everything else.

The result is a plain shared library, loaded with ctypes; it depends on neither Python nor torch. In a
checkout that is not installed, `python setup.py build_ext --inplace` builds it. Without a C compiler lowmem
installs all the same, and multiplies with torch (see lowmem/kernels/dispatch.py).
"""

from __future__ import annotations

import os
import sys
from glob import glob

from setuptools import Extension, setup

CSRC = "lowmem/kernels/csrc"
NATIVE = Extension(
    "lowmem.kernels.native._native",
    sorted(glob(f"{CSRC}/**/*.c", recursive=True)),
    depends=sorted(glob(f"{CSRC}/**/*.h", recursive=True)),
    include_dirs=[CSRC],
    # No contraction to fused multiply-adds: every instruction set computes the same bits.
    extra_compile_args=["-O3", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0"],
    extra_link_args=["-pthread"],
    libraries=["m", "dl"] if sys.platform == "linux" else ["m"],
    optional=True,
)

# On Windows, the linker requires Python's entry point in an extension, and the sources require POSIX threads.
setup(ext_modules=[] if os.name == "nt" or not NATIVE.sources else [NATIVE])
