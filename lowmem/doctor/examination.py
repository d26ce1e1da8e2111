"""All the lines of `lowmem doctor`, in order, each given as soon as it is known."""

from __future__ import annotations

import os
import urllib.request

from lowmem.doctor.facts import facts
from lowmem.doctor.machine import Card, Machine
from lowmem.doctor.report import Check, Checks, guarded

_HUB_SECONDS = 10


def examine(machine: Machine, *, quick: bool = False, refresh: bool = False, online: bool = False) -> Checks:
    """Facts, bandwidth, kernels, a whole model on each card, and the hub.

    quick: facts alone, nothing is computed. refresh: measure the memory's bandwidth anew. online: also ask
    the hub.
    """
    yield from facts(machine)
    if online:
        yield guarded("host", "hub", reach_hub, "Models on this machine work without it", "warning")
    if quick:
        return
    yield guarded("host", "bandwidth", lambda: host_line(refresh), "A plan then guesses speeds", "warning")
    if machine.torch_error or "torch" not in machine.versions:
        return
    yield from _computed(machine.cards)


def host_line(refresh: bool) -> str:
    """The bandwidth of the host's memory, and when it was measured."""
    from lowmem.plan.bandwidth import host_measurement

    found = host_measurement(refresh)
    return f"{found.bytes_per_second / 1e9:.1f} GB/s read by all cores, measured {found.date}"


def reach_hub() -> str:
    """The hub answers. Raises OSError when it does not."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=_HUB_SECONDS) as answer:
        return f"{url} answers ({answer.status})"


def card_line(card: Card) -> str:
    """The bandwidth of a card's memory."""
    import torch

    from lowmem.plan.bandwidth import card_bandwidth

    rate = card_bandwidth(torch.device("cuda", card.index))
    return f"{rate / 1e9:.0f} GB/s in a copy within its memory"


def _computed(cards: tuple[Card, ...]) -> Checks:
    """Multiplications on the CPU and on each card, then whole models on the cards."""
    try:
        import torch

        from lowmem.doctor.gpu import gpu_checks
        from lowmem.doctor.kernels import kernel_checks
    except Exception as error:  # a package that is broken may fail in any way while it is imported
        detail = f"{type(error).__name__}: {error}"
        yield Check("kernels", "import", "missing", detail, "Install lowmem again: pip install lowmem")
        return
    yield from kernel_checks(torch.device("cpu"), torch.bfloat16)
    for card in cards:
        device = torch.device("cuda", card.index)
        dtype = torch.bfloat16 if card.bfloat16 else torch.float16
        yield guarded(
            f"kernels on {device}",
            "bandwidth",
            lambda card=card: card_line(card),  # type: ignore[misc]
            "A plan then guesses speeds",
            "warning",
        )
        yield from kernel_checks(device, dtype)
        yield from gpu_checks(device, dtype)
