"""Choose how a linear's kernels are launched."""

from __future__ import annotations

import torch

from lowmem.cards.find import cards_of, is_card
from lowmem.checkpoint.dequantize import PackedLinear
from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.triton.choice import Choice, usual


def choose(linear: PackedLinear, dtype: torch.dtype) -> Choice:
    """The launches for a linear."""
    spec = LinearSpec(linear.in_features, linear.out_features, linear.bias is not None, linear.format)
    device = linear.qweight.device
    count = cards_of(device).properties(device).multiprocessors if is_card(device) else 1
    return usual(spec, count)
