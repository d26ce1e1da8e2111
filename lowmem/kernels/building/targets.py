"""The systems that lowmem's library is compiled for, and the names of its wheels there."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

FLAGS = ("-O3", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden", "-g0")
"""No contraction to fused multiply-adds: every instruction set computes the same bits."""


@dataclass(frozen=True)
class Target:
    """A system with its processor."""

    name: str
    """As in `LOWMEM_TARGET`."""
    triple: str
    """zig's name, with the oldest version of the C library or of the system that the result runs on."""
    tag: str
    """The platform tag of the wheel."""

    @property
    def library(self) -> str:
        """The library's file name."""
        return library_name(self.triple)


TARGETS = {
    target.name: target
    for target in (
        Target("linux-x86_64", "x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64"),
        Target("linux-aarch64", "aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64"),
        Target("macos-arm64", "aarch64-macos.11.0", "macosx_11_0_arm64"),
        Target("macos-x86_64", "x86_64-macos.10.15", "macosx_10_15_x86_64"),
        Target("windows-x86_64", "x86_64-windows-gnu", "win_amd64"),
    )
}
"""By name; `make wheels` builds one wheel for each."""


def library_name(system: str = sys.platform) -> str:
    """The library's file name on a system: sys.platform's name or a triple of zig's."""
    if system.startswith("win") or "-windows" in system:
        return "_native.dll"
    return "_native.dylib" if system == "darwin" or "-macos" in system else "_native.so"


def asked_for() -> Target | None:
    """The target that the variable LOWMEM_TARGET names; None means this machine. Raises SystemExit."""
    name = os.environ.get("LOWMEM_TARGET")
    if not name:
        return None
    if name not in TARGETS:
        raise SystemExit(f"LOWMEM_TARGET={name} is not one of {', '.join(TARGETS)}")
    return TARGETS[name]
