"""The build backend (pyproject.toml): setuptools', with zig as the compiler where there is no other.

pip installs what a build requires into an environment that ends with it.
"""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 — the hooks that stay as they are

from lowmem.kernels.building.compilers import own_compiler

_SYSTEMS = ("linux", "darwin", "win32")
_PROCESSORS = ("x86_64", "amd64", "aarch64", "arm64")
"""What PyPI has wheels of ziglang for."""


def _compiler_wanted() -> list[str]:
    foreign = bool(os.environ.get("LOWMEM_TARGET"))
    known = sys.platform in _SYSTEMS and platform.machine().lower() in _PROCESSORS
    return ["ziglang>=0.17"] if known and (foreign or own_compiler() is None) else []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What building a wheel requires."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler_wanted()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """What an editable installation requires."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler_wanted()]
