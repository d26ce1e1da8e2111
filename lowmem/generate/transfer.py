"""Numbers between the host and the device. A decode step makes the host wait for a card once: in `fetch`."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def send(ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """Integers [n] on the device, without waiting for it.

    One number is filled in by a kernel. More are copied from pinned memory, which torch reuses only after the
    copy; a copy from pageable memory would wait until the device has finished everything before it.
    """
    if len(ids) == 1:
        return torch.full((1,), ids[0], dtype=torch.int64, device=device)
    numbers = torch.tensor(ids, dtype=torch.int64)
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


def fetch(*parts: torch.Tensor) -> list[list[float]]:
    """The numbers of some tensors of one device, each of any shape, in one transfer.

    They travel as float64, which holds float32 and integers up to 2^53 exactly.
    """
    flat = [part.reshape(-1).to(torch.float64) for part in parts]
    numbers: list[float] = torch.cat(flat).tolist()
    found, start = [], 0
    for part in flat:
        found.append(numbers[start : start + len(part)])
        start += len(part)
    return found
