"""All checks of `lowmem doctor`, in the order of the report."""

from __future__ import annotations

import os
import urllib.request
from typing import TYPE_CHECKING

from lowmem.cards.find import is_timed
from lowmem.doctor.facts import facts
from lowmem.doctor.machine import Card, Machine
from lowmem.doctor.report import Check, Checks, guarded

if TYPE_CHECKING:
    import torch

_HUB_SECONDS = 10
_NO_BANDWIDTH = "lowmem plan cannot estimate tokens/s"


def examine(machine: Machine, *, quick: bool = False, refresh: bool = False, online: bool = False) -> Checks:
    """Software, hardware, the hub, memory bandwidth, kernels, and a whole model on each card.

    quick: skip everything that computes. refresh: measure the memory bandwidth again. online: check the hub.
    """
    yield from facts(machine)
    if online:
        yield guarded("host", "hub", reach_hub, "Models on this machine work without it", "warning")
    else:
        yield Check("host", "hub", "skipped", "not tried without --online")
    if quick:
        yield Check("kernels", "all", "skipped", "not tried with --quick")
        return
    yield guarded("host", "bandwidth", lambda: host_line(refresh), _NO_BANDWIDTH, "warning")
    if machine.torch_error or "torch" not in machine.versions:
        yield Check("kernels", "all", "skipped", "not tried without torch")
        return
    if not machine.cards:
        yield Check("kernels on a card", "all", "skipped", "not tried: no card")
    yield from _computed(machine.cards)


def host_line(refresh: bool) -> str:
    """The memory bandwidth of the host, and when it was measured."""
    from lowmem.plan.bandwidth import host_bandwidth

    found = host_bandwidth(refresh)
    return f"{found.bytes_per_second / 1e9:.1f} GB/s, read by all cores, measured {found.date}"


def reach_hub() -> str:
    """Raises OSError unless the hub answers."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=_HUB_SECONDS) as answer:
        return f"{url} answers ({answer.status})"


def card_line(card: Card) -> str:
    """The memory bandwidth of a card."""
    import torch

    from lowmem.plan.bandwidth import card_bandwidth

    rate = card_bandwidth(torch.device(card.device))
    return f"{rate / 1e9:.0f} GB/s, in a copy within the card"


def card_paces(device: torch.device, dtype: torch.dtype) -> Checks:
    """How fast decode reads weights of each width on a card, beside what its memory copies."""
    from lowmem.config import BITS
    from lowmem.doctor.kernels import pace
    from lowmem.plan.bandwidth import card_bandwidth

    if not is_timed(device):
        detail = f"not tried: products on {device} cannot be timed"
        yield Check(f"kernels on {device}", "pace", "skipped", detail)
        return
    try:
        rate = card_bandwidth(device)
    except Exception:  # its own check has reported it
        return
    for bits in BITS:
        yield guarded(
            f"kernels on {device}",
            f"{bits}-bit pace",
            lambda bits=bits: pace(bits, device, dtype, rate),  # type: ignore[misc]
            "Please report it, with this output",
            "warning",
        )


def _computed(cards: tuple[Card, ...]) -> Checks:
    """Kernels on the CPU and on each card, then whole models on the cards."""
    try:
        import torch

        from lowmem.doctor.gpu import gpu_checks
        from lowmem.doctor.kernels import kernel_checks
    except Exception as error:  # a broken package may raise anything on import
        detail = f"{type(error).__name__}: {error}"
        yield Check("kernels", "import", "missing", detail, "Install lowmem again: pip install lowmem")
        return
    yield from kernel_checks(torch.device("cpu"), torch.bfloat16)
    for card in cards:
        device = torch.device(card.device)
        dtype = torch.bfloat16 if card.bfloat16 else torch.float16
        yield guarded(
            f"kernels on {device}",
            "bandwidth",
            lambda card=card: card_line(card),  # type: ignore[misc]
            _NO_BANDWIDTH,
            "warning",
        )
        yield from kernel_checks(device, dtype)
        yield from card_paces(device, dtype)
        yield from gpu_checks(device, dtype)
