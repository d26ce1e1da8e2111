"""What a conversion is asked to do, and by what an interrupted one is recognised."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowmem.config import QuantConfig
from lowmem.errors import RecipeError
from lowmem.plan.device import bfloat16_is_fast

DEFAULT_SHARD = 4 << 30
RECIPE_VERSION = 1
"""Raised by every change to the converter that changes what it writes. Measurements record it."""


@dataclass(frozen=True)
class ConvertOptions:
    """How a conversion runs; only `store_head`, `shard_size` and `compute_dtype` change what it writes."""

    device: str = "auto"
    """"auto", "cpu" or "cuda:N"."""
    memory: int | None = None
    """The most bytes of host memory to use; None is what is free."""
    shard_size: int = DEFAULT_SHARD
    """Bytes of one safetensors file."""
    store_head: bool = False
    """Store a tied head too, for readers such as auto-gptq that do not support tied heads."""
    force: bool = False
    """Replace the output folder, and discard another unfinished conversion."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    compute_dtype: str = "auto"
    """Of the calibration's forward passes: "auto", "float32", "bfloat16" or "float16"."""


@dataclass(frozen=True)
class Recipe:
    """How each linear of a model is quantized."""

    config: QuantConfig
    """What holds for the whole model."""

    def of(self, linear: str) -> QuantConfig:
        """How one linear, given by its full name, is quantized: bits, group size, symmetry.

        Linears that share an input share a factored Hessian, and so the group size and the damping.
        """
        return self.config


def compute_dtype(requested: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype of the forward passes; "auto" is 16 bits where the hardware computes with them
    fast.
    """
    if requested == "auto":
        if stored == torch.float32:
            return torch.float32
        if stored == torch.float16 and device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    if requested not in ("float32", "bfloat16", "float16"):
        raise RecipeError(f"unknown --compute-dtype {requested!r}", "Use auto, float32, bfloat16 or float16")
    dtype: torch.dtype = getattr(torch, requested)
    return dtype
