"""Compile the CPU kernels (lowmem/kernels/csrc) when lowmem is installed. pyproject.toml has everything else.

The result is a plain shared library, loaded with ctypes; it depends on neither Python nor torch, so a wheel
is for every Python 3. In a checkout that is not installed, `python setup.py build_ext --inplace` builds it.
Without a C compiler lowmem installs all the same, and multiplies with torch (see lowmem/kernels/dispatch.py).
"""

from __future__ import annotations

import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))  # build backends do not run from here

from lowmem.kernels.building.compilers import BuildError, compile_library
from lowmem.kernels.building.targets import asked_for, library_name

CSRC = "lowmem/kernels/csrc"
TARGET = asked_for()
NATIVE = Extension(
    "lowmem.kernels.native._native",
    sorted(glob(f"{CSRC}/**/*.c", recursive=True)),
    depends=sorted(glob(f"{CSRC}/**/*.h", recursive=True)),
    optional=TARGET is None,
)


class BuildLibrary(build_ext):
    """Compile one library that is no extension module, for this machine or for LOWMEM_TARGET."""

    built = False

    def finalize_options(self) -> None:
        super().finalize_options()
        if TARGET:  # the library of another processor may have the same name
            self.force = True
            if not Path(self.build_temp).name.startswith(TARGET.name):
                self.build_temp = str(Path(self.build_temp) / TARGET.name)

    def get_ext_filename(self, fullname: str) -> str:
        name = TARGET.library if TARGET else library_name()
        return str(Path(*fullname.split(".")[:-1]) / name)

    def build_extension(self, ext: Extension) -> None:
        path = Path(self.get_ext_fullpath(ext.name))
        newest = max(Path(name).stat().st_mtime for name in (*ext.sources, *ext.depends))
        if not self.force and path.is_file() and path.stat().st_mtime >= newest:
            self.built = True
            return
        try:
            compile_library(path, Path(self.build_temp), TARGET)
        except BuildError as error:
            raise CompileError(str(error)) from error
        self.built = True


class Wheel(bdist_wheel):
    """Name the wheel after the system alone, or after none where the kernels were not compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        if not self.get_finalized_command("build_ext").built:
            return "py3", "none", "any"
        return "py3", "none", TARGET.tag if TARGET else super().get_tag()[2]


setup(
    ext_modules=[NATIVE] if NATIVE.sources else [], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel}
)
