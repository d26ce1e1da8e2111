"""Compiles the kernels for the CPU (lowmem/kernels/csrc) when lowmem is installed; the rest is in
pyproject.toml.

The result is a plain shared library, loaded with ctypes: it knows nothing of Python or torch. In a checkout
that is not installed, `python setup.py build_ext --inplace` makes it. A machine without a C compiler installs
lowmem all the same, and multiplies with torch (see lowmem/kernels/dispatch.py).
"""

from __future__ import annotations

import os
import sys
from glob import glob

from setuptools import Extension, setup

NATIVE = Extension(
    "lowmem.kernels.native._native",
    sorted(glob("lowmem/kernels/csrc/*.c")),
    depends=sorted(glob("lowmem/kernels/csrc/*.h")),
    # Nothing may be contracted behind our back: every instruction set gives the same bits.
    extra_compile_args=["-O3", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0"],
    extra_link_args=["-pthread"],
    libraries=["m", "dl"] if sys.platform == "linux" else ["m"],
    optional=True,
)

# On Windows the linker asks an extension for Python's entry point, and the sources for POSIX threads.
setup(ext_modules=[] if os.name == "nt" or not NATIVE.sources else [NATIVE])
