"""Which cards there are, and which one a name means. Importing this module imports no torch."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from lowmem.cards.contract import Cards
from lowmem.cards.kinds import CUDA, KINDS, MPS, ROCM
from lowmem.errors import InvalidRequestError

if TYPE_CHECKING:
    import torch

DEVICES = "auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"
"""What --device takes."""
NOT_RUN = "never run on such a card by us: choosing, planning and reporting are tested with stand-ins"
"""Said of every kind but CUDA."""
WITH_FLOAT64 = "auto, cpu, cuda, cuda:N, xpu or xpu:N"
"""What it takes for work that needs 64-bit floats."""

_WIDEST: dict[torch.device, torch.dtype] = {}


def is_card(device: torch.device | str) -> bool:
    """Whether a device is a card, and not the CPU. Imports no torch."""
    return _type_of(device) in {cards.type for cards in KINDS}


def cards_of(device: torch.device | str) -> Cards:
    """The kind of a card. Raises ValueError for another device."""
    type = _type_of(device)
    if type == "cuda":
        return ROCM if _built_for_rocm() else CUDA
    found = next((cards for cards in KINDS if cards.type == type), None)
    if found is None:
        raise ValueError(f"{device} is not a card")
    return found


def found_cards() -> list[torch.device]:
    """Every card that torch sees, in the order in which `auto` prefers them."""
    import torch

    kinds = [cards_of(type) for type in ("cuda", "xpu", "mps")]
    return [torch.device(cards.type, index) for cards in kinds for index in range(cards.count())]


def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it, or else float32. Asked once for a device, for work in every token."""
    found = _WIDEST.get(device)
    if found is None:
        import torch

        narrow = is_card(device) and not cards_of(device).properties(device).float64
        found = _WIDEST[device] = torch.float32 if narrow else torch.float64
    return found


def is_timed(device: torch.device) -> bool:
    """Whether products on a device can be timed, to choose kernels and launches."""
    return is_card(device) and cards_of(device).timed


def driver_present() -> bool:
    """Whether `auto` may find a card here. Imports no torch."""
    return any(cards.driver_present() for cards in KINDS if cards is not MPS)


def automatic() -> torch.device:
    """The device for `auto`: the first CUDA or ROCm card, or else XPU card with its own memory, or the CPU.

    A GPU of Intel's or Apple's that shares the host's memory reads weights no faster than the CPU does. For
    Apple's there is also no kernel for packed weights but the reference.
    """
    import torch

    for device in found_cards():
        cards = cards_of(device)
        if device.type == "cuda" or not cards.properties(device).shares_memory:
            return device
    return torch.device("cpu")


def resolve_device(name: str, *, float64: bool = False) -> torch.device:
    """The device for one of DEVICES.

    float64: it must have 64-bit floats, which Apple's GPU and some of Intel's cards do not. Raises
    InvalidRequestError for an unknown name, and for a card that is not in this machine or lacks them.
    """
    import torch

    device = automatic() if name == "auto" else _named(name)
    if not float64 or not is_card(device) or cards_of(device).properties(device).float64:
        return device
    if name == "auto":
        return torch.device("cpu")
    raise InvalidRequestError(f"{name} has no 64-bit floats, which this needs", "Use --device cpu")


def _named(name: str) -> torch.device:
    import torch

    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"(cuda|xpu|mps)(?::(\d+))?", name)
    if not match:
        hint = f"Use {DEVICES}"
        if re.match(r"rocm|hip|amd", name.lower()):
            hint = "torch calls ROCm cards cuda: use cuda or cuda:N"
        raise InvalidRequestError(f"unknown device {name!r}", hint)
    cards, index = cards_of(match[1]), int(match[2] or 0)
    if index >= (count := cards.count()):
        advice = "install the driver" if cards is CUDA else "run `lowmem doctor` to see what is missing"
        raise InvalidRequestError(
            f"device {name} is not available: torch sees {count} {cards.label} card{'s' * (count != 1)}",
            f"Use --device cpu, or {advice}",
        )
    return torch.device(match[1], index)


def synchronize(device: torch.device) -> None:
    """Wait until a card has finished all queued work; a CPU has."""
    if is_card(device):
        cards_of(device).synchronize(device)


def using(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a card the one that kernels are launched on; on the CPU nothing changes."""
    return cards_of(device).using(device) if is_card(device) else contextlib.nullcontext()


def empty_caches() -> None:
    """Return the freed memory of all cards that torch keeps to their drivers."""
    for cards in {cards_of(device) for device in found_cards()}:
        cards.empty_cache()


def _type_of(device: torch.device | str) -> str:
    return device.partition(":")[0] if isinstance(device, str) else device.type


def _built_for_rocm() -> bool:
    import torch

    return torch.version.hip is not None
