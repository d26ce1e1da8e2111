"""GGUF files read by the gguf package's own reader."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch


def tensors_of(file: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Type and float32 values of every tensor."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        found[tensor.name] = (tensor.tensor_type.name, torch.from_numpy(np.array(values)).view(shape))
    return found


def fields_of(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
