"""Choose how a linear's kernels are launched."""

from __future__ import annotations

import torch

from lowmem.checkpoint.dequantize import PackedLinear
from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.triton.choice import Choice, usual


def choose(linear: PackedLinear, dtype: torch.dtype) -> Choice:
    """The launches for a linear."""
    spec = LinearSpec(linear.in_features, linear.out_features, linear.bias is not None, linear.format)
    device = linear.qweight.device
    count = 1
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    return usual(spec, count)
