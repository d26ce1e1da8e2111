"""Embeddings and heads in the float16 that they are stored in, beside activations in bfloat16 on a CPU.

A float16 model runs in bfloat16 there (`loader.default_dtype`). To cast its embeddings took most of a load,
rounded every value, and put a copy beside the file's pages: 0.7 GB of StarChat Alpha. Now the tables stay in
their file. Rows are cast as they are looked up, and our own kernels multiply by the head as it is: exactly.

The tables are buffers: transformers takes the dtype of a model's first parameter for that of its activations,
and a tensor that is no parameter is still known as one of its file.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lowmem.kernels import dispatch
from lowmem.kernels.native import header
from lowmem.kernels.native import linear as native_linear

_CAST_WEIGHTS = 1 << 21  # of a head at a time, for more rows than our own kernels take: 12 MiB of copies


class StoredEmbedding(nn.Embedding):
    """ids → rows in `activations`, a dtype, of a table in float16. Empty, on meta, until it is filled."""

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
    """x [..., in] → [..., out] in x's dtype, with a float16 weight. Empty, on meta, until it is filled."""

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
            # By way of float32, as torch casts fastest (see placing.py).
            weight, bias = self.weight[rows].float(), None if self.bias is None else self.bias[rows]
            result[..., rows] = nn.functional.linear(input, weight.to(input.dtype), bias)
        return result


def keep_as_stored(model: nn.Module, names: Iterable[str], activations: torch.dtype) -> None:
    """Swap the tables among the named tensors, which are stored in float16, for ones that keep it.

    model: on meta, its tied weights tied. names: of the model's tensors. Only plain embeddings outside of the
    decoder layers (of tokens and of positions) and a plain head are swapped, and of what is tied all or
    nothing. Nothing at all for other `activations` than bfloat16, or without our own kernels.
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
