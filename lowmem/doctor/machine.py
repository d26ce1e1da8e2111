"""What this machine has: software, cards, CPU, memory and disk."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

from lowmem.cards.find import cards_of, found_cards
from lowmem.cards.kinds import KINDS
from lowmem.errors import OutputError
from lowmem.kernels.triton.presence import compiler, nvcc
from lowmem.platform import system

PACKAGES = ("torch", "transformers", "gptqmodel", "bitsandbytes", "triton")
_TRITONS = (
    "pytorch-triton-xpu",
    "triton-xpu",
    "pytorch-triton-rocm",
    "triton-rocm",
    "triton-windows",
    "triton",
)
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "asimd",
    "asimddp",
    "i8mm",
)


@dataclass(frozen=True)
class Card:
    """A card as torch sees it."""

    device: str
    """As "cuda:0"."""
    label: str
    """See `Cards.label`: "CUDA", "ROCm", "XPU", "MPS"."""
    name: str
    capability: str
    """As "8.6" or "gfx1100"; "" where there is none."""
    total: int
    """Bytes of memory."""
    free: int
    """Bytes of free memory."""
    bfloat16: bool
    """Whether it multiplies bfloat16 in hardware."""


@dataclass(frozen=True)
class Machine:
    """The result of `look`. None means absent."""

    python: str
    """Its version."""
    platform: str
    versions: dict[str, str]
    """Of the installed packages among PACKAGES."""
    torch_error: str
    """Why torch cannot be imported, or empty."""
    cuda_build: str | None
    """The CUDA version that torch was built for."""
    driver: str | None
    """Version of the NVIDIA driver."""
    driver_cuda: tuple[int, int] | None
    """The newest CUDA version (major, minor) that the driver supports."""
    cards: tuple[Card, ...]
    nvcc: str | None
    """Path of CUDA's compiler."""
    compiler: str | None
    """Path of the C compiler."""
    cpu: str
    flags: frozenset[str]
    """Flags of the CPU among CPU_FLAGS."""
    memory_total: int
    memory_available: int
    limit: int | None
    """Memory limit of the container, in bytes."""
    cache: Path | None
    """lowmem's cache folder; None for a user without a home folder."""
    disk_free: int
    """Bytes free on the cache's disk."""
    builds: tuple[str, ...] = ()
    """What torch was built for beside CUDA, as "ROCm 7.1"."""
    drivers: tuple[str, ...] = ()
    """Labels of the cards beside CUDA's whose driver is installed."""


def look() -> Machine:
    """Examine the machine. Imports torch if possible; leaves empty what cannot be determined."""
    import psutil

    from lowmem.checkpoint.cache import cache_root
    from lowmem.checkpoint.files.whole import free_bytes
    from lowmem.plan.bandwidth import machine_name
    from lowmem.plan.device import host_memory_available

    torch_error, builds, cards = _torch_side()
    cuda_build = next((build[5:] for build in builds if build.startswith("CUDA ")), None)
    try:
        cache: Path | None = cache_root()
    except OutputError:
        cache = None
    return Machine(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=_versions(),
        torch_error=torch_error,
        cuda_build=cuda_build,
        driver=_driver_version(),
        driver_cuda=_driver_cuda(),
        cards=cards,
        nvcc=nvcc(),
        compiler=compiler(),
        cpu=machine_name(),
        flags=frozenset(CPU_FLAGS) & system.processor_flags(),
        memory_total=int(psutil.virtual_memory().total),
        memory_available=host_memory_available(),
        limit=_memory_limit(),
        cache=cache,
        disk_free=free_bytes(cache or Path("/")),
        builds=tuple(build for build in builds if not build.startswith("CUDA ")),
        drivers=tuple(kind.label for kind in KINDS[1:] if kind.driver_present()),
    )


def _torch_side() -> tuple[str, tuple[str, ...], tuple[Card, ...]]:
    """(torch_error, what torch was built for, cards) of Machine."""
    from lowmem.checkpoint.files.reading import one_line

    try:
        builds = tuple(build for kind in KINDS if (build := kind.build()))
        cards = []
        for device in found_cards():
            kind = cards_of(device)
            with contextlib.suppress(RuntimeError):
                found, (free, total) = kind.properties(device), kind.memory(device)
                cards.append(
                    Card(str(device), kind.label, found.name, found.capability, total, free, found.bfloat16)
                )
    except Exception as error:  # a broken installation may raise anything
        return f"{type(error).__name__}: {one_line(error)}", (), ()
    return "", builds, tuple(cards)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        for wheel in _TRITONS if name == "triton" else (name,):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(wheel)
    return found


def _driver_version() -> str | None:
    """The version from the kernel module on Linux; elsewhere only whether the library is installed."""
    with contextlib.suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text().split()
        version = next((word for word in words if word[:1].isdigit() and "." in word), None)
        if version:
            return version
    return "of unknown version" if _driver_library() is not None else None


def _driver_cuda() -> tuple[int, int] | None:
    library = _driver_library()
    number = ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _driver_library() -> ctypes.CDLL | None:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _memory_limit() -> int | None:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path(file).read_text())
            return limit if limit < 1 << 60 else None  # cgroup v1 has a huge number for no limit
    return None
