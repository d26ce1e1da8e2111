"""The facts of this machine, looked up once: what the doctor's first lines are made of."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("torch", "transformers", "optimum", "gptqmodel", "bitsandbytes", "triton")
CPU_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile")


@dataclass(frozen=True)
class Card:
    """A CUDA card as torch sees it; total and free in bytes; capability (major, minor)."""

    index: int
    name: str
    capability: tuple[int, int]
    total: int
    free: int
    bfloat16: bool


@dataclass(frozen=True)
class Machine:
    """What was found.

    versions: of the packages that are installed. torch_error: why torch cannot be imported, or nothing.
    cuda_build: the CUDA that torch was built for, None without. driver: its version as text, None without a
    driver; driver_cuda: the newest CUDA (major, minor) that it can run. nvcc, compiler: paths, or None.
    flags: those of CPU_FLAGS that the CPU has. limit: the container's memory limit, None without one.
    """

    python: str
    platform: str
    versions: dict[str, str]
    torch_error: str
    cuda_build: str | None
    driver: str | None
    driver_cuda: tuple[int, int] | None
    cards: tuple[Card, ...]
    nvcc: str | None
    compiler: str | None
    cpu: str
    flags: frozenset[str]
    memory_total: int
    memory_available: int
    limit: int | None
    cache: Path
    disk_free: int


def look() -> Machine:
    """Look. What cannot be found out is left empty; imports torch, if it can be."""
    import psutil

    from lowmem.checkpoint.cache import cache_root
    from lowmem.plan.bandwidth import machine_name
    from lowmem.plan.device import host_memory_available

    torch_error, cuda_build, cards = _torch_side()
    cache = cache_root()
    there = next((folder for folder in (cache, *cache.parents) if folder.exists()), Path("/"))
    return Machine(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=_versions(),
        torch_error=torch_error,
        cuda_build=cuda_build,
        driver=_driver_version(),
        driver_cuda=_driver_cuda(),
        cards=cards,
        nvcc=find_nvcc(),
        compiler=find_compiler(),
        cpu=machine_name(),
        flags=_cpu_flags(),
        memory_total=int(psutil.virtual_memory().total),
        memory_available=host_memory_available(),
        limit=_memory_limit(),
        cache=cache,
        disk_free=shutil.disk_usage(there).free,
    )


def find_nvcc() -> str | None:
    """CUDA's compiler, where PyTorch's extensions look for it."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_compiler() -> str | None:
    """The C compiler that Triton would use; None without torch, which then needs none."""
    try:
        from lowmem.kernels.gptqmodel import compiler
    except Exception:  # a broken torch has its own line
        return None
    return compiler()


def _torch_side() -> tuple[str, str | None, tuple[Card, ...]]:
    """(why torch cannot be imported, its CUDA build, the cards that it sees)."""
    from lowmem.checkpoint.files.reading import one_line

    try:
        import torch

        build = torch.version.cuda
        if not torch.cuda.is_available():
            return "", build, ()
        cards = []
        for index in range(torch.cuda.device_count()):
            with contextlib.suppress(RuntimeError), torch.cuda.device(index):
                properties = torch.cuda.get_device_properties(index)
                free, total = torch.cuda.mem_get_info(index)
                cards.append(
                    Card(
                        index,
                        properties.name,
                        (properties.major, properties.minor),
                        total,
                        free,
                        torch.cuda.is_bf16_supported(including_emulation=False),
                    )
                )
    except Exception as error:  # a broken installation fails in its own way
        return f"{type(error).__name__}: {one_line(error)}", None, ()
    return "", build, tuple(cards)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _driver_version() -> str | None:
    """From the kernel module on Linux; else that the driver's library is there."""
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


def _cpu_flags() -> frozenset[str]:
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as lines:
        flags = next(line for line in lines if line.startswith("flags")).split()
        return frozenset(CPU_FLAGS) & set(flags)
    return frozenset()


def _memory_limit() -> int | None:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path(file).read_text())
            return limit if limit < 1 << 60 else None  # without a limit the old file holds a huge number
    return None
