"""Numbers between the host and the device. A decode step makes the host wait for a card once: in `fetch`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowmem.cards.find import cards_of, is_card, widest_float


def send(ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """Integers [n] on the device, without waiting for it.

    One number is filled in by a kernel. More are copied from pinned memory, which torch reuses only after the
    copy; a copy from pageable memory would wait until the device has finished everything before it.
    """
    if len(ids) == 1:
        return torch.full((1,), ids[0], dtype=torch.int64, device=device)
    numbers = torch.tensor(ids, dtype=torch.int64)
    if device.type == "cpu" or (is_card(device) and not cards_of(device).pins):
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


def fetch(*parts: torch.Tensor) -> list[list[float]]:
    """The numbers of some tensors of one device, each of any shape, in one transfer.

    They travel as float64, which holds float32 and integers up to 2^53 exactly; from a card without it as
    float32, which holds integers up to 2^24: more than a vocabulary has.
    """
    wide = widest_float(parts[0].device)
    flat = [part.reshape(-1).to(wide) for part in parts]
    numbers: list[float] = torch.cat(flat).tolist()
    found, start = [], 0
    for part in flat:
        found.append(numbers[start : start + len(part)])
        start += len(part)
    return found
