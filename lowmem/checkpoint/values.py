"""Checks of a tensor's values that allocate nothing of the tensor's size."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that are complete without scales."""


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; `torch.isfinite` would allocate several copies."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
