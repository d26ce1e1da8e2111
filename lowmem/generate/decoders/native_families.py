"""The model families that the C library computes: step.h's structures, filled from transformers' modules.

Everything is checked that decides what a forward computes: the classes of the modules, their shapes and
dtypes, and the settings that change their arithmetic. The decoder then compares one forward with the
model's own.

To add a family whose layers are Llama's but for what `_llama_like` reads, name it in FAMILIES.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lowmem.generate.decoders.contract import DecoderRefused
from lowmem.generate.decoders.native_weights import Weights, stored_dtype
from lowmem.kernels import dispatch
from lowmem.kernels.native import header
from lowmem.kernels.native import library as native
from lowmem.kernels.native.header import LmLayer, LmModel
from lowmem.models.embedding import token_table

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "granite": "Granite",
    "starcoder2": "Starcoder2",
}
"""By model_type: what the names of transformers' classes begin with."""
_BIGCODE = "gpt_bigcode"
_UNIT = 16  # the hidden size, head_dim and the rotated part of it are multiples of this
# By transformers' names. gelu_new and gelu_fast are the same formula.
_ACTIVATIONS = {
    "gelu": header.GELU,
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), header.GELU_TANH),
    "silu": header.SILU,
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone."""


@dataclass(frozen=True)
class Described:
    """A model as the library reads it, but for its KV cache."""

    model: LmModel
    layers: Any
    """The array of LmLayer that `model` points to."""
    weights: Weights
    vocabulary: int
    positions: int
    """Positions that the model, or its table of angles, has."""


def describe(model: Any, capacity: int) -> Described:
    """The structures of `model`, for a KV cache of `capacity` tokens. Raises DecoderRefused."""
    if refusal := why_not(model, capacity):
        raise DecoderRefused(refusal)
    return _bigcode(model) if model.config.model_type == _BIGCODE else _llama_like(model, capacity)


def why_not(model: Any, capacity: int) -> str:
    """Why this model has no native forward, as far as its config and modules tell; "" if it may have one.

    capacity: tokens of the KV cache.
    """
    if refusal := dispatch.why_not_native():
        return refusal
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    if (kind != _BIGCODE and kind not in FAMILIES) or not hasattr(model, "lm_head"):
        return f"native steps exist for {_BIGCODE}, {', '.join(FAMILIES)}, not {kind or 'this model'}"
    table = token_table(model)
    dtype, device = table.activations, table.device
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return f"native steps need bfloat16 on the CPU, not {dtype} on {device}"
    if model.training:
        return "native steps need a model in eval mode"
    activation = config.activation_function if kind == _BIGCODE else config.hidden_act
    if activation not in _ACTIVATIONS:
        return f"native steps do not implement the activation {activation}"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "the model's modules have hooks, which a native step would not call"
    return _why_not_bigcode(model) if kind == _BIGCODE else _why_not_llama_like(model, capacity)


# ---- GPTBigCode -------------------------------------------------------------------------------------------


def _why_not_bigcode(model: Any) -> str:
    if model.config.add_cross_attention:
        return "native steps need a decoder-only model"
    if model.transformer.h[0].attn.head_dim % _UNIT:
        return f"head_dim is not a multiple of {_UNIT}"
    return ""


def _bigcode(model: Any) -> Described:
    body, config, weights = model.transformer, model.config, Weights()
    attention, inner = body.h[0].attn, body.h[0].mlp.c_fc.out_features
    vocabulary, embd = int(body.wte.num_embeddings), int(body.wte.embedding_dim)
    positions = int(body.wpe.weight.shape[0])
    layers = (LmLayer * len(body.h))()
    for layer, block in zip(layers, body.h, strict=True):
        width = embd + 2 * attention.kv_heads * attention.head_dim
        layer.ln_1, layer.ln_2 = weights.norm(block.ln_1, embd), weights.norm(block.ln_2, embd)
        layer.q = weights.linear(block.attn.c_attn, embd, width)
        layer.attn_proj = weights.linear(block.attn.c_proj, embd, embd)
        layer.up = weights.linear(block.mlp.c_fc, embd, inner)
        layer.mlp_proj = weights.linear(block.mlp.c_proj, inner, embd)
    found = _shared(weights, body.wte, (vocabulary, embd))
    found.layers, found.heads, found.kv_heads = len(body.h), attention.num_heads, attention.kv_heads
    found.size, found.inner = attention.head_dim, inner
    found.interleaved = int(not config.multi_query)
    found.activation = _ACTIVATIONS[config.activation_function]
    found.scaling = attention.scaling
    found.wpe_type = native.TYPES[stored_dtype(body.wpe)]
    found.wpe = weights.table(body.wpe, (positions, embd))
    found.ln_f = weights.norm(body.ln_f, embd)
    found.head = weights.head(model.lm_head, embd, vocabulary)
    found.layer = layers
    return Described(found, layers, weights, vocabulary, positions)


def _shared(weights: Weights, embedding: Any, shape: tuple[int, int]) -> LmModel:
    """What all models have: token rows, and scales that change nothing."""
    return LmModel(
        vocab=shape[0],
        embd=shape[1],
        embedding_scale=1.0,
        residual_scale=1.0,
        head_scale=1.0,
        wte_type=native.TYPES[stored_dtype(embedding)],
        wte=weights.embedding(embedding, shape),
    )


# ---- Llama and its relatives ------------------------------------------------------------------------------


class _Classes:
    """transformers' own classes of a family."""

    def __init__(self, model_type: str) -> None:
        self._module = sys.modules.get(f"transformers.models.{model_type}.modeling_{model_type}")
        self._start = FAMILIES[model_type]

    def get(self, end: str) -> Any:
        """The family's class with this end of its name, or None."""
        return getattr(self._module, self._start + end, None)

    def foreign(self, model: Any) -> str:
        """The first class of a module that is not the family's own, by name, or ""."""

        def parts() -> Iterator[tuple[Any, str]]:
            yield model, "ForCausalLM"
            yield model.model, "Model"
            yield model.model.rotary_emb, "RotaryEmbedding"
            for block in model.model.layers:
                yield from ((block, "DecoderLayer"), (block.self_attn, "Attention"), (block.mlp, "MLP"))

        return next((type(part).__name__ for part, end in parts() if type(part) is not self.get(end)), "")


def _why_not_llama_like(model: Any, capacity: int) -> str:
    config = model.config
    if name := _Classes(config.model_type).foreign(model):
        return f"native steps do not know {name} in a {config.model_type} model"
    body, window = model.model, getattr(config, "sliding_window", None)
    if window is not None and window < capacity:
        return f"a sliding window of {window} tokens is shorter than the context of {capacity}"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"native steps do not know layers of {min(kinds)}"
    if body.rotary_emb.rope_type not in _ROPE_TYPES:
        return f"native steps do not know rotary embeddings of the type {body.rotary_emb.rope_type}"
    if len(body.layers) != config.num_hidden_layers:
        return f"the model has {len(body.layers)} layers, and runs {config.num_hidden_layers}"
    if body.layers[0].self_attn.head_dim % _UNIT or config.hidden_size % _UNIT:
        return f"head_dim or the hidden size is not a multiple of {_UNIT}"
    return ""


def _llama_like(model: Any, capacity: int) -> Described:
    body, config = model.model, model.config
    weights = Weights(_Classes(config.model_type).get("RMSNorm"))
    vocabulary, embd = int(body.embed_tokens.num_embeddings), int(body.embed_tokens.embedding_dim)
    layers = (LmLayer * len(body.layers))()
    found = _shared(weights, body.embed_tokens, (vocabulary, embd))
    found.layers, found.heads = len(layers), config.num_attention_heads
    found.kv_heads = config.num_key_value_heads
    found.size, found.scaling = body.layers[0].self_attn.head_dim, body.layers[0].self_attn.scaling
    found.inner, found.activation = config.intermediate_size, _ACTIVATIONS[config.hidden_act]
    for layer, block in zip(layers, body.layers, strict=True):
        _llama_layer(weights, found, layer, block)
    found.embedding_scale = getattr(body, "embedding_multiplier", 1.0)
    found.residual_scale = getattr(body.layers[0], "residual_multiplier", 1.0)
    found.head_scale = 1 / getattr(config, "logits_scaling", 1.0)
    _rotary(weights, found, body.rotary_emb, capacity)
    found.ln_f = weights.norm(body.norm, embd)
    found.head = weights.head(model.lm_head, embd, vocabulary)
    if model.lm_head.bias is not None and found.head_scale != 1:
        raise DecoderRefused("a head with a bias and scaled logits")
    found.layer = layers
    return Described(found, layers, weights, vocabulary, capacity)


def _llama_layer(weights: Weights, model: LmModel, layer: LmLayer, block: Any) -> None:
    """Fill `layer` from a decoder layer of the dimensions of `model`."""
    attention, mlp, embd, inner = block.self_attn, block.mlp, model.embd, model.inner
    queries, keys = model.heads * model.size, model.kv_heads * model.size
    layer.ln_1 = weights.norm(block.input_layernorm, embd)
    layer.ln_2 = weights.norm(block.post_attention_layernorm, embd)
    layer.q = weights.linear(attention.q_proj, embd, queries)
    layer.k = weights.linear(attention.k_proj, embd, keys)
    layer.v = weights.linear(attention.v_proj, embd, keys)
    layer.attn_proj = weights.linear(attention.o_proj, queries, embd)
    if hasattr(attention, "q_norm"):
        layer.q_norm = weights.norm(attention.q_norm, model.size)
        layer.k_norm = weights.norm(attention.k_norm, model.size)
    if hasattr(mlp, "gate_proj"):
        layer.gate = weights.linear(mlp.gate_proj, embd, inner)
        layer.up = weights.linear(mlp.up_proj, embd, inner)
        layer.mlp_proj = weights.linear(mlp.down_proj, inner, embd)
    else:
        layer.up = weights.linear(mlp.c_fc, embd, inner)
        layer.mlp_proj = weights.linear(mlp.c_proj, inner, embd)


def _rotary(weights: Weights, model: LmModel, rotary: Any, capacity: int) -> None:
    """transformers' cosines and sines, in float32, of the first `capacity` positions."""
    both = rotary(torch.zeros(1), torch.arange(capacity)[None])
    half = both[0].shape[-1] // 2
    tables = [part[0, :, :half].contiguous() for part in both]
    if half % (_UNIT // 2) or 2 * half > model.size:
        raise DecoderRefused(f"{2 * half} of {model.size} dimensions of a head are rotated")
    if not all(torch.equal(part[0, :, half:], table) for part, table in zip(both, tables, strict=True)):
        raise DecoderRefused("the two halves of a head are rotated by different angles")
    model.rotary = 2 * half
    model.cosines, model.sines = (weights.tensor(table, (capacity, half), torch.float32) for table in tables)
