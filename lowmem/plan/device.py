"""What this machine has: the only place that asks CUDA.

torch is imported when a card is asked for, not before: a plan for a card that is only named needs none.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from lowmem.errors import InvalidRequestError, MemoryBudgetError, RecipeError

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def parse_bytes(text: str, option: str) -> int:
    """`8GiB`, `512 MiB`, `8G`, `8GB` or plain bytes. Raises RecipeError naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if not match:
        raise RecipeError(f"{option} {text!r} is not an amount of memory", "Write it as 8GiB or 512MiB")
    unit = match[2] or ""
    amount = int(float(match[1]) * {**_UNITS, **_BINARY}[unit])
    if amount <= 0:
        raise RecipeError(f"{option} {text!r} is nothing", "Write it as 8GiB or 512MiB")
    return amount


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of this process: resident on the host, and allocated by torch on a card, now and at most."""

    host: int
    host_peak: int
    card: int = 0
    card_peak: int = 0


def memory_use(device: torch.device) -> MemoryUse:
    """What this process holds now, and has held at most."""
    host, peak = host_memory_used(), host_memory_peak()
    if device.type != "cuda":
        return MemoryUse(host, max(host, peak))
    import torch

    return MemoryUse(
        host,
        max(host, peak),
        int(torch.cuda.memory_allocated(device)),
        int(torch.cuda.max_memory_allocated(device)),
    )


def cuda_driver_present() -> bool:
    """Whether the CUDA driver's library is on this machine; without it no card can be there."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def resolve_device(name: str) -> torch.device:
    """`auto` (the first CUDA card, or else the CPU), `cpu`, `cuda` or `cuda:N`.

    Raises InvalidRequestError for a name that means nothing, or a card that is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if not match:
        raise InvalidRequestError(f"--device {name!r} is not known", "Use auto, cpu, cuda or cuda:N")
    index = int(match[1] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        found = f"torch sees {count} CUDA card{'s' if count != 1 else ''}"
        raise InvalidRequestError(
            f"--device {name} is not there: {found}", "Use --device cpu, or install the driver"
        )
    return torch.device("cuda", index)


def host_memory_used() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def host_memory_peak() -> int:
    """The most resident bytes that this process has had.

    Linux's own high-water mark where there is one: the `ru_maxrss` of a process counts its parent's memory
    at the time of the fork as well.
    """
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def host_memory_available() -> int:
    """Bytes that this process may still take: the machine's, or its container's if that is less."""
    available = int(psutil.virtual_memory().available)
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit_file) as limit, open(used_file) as used:
                available = min(available, int(limit.read()) - int(used.read()))
        except (OSError, ValueError):
            continue
    return max(available, 0)


def return_freed_memory(smallest: int = 4 << 20) -> None:
    """Have the C library give freed blocks of `smallest` bytes and more back to the system at once.

    Smaller ones cost time: each block is new pages. glibc keeps blocks of up to 32 MiB for itself once it has
    seen one freed, which a plan cannot know. Other C libraries are left as they are.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    try:
        ctypes.CDLL(None).mallopt(mmap_threshold, smallest)
    except (OSError, AttributeError):
        return


def trim_memory() -> None:
    """Have the C library give every freed page back to the system that it keeps. Takes half a millisecond.

    Small blocks that live on between large ones that went leave pages which neither are used nor go by
    themselves; how many there are changes from one hour to the next. Other C libraries are left as they are.
    """
    try:
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
    except (OSError, AttributeError):
        return


def card_memory_free(device: torch.device) -> int:
    """Free bytes of a CUDA card as it stands now, this process's own context already taken off."""
    import torch

    try:
        free, _total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        raise MemoryBudgetError(
            f"{device} does not tell its free memory: {error}", "Use --device cpu"
        ) from error
    return int(free)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware here."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def host_memory_private() -> int:
    """Resident bytes of this process that no file backs: what it would give back by ending."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return host_memory_used()


def packs_nf4() -> bool:
    """Whether bitsandbytes repacks NF4 weights for this CPU: it does where bfloat16 products are hardware."""
    try:
        with open("/proc/cpuinfo") as cpu:
            return any("avx512_bf16" in line for line in cpu if line.startswith("flags"))
    except OSError:
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, on a card or on the host."""
    if isinstance(error, MemoryError):
        return True
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(
        sign in text for sign in ("out of memory", "can't allocate memory", "cannot allocate memory")
    )
