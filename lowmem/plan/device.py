"""The memory of this machine.

torch is imported only by the functions that ask a card: planning without one must not wait for it.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from lowmem.cards.find import cards_of, is_card
from lowmem.errors import MemoryBudgetError, RecipeError
from lowmem.kernels.registry import KernelSupport
from lowmem.kernels.triton.presence import why_not_triton
from lowmem.platform import system

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def parse_bytes(text: str, option: str) -> int:
    """`8GiB`, `512 MiB`, `8G`, `8GB` or plain bytes. Raises RecipeError with the name of the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    amount = int(float(match[1]) * {**_UNITS, **_BINARY}[match[2] or ""]) if match else 0
    if amount <= 0:
        raise RecipeError(f"{option} {text!r} is not an amount of memory", "Write it as 8GiB or 512MiB")
    return amount


@dataclass(frozen=True)
class MemoryUse:
    """Memory of this process, in bytes."""

    host: int
    """Resident memory."""
    host_peak: int
    card: int = 0
    """Allocated by torch on the card."""
    card_peak: int = 0


def memory_use(device: torch.device) -> MemoryUse:
    """The memory that this process uses now, and its peak."""
    host = host_memory_used()
    peak = max(host, host_memory_peak())
    if not is_card(device):
        return MemoryUse(host, peak)
    cards = cards_of(device)
    return MemoryUse(host, peak, cards.allocated(device), cards.peak(device))


def host_memory_used() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def host_memory_peak() -> int:
    """Peak of the resident bytes of this process."""
    return system.memory_peak()


def host_memory_private() -> int:
    """Resident bytes of this process that no file backs; exiting would free them."""
    private = system.memory_private()
    return host_memory_used() if private is None else private


def host_memory_available() -> int:
    """Memory available to this process, in bytes.

    This is the machine's available memory or what remains of the container's limit, whichever is smaller.
    """
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
    """Have glibc return freed blocks of at least `smallest` bytes to the system at once.

    By default glibc keeps freed blocks of up to 32 MiB, which a plan cannot predict. A smaller threshold
    costs time, since each such block is mapped anew. Does nothing with other C libraries.
    """
    system.return_freed_memory(smallest)


def trim_memory() -> None:
    """Have glibc return all freed pages to the system. Takes half a millisecond.

    malloc keeps freed pages between small blocks in use; how many varies between runs. Does nothing with
    other C libraries.
    """
    system.trim_memory()


def card_memory_free(device: torch.device) -> int:
    """Free bytes of a card now, with what the driver needs for this process already allocated."""
    try:
        free, _total = cards_of(device).memory(device)
    except RuntimeError as error:
        raise MemoryBudgetError(
            f"the free memory of {device} cannot be determined: {error}", "Use --device cpu"
        ) from error
    return free


def shares_memory(card: torch.device) -> bool:
    """Whether a card's memory is the host's."""
    return cards_of(card).properties(card).shares_memory


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    import torch

    if is_card(device):
        return cards_of(device).properties(device).bfloat16
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def kernel_support(card: torch.device | str | None) -> KernelSupport:
    """What the kernels of this machine depend on, beside a card or without one.

    For a card that is only named, as without one, it is what a machine has where our kernels run.
    """
    if card is None:
        return KernelSupport(packs_nf4())
    return KernelSupport(packs_nf4(), not why_not_triton(str(card)), bool(cards_of(card).triton))


def packs_nf4() -> bool:
    """Whether bitsandbytes repacks NF4 weights for this CPU, as it does with AVX-512 BF16."""
    return "avx512_bf16" in system.processor_flags()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed, on a card or on the host."""
    torch = sys.modules.get("torch")  # not imported: then the error is not torch's
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(
        sign in text for sign in ("out of memory", "can't allocate memory", "cannot allocate memory")
    )
