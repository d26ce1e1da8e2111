"""Embeddings and heads that keep the float16 of their file while activations are bfloat16, on a CPU.

A float16 model runs in bfloat16 on a CPU (`loader.default_dtype`). Casting its embeddings took most of the
load time, rounded every value, and needed memory beside the page cache: 0.7 GB for StarChat Alpha. Instead
the tables stay mapped. Rows are cast on lookup, and our kernels multiply by the float16 head itself.

The tables are buffers, since transformers takes the dtype of a model's first parameter for the dtype of its
activations.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lowmem.kernels import dispatch
from lowmem.kernels.native import header
from lowmem.kernels.native import linear as native_linear

_CAST_WEIGHTS = 1 << 21  # of a head, cast at a time for more rows than our kernels take: 12 MiB of copies


class StoredEmbedding(nn.Embedding):
    """ids → rows of a float16 table, cast to the dtype `activations`. On the meta device until filled."""

    def __init__(self, embedding: nn.Embedding, activations: torch.dtype) -> None:
        super().__init__(
            embedding.num_embeddings,
            embedding.embedding_dim,
            padding_idx=embedding.padding_idx,
            device="meta",
            dtype=torch.float16,
        )
        _make_buffer(self)
        self.activations = activations

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """ids [...] → [..., embedding_dim]."""
        return super().forward(input).to(self.activations)


class StoredHead(nn.Linear):
    """x [..., in] → [..., out] in x's dtype, with a float16 weight. On the meta device until filled."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=False, device="meta", dtype=torch.float16
        )
        _make_buffer(self)
        self.register_parameter("bias", linear.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]; for header.DECODE_ROWS or fewer nothing is rounded but the result."""
        if input.numel() <= header.DECODE_ROWS * self.in_features and native_linear.takes_dense(
            input, self.weight, self.bias
        ):
            return native_linear.dense_linear(input, self.weight, self.bias)
        step = max(1, _CAST_WEIGHTS // max(1, self.in_features))
        result = input.new_empty((*input.shape[:-1], self.out_features))
        for first in range(0, self.out_features, step):
            rows = slice(first, first + step)
            # Through float32, which is the fastest way for torch (see placing.py).
            weight, bias = self.weight[rows].float(), None if self.bias is None else self.bias[rows]
            result[..., rows] = nn.functional.linear(input, weight.to(input.dtype), bias)
        return result


def keep_as_stored(model: nn.Module, names: Iterable[str], activations: torch.dtype) -> None:
    """Replace embeddings and head of a model by ones that stay in float16.

    model: on the meta device, with tied weights tied. names: of tensors that are stored in float16. Only
    plain embeddings outside the decoder layers (tokens and positions) and a plain head are replaced; of tied
    tables, all or none. Does nothing unless `activations` is bfloat16 and our kernels are available.
    """
    if activations is not torch.bfloat16 or dispatch.why_not_native():
        return
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(parameters[name]) for name in names if name in parameters}
    found: list[tuple[str, nn.Embedding | nn.Linear]] = []
    for name, module in model.named_modules():
        if type(module) is nn.Embedding:
            in_layer = any(part.isdigit() for part in name.split("."))  # "transformer.h.0.…"
            suitable = module.max_norm is None and not in_layer
        else:
            suitable = type(module) is nn.Linear and module is head
        if suitable:
            found.append((name, module))  # type: ignore[arg-type]
        for leaf, parameter in module.named_parameters(recurse=False):
            if not (suitable and leaf == "weight"):
                wanted.discard(id(parameter))
    for name, module in found:
        if id(module.weight) in wanted:
            parent, _, child = name.rpartition(".")
            new: nn.Module = (
                StoredHead(module) if isinstance(module, nn.Linear) else StoredEmbedding(module, activations)
            )
            setattr(model.get_submodule(parent), child, new.train(module.training))


def _make_buffer(module: nn.Module) -> None:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    del module.weight
    module.register_buffer("weight", weight.detach())
