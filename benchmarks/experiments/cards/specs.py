"""Public figures of GPU families and consumer cards, each with its source. None was measured by lowmem."""

from __future__ import annotations

from dataclasses import dataclass

_GUIDE = "CUDA C++ Programming Guide: compute capabilities, arithmetic throughput; cccl: arch_traits.cuh"


@dataclass(frozen=True)
class Family:
    """A family of processors that kernels are compiled for."""

    name: str
    """As "sm_86" or "gfx1100"."""
    warp: int = 32
    """Threads that run in step."""
    warps: int = 48
    """That a multiprocessor holds at most."""
    programs: int = 16
    """That a multiprocessor holds at most."""
    shared: int = 0
    """Bytes of shared memory of a multiprocessor; 0: the compiler reports the occupancy."""
    reserved: int = 1024
    """Bytes of shared memory that the driver takes for each program."""
    float_lanes: int = 128
    """Float32 operations of a multiprocessor in a clock, a fused multiply-add being one."""
    integer_lanes: int = 64
    """Logical operations and shifts in a clock."""
    source: str = _GUIDE

    @property
    def backend(self) -> str:
        """Of Triton."""
        return "hip" if self.name.startswith("gfx") else "cuda"

    @property
    def arch(self) -> int | str:
        """As Triton names it."""
        return self.name if self.backend == "hip" else int(self.name.removeprefix("sm_"))


_RDNA = "AMD RDNA 3 and RDNA 4 instruction set references: two SIMDs of 32 lanes in a compute unit"
FAMILIES = {
    family.name: family
    for family in (
        Family("sm_75", warps=32, shared=64 << 10, reserved=0, float_lanes=64),
        Family("sm_80", warps=64, programs=32, shared=164 << 10, float_lanes=64),
        Family("sm_86", shared=100 << 10),
        Family("sm_89", programs=24, shared=100 << 10),
        Family("sm_90", warps=64, programs=32, shared=228 << 10),
        Family("sm_100", warps=64, programs=32, shared=228 << 10),
        Family("sm_120", programs=24, shared=100 << 10),
        Family("gfx90a", warp=64, float_lanes=64, source="AMD CDNA 2 instruction set reference"),
        Family("gfx1100", float_lanes=64, source=_RDNA),
        Family("gfx1201", float_lanes=64, source=_RDNA),
    )
}
ISSUE_LANES = {"cuda": 128, "hip": 64}
"""Lanes for which a multiprocessor (AMD: a compute unit) issues an instruction in a clock."""
LATENCY_CLOCKS = 800
"""Of a read from a card's memory: the upper end of the "400 to 800 clock cycles" in NVIDIA's CUDA C
Programming Guide (Device Memory Accesses, as long as it gave a figure). An assumption."""
REACHABLE = 0.8
"""Share of a card's nominal bandwidth that decode is assumed to reach."""


@dataclass(frozen=True)
class Card:
    """A consumer card."""

    name: str
    family: str
    processors: int
    """Multiprocessors, or AMD's compute units."""
    megahertz: int
    """Boost clock."""
    bandwidth: int
    """10⁹ bytes a second, nominal."""
    memory: int
    """GiB."""
    source: str


CARDS = (
    Card("RTX 2060", "sm_75", 30, 1680, 336, 6, "fpsbench.com"),
    Card("RTX 3060 12GB", "sm_86", 28, 1777, 360, 12, "cputronic.com, siliconcat.net"),
    Card("RTX 3090", "sm_86", 82, 1695, 936, 24, "holynerdvana.blogspot.com, 2022-11-01"),
    Card("RTX 4060", "sm_89", 24, 2460, 272, 8, "fpsbench.com"),
    Card("RTX 4060 Ti 16GB", "sm_89", 34, 2535, 288, 16, "cputronic.com, thefpsreview.com"),
    Card("RTX 4090", "sm_89", 128, 2520, 1008, 24, "chipsandcheese.com, 2022-11-02; cputronic.com"),
    Card("RTX 5090", "sm_120", 170, 2407, 1792, 32, "Linux Format, May 2025"),
    Card("RX 7900 XTX", "gfx1100", 96, 2500, 960, 24, "guru3d.com, review of the Hellhound, page 4"),
    Card("RX 9070 XT", "gfx1201", 64, 2970, 640, 16, "azhotdeal.com, of AMD's specifications"),
)
