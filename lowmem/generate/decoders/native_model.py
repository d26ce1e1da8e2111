"""A GPTBigCode model as the C library reads it: the structures of step.h, filled from its modules."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowmem.generate.cache.contract import Layout, Slot
from lowmem.generate.decoders.contract import DecoderRefused, Feed
from lowmem.kernels import dispatch
from lowmem.kernels.native import header
from lowmem.kernels.native import library as native
from lowmem.kernels.native.header import LmFeed, LmLayer, LmModel, LmNorm, LmWeight
from lowmem.kernels.native.linear import Packed
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.kernels.quantized_tables import QuantizedEmbedding, QuantizedHead, QuantizedTable
from lowmem.kernels.stored_embeddings import StoredEmbedding, StoredHead
from lowmem.models.embedding import token_table

MAX_ROWS = 512
"""The most rows of a forward: they need five float32 rows of n_embd and one of n_inner each."""
_HEAD_UNIT = 16  # head_dim is a multiple of it
# By transformers' names. gelu_new and gelu_fast are the same formula.
_ACTIVATIONS = {
    "gelu": header.GELU,
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), header.GELU_TANH),
}


@dataclass(frozen=True)
class _Bound:
    """A slot that the library reads and writes."""

    number: int
    """Its distance from the first slot that was bound, in slots."""
    pointers: list[tuple[int, int]]


class NativeModel:
    """The weights of a GPTBigCodeForCausalLM in bfloat16 on the CPU, with all shapes and dtypes checked.

    Holds every tensor and structure that the library gets pointers to. Raises DecoderRefused.
    """

    def __init__(self, model: Any) -> None:
        refusal = why_not(model)
        if refusal:
            raise DecoderRefused(refusal)
        self._keep: list[Any] = []
        self.tokens: QuantizedTable | None = None
        """Where token ids are looked up, if the embedding is quantized."""
        self.fed: torch.Tensor | None = None
        """Then the rows of a forward's ids, which the library reads in place of the embedding."""
        self.packed = True
        """Whether every linear before the head is packed, so that many rows are as fast as a prompt needs."""
        body, config = model.transformer, model.config
        attention, inner = body.h[0].attn, body.h[0].mlp.c_fc.out_features
        self.vocabulary, embd = int(body.wte.num_embeddings), int(body.wte.embedding_dim)
        self.positions = int(body.wpe.weight.shape[0])
        self._rows = attention.kv_heads, attention.head_dim
        self._cache: list[tuple[int, int]] = []  # where the rows of slot 0 are
        self._bound: dict[int, _Bound] = {}  # by the slot's index
        self._layers = (LmLayer * len(body.h))()
        for layer, block in zip(self._layers, body.h, strict=True):
            width = embd + 2 * attention.kv_heads * attention.head_dim
            layer.ln_1, layer.ln_2 = self._norm(block.ln_1, embd), self._norm(block.ln_2, embd)
            layer.c_attn = self._weight(block.attn.c_attn, embd, width)
            layer.attn_proj = self._weight(block.attn.c_proj, embd, embd)
            layer.c_fc = self._weight(block.mlp.c_fc, embd, block.mlp.c_fc.out_features)
            layer.mlp_proj = self._weight(block.mlp.c_proj, block.mlp.c_fc.out_features, embd)
            linears = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
            self.packed &= all(isinstance(linear, QuantLinear) for linear in linears)
        self._model = LmModel(
            layers=len(body.h),
            embd=embd,
            heads=attention.num_heads,
            kv_heads=attention.kv_heads,
            inner=inner,
            vocab=self.vocabulary,
            multi_query=int(config.multi_query),
            activation=_ACTIVATIONS[config.activation_function],
            epsilon=body.ln_f.eps,
            scaling=attention.scaling,
            wte_type=native.TYPES[_stored_dtype(body.wte)],
            wpe_type=native.TYPES[_stored_dtype(body.wpe)],
            wte=self._tokens(body.wte, (self.vocabulary, embd)),
            wpe=self._table(body.wpe, (self.positions, embd)),
            ln_f=self._norm(body.ln_f, embd),
            head=self._weight(model.lm_head, embd, self.vocabulary),
            layer=self._layers,
        )

    def forward(self, feeds: Sequence[Feed], wanted: Sequence[int]) -> torch.Tensor:
        """Append the ids of each feed to its slot, in one call for all.

        wanted: of each feed, of how many of its last ids the logits are wanted. Returns float32 logits
        [sum of wanted, vocab]. Raises DecoderRefused for a slot whose rows the library does not read, and
        ValueError for no ids or more than MAX_ROWS, ids outside of the vocabulary, and a slot that has no
        room for them or has new buffers.
        """
        ids = [token for feed in feeds for token in feed.ids]
        if not ids or len(ids) > MAX_ROWS or not all(feed.ids for feed in feeds):
            raise ValueError(f"a forward takes 1 to {MAX_ROWS} tokens, not {len(ids)}")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ValueError(f"a token id is outside of the vocabulary of {self.vocabulary}")
        fed = (LmFeed * len(feeds))(
            *[
                LmFeed(self._place(feed.slot, len(feed.ids)), feed.slot.length, len(feed.ids), keep)
                for feed, keep in zip(feeds, wanted, strict=True)
            ]
        )
        logits = torch.empty((sum(wanted), self.vocabulary), dtype=torch.float32)
        if self.tokens is not None and self.fed is not None:
            self.fed[: len(ids)] = self.tokens.lookup(torch.tensor(ids))
            ids = list(range(len(ids)))
        tokens = (ctypes.c_int64 * len(ids))(*ids)
        model, parts = ctypes.addressof(self._model), ctypes.addressof(fed)
        with native.running() as library:
            space = native.workspace(library.lm_forward_workspace(model, parts, len(feeds)))
            library.lm_forward(model, parts, len(feeds), tokens, logits.data_ptr(), space)
        for feed in feeds:
            feed.slot.advance(len(feed.ids))
        return logits

    def _place(self, slot: Slot, rows: int) -> int:
        """The number of the slot for the library, once `rows` more rows are known to fit."""
        bound = self._bound.get(slot.index)
        if bound is None:
            bound = self._bound[slot.index] = self._bind(slot)
        room = min(slot.capacity, self.positions)
        if slot.length + rows > room:
            raise ValueError(f"{slot.length + rows} tokens do not fit in a slot of {room}")
        if slot.pointers() != bound.pointers:
            raise ValueError("the KV cache has new buffers")
        return bound.number

    def _bind(self, slot: Slot) -> _Bound:
        kv_heads, head_dim = self._rows
        needed = Layout((kv_heads, slot.capacity, head_dim), torch.bfloat16, torch.device("cpu"))
        found = slot.layout()
        if found != needed:
            raise DecoderRefused(f"the KV cache must store {needed}, not {found}")
        pointers = slot.pointers()
        if not self._cache:
            self._cache, self._model.capacity = pointers, slot.capacity
            for layer, (keys, values) in zip(self._layers, pointers, strict=True):
                layer.keys, layer.values = keys, values
        if slot.capacity != self._model.capacity:
            raise DecoderRefused("the slots of the KV cache have different capacities")
        step = 2 * kv_heads * slot.capacity * head_dim
        apart = {
            here - first
            for both, known in zip(pointers, self._cache, strict=True)
            for here, first in zip(both, known, strict=True)
        }
        if len(apart) != 1 or (distance := apart.pop()) % step:
            raise DecoderRefused("the slots of the KV cache are not rows of one tensor")
        return _Bound(distance // step, pointers)

    def _tensor(
        self, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
    ) -> int:
        """The address of a contiguous tensor of this shape and dtype."""
        if (
            tensor is None
            or tuple(tensor.shape) != shape
            or tensor.dtype is not dtype
            or tensor.device.type != "cpu"
            or not tensor.is_contiguous()
            or tensor.data_ptr() % 2
        ):
            found = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            needed = str(dtype).removeprefix("torch.")
            raise DecoderRefused(f"a {needed} tensor of {list(shape)} is needed, not {found}")
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _tokens(self, embedding: Any, shape: tuple[int, ...]) -> int:
        """The address of the rows that tokens are looked up in."""
        if not isinstance(embedding, QuantizedEmbedding):
            return self._table(embedding, shape)
        if embedding.own is not None:
            raise DecoderRefused(f"an embedding is {type(embedding.own).__name__}")
        self.tokens = embedding.table
        self.fed = torch.zeros((MAX_ROWS, shape[1]), dtype=_stored_dtype(embedding))
        return self.fed.data_ptr()

    def _table(self, table: Any, shape: tuple[int, ...]) -> int:
        """The address of an embedding's weight."""
        return self._tensor(table.weight, shape, _stored_dtype(table))

    def _norm(self, norm: nn.Module, embd: int) -> LmNorm:
        if type(norm) is not nn.LayerNorm:
            raise DecoderRefused(f"a norm is {type(norm).__name__}")
        return LmNorm(self._tensor(norm.weight, (embd,)), self._tensor(norm.bias, (embd,)))

    def _packed(self, packed: Packed | None, inputs: int, outputs: int) -> LmWeight:
        if packed is None:
            raise DecoderRefused("a packed linear is not in the layout of the native kernels")
        if (packed.in_features, packed.out_features) != (inputs, outputs):
            raise DecoderRefused(f"a packed linear of {packed.in_features} to {packed.out_features}")
        self._keep.append(packed)
        return LmWeight(packed.address, None, packed.planes)

    def _weight(self, linear: Any, inputs: int, outputs: int) -> LmWeight:
        if isinstance(linear, QuantLinear):
            return self._packed(None if linear.order is not None else linear.packed, inputs, outputs)
        if isinstance(linear, QuantizedHead):
            return self._packed(linear.packed, inputs, outputs)
        if type(linear) not in (nn.Linear, StoredHead):
            raise DecoderRefused(f"a linear is {type(linear).__name__}")
        dtype = _stored_dtype(linear)
        weight = self._tensor(linear.weight, (outputs, inputs), dtype)
        bias = None if linear.bias is None else self._tensor(linear.bias, (outputs,))
        dense = header.LmDense(
            inputs, outputs, weight, bias, native.TYPES[torch.bfloat16], native.TYPES[dtype]
        )
        self._keep.append(dense)
        return LmWeight(None, ctypes.addressof(dense), 0)


def _stored_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that an embedding's or a linear's weight must have, or that its rows are looked up in.

    float16 holds products of an 8-bit integer and a float16 scale to 11 bits, bfloat16 to 8.
    """
    in_float16 = isinstance(module, StoredEmbedding | StoredHead | QuantizedEmbedding)
    return torch.float16 if in_float16 else torch.bfloat16


def why_not(model: Any) -> str:
    """Why this model has no native step, as far as its config and modules tell; "" if it may have one."""
    if refusal := dispatch.why_not_native():
        return refusal
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", "") != "gpt_bigcode" or not hasattr(model, "lm_head"):
        return "native steps exist for GPTBigCode only"
    table = token_table(model)
    dtype, device = table.activations, table.device
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return f"native steps need bfloat16 on the CPU, not {dtype} on {device}"
    if config.activation_function not in _ACTIVATIONS:
        return f"native steps do not implement the activation {config.activation_function}"
    if config.add_cross_attention or model.training:
        return "native steps need a decoder-only model in eval mode"
    if model.transformer.h[0].attn.head_dim % _HEAD_UNIT:
        return f"head_dim is not a multiple of {_HEAD_UNIT}"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "the model's modules have hooks, which a native step would not call"
    return ""
