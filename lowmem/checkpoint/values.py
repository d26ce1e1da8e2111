"""Questions about a tensor's values that take no memory of the tensor's size."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a weight is that can be taken for itself: smaller floats and integers mean nothing without scales."""


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; `torch.isfinite` would make several copies to say so."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
