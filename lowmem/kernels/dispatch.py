"""Which kernel multiplies the packed linears on a device, and why. GPTQModel is imported for a card alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lowmem.checkpoint.manifest import GptqFormat
from lowmem.kernels import cuda
from lowmem.kernels.cuda import REFERENCE, KernelChoice

__all__ = ["REFERENCE", "KernelChoice", "choose_kernel", "install"]

_ON_CPU = KernelChoice(REFERENCE, "on a CPU the packed weights are multiplied by lowmem's own plain torch")


def choose_kernel(device: torch.device, format: GptqFormat, dtype: torch.dtype) -> KernelChoice:
    """The kernel that `install` would try first, tried on a small linear; its reason is for the user.

    On a card this imports GPTQModel (seconds) and may compile a kernel (minutes, once).
    """
    return cuda.best_kernel(format, device, dtype) if device.type == "cuda" else _ON_CPU


def install(
    model: nn.Module,
    format: GptqFormat,
    device: torch.device,
    dtype: torch.dtype,
    notify: Callable[[str], None] | None = None,
) -> str:
    """Give the packed linears of a filled model their kernels; the name of what was chosen.

    Linears that are not on a CUDA card keep the reference. notify: told before a kernel is tried that may
    have to be compiled. Raises torch.OutOfMemoryError when a repacked linear does not fit.
    """
    if device.type != "cuda":
        return _ON_CPU.name
    candidates = cuda.gptqmodel_candidates(format, device, dtype)
    return cuda.replace_linears(model, format, device, dtype, candidates, notify).name
