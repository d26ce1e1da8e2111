"""What a model's token embedding says of the model: its vocabulary, its device, the dtype of activations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch


@dataclass(frozen=True)
class TokenTable:
    """The token embedding of a model, whatever it stores its rows in."""

    vocabulary: int
    """Rows: token ids are less."""
    device: torch.device
    activations: torch.dtype
    """Of the rows that it looks up."""


def token_table(model: Any) -> TokenTable:
    """Describe the input embedding of a transformers model."""
    module = model.get_input_embeddings()
    tensor = next(chain(module.parameters(), module.buffers()))
    activations = getattr(module, "activations", tensor.dtype)
    return TokenTable(int(module.num_embeddings), tensor.device, activations)
