"""A decode step of transformers' GPTBigCode on the CPU, in one call of our own library (csrc/step/step.c).

Between the kernels of an eager step lie hundreds of calls from Python, and torch's attention takes five times
as long at 8192 tokens. Here the threads walk through all layers by themselves: the linears as the model has
them, packed or bfloat16, embeddings and head also in float16, the keys and values in the engine's own cache,
everything between in float32. A row's logits and cache do not depend on the rows beside it: a draft leaves
exactly what one-row steps do.

What the step is not made for keeps the eager path, with the reason: `StepRefused`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowmem.checkpoint.files.reading import one_line
from lowmem.generate.cache import KVCache
from lowmem.kernels import dispatch
from lowmem.kernels.native import header
from lowmem.kernels.native import library as native
from lowmem.kernels.native.header import LmLayer, LmModel, LmNorm, LmWeight
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.kernels.stored_embeddings import StoredEmbedding, StoredHead

MOST_ROWS = header.DECODE_ROWS
"""Rows of a step, at most: a token and the draft behind it. Of more, none would come out as it does alone."""
_HEAD_UNIT = 16  # a head's size is a multiple of it
# By transformers' names. gelu_new and gelu_fast are the same formula.
_ACTIVATIONS = {
    "gelu": header.GELU,
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), header.GELU_TANH),
}


# Relative, in the 2-norm of the logits. Eager steps round to bfloat16 after every operation, ours hardly
# ever: with random weights in 40 layers the two differ by 0.05, with trained ones in 8 by 0.006. A wrong step
# differs by about 1.
_TOLERANCE = 0.2


class StepRefused(Exception):
    """This model's steps are not ours, or came out otherwise; `reason` says why. Decode eagerly."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NativeStep:
    """Decodes up to MOST_ROWS tokens at a time behind what `cache` holds; keeps all that it points to.

    model: a GPTBigCodeForCausalLM in bfloat16 on the CPU. cache: its buffers made, as after a prefill.
    Raises StepRefused. All shapes are checked here, and a step's ids and room at each step.
    """

    def __init__(self, model: Any, cache: KVCache) -> None:
        refusal = why_not(model)
        if refusal:
            raise StepRefused(refusal)
        self._cache = cache
        self._keep: list[Any] = []  # the structures and tensors that the library is given pointers to
        self._vocabulary, embd = model.transformer.wte.weight.shape
        positions = model.transformer.wpe.weight.shape[0]
        self._room = min(cache.capacity, positions)
        self._buffers = [(layer.keys, layer.values) for layer in cache.kv_layers]
        self._model = self._build(model, int(embd))

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """Token ids → float32 logits [rows, vocab] after each; the cache is so many tokens longer.

        Raises ValueError for no ids or more than MOST_ROWS, ids out of the vocabulary, or a cache that has no
        room for them, is not alike in all layers or has new buffers.
        """
        rows, length, layers = len(ids), self._cache.length, self._cache.kv_layers
        if not 1 <= rows <= MOST_ROWS:
            raise ValueError(f"a step takes 1 to {MOST_ROWS} tokens, not {rows}")
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise ValueError(f"a token id is outside of the vocabulary of {self._vocabulary}")
        if length + rows > self._room:
            raise ValueError(f"{length + rows} tokens do not fit a KV cache of {self._room}")
        for layer, (keys, values) in zip(layers, self._buffers, strict=True):
            if layer.keys is not keys or layer.values is not values or layer.length != length or layer.fixed:
                raise ValueError("the KV cache is not the one that the step was made for")
        logits = torch.empty((rows, self._vocabulary), dtype=torch.float32)
        fed = (ctypes.c_int64 * rows)(*ids)
        model = ctypes.addressof(self._model)
        with native.running() as library:
            space = native.workspace(library.lm_step_workspace(model, rows))
            library.lm_step(model, fed, rows, length, logits.data_ptr(), space)
        self._cache.advance(rows)
        return logits

    def _build(self, model: Any, embd: int) -> LmModel:
        body, config = model.transformer, model.config
        attention = body.h[0].attn
        layers = (LmLayer * len(body.h))()
        for layer, block, (keys, values) in zip(layers, body.h, self._buffers, strict=True):
            layer.ln_1, layer.ln_2 = self._norm(block.ln_1, embd), self._norm(block.ln_2, embd)
            width = embd + 2 * attention.kv_heads * attention.head_dim
            layer.c_attn = self._weight(block.attn.c_attn, embd, width)
            layer.attn_proj = self._weight(block.attn.c_proj, embd, embd)
            layer.c_fc = self._weight(block.mlp.c_fc, embd, block.mlp.c_fc.out_features)
            layer.mlp_proj = self._weight(block.mlp.c_proj, block.mlp.c_fc.out_features, embd)
            shape = (1, attention.kv_heads, self._cache.capacity, attention.head_dim)
            layer.keys, layer.values = self._tensor(keys, shape), self._tensor(values, shape)
        self._keep.append(layers)
        return LmModel(
            layers=len(body.h),
            embd=embd,
            heads=attention.num_heads,
            kv_heads=attention.kv_heads,
            inner=body.h[0].mlp.c_fc.out_features,
            vocab=self._vocabulary,
            capacity=self._cache.capacity,
            multi_query=int(config.multi_query),
            activation=_ACTIVATIONS[config.activation_function],
            epsilon=body.ln_f.eps,
            scaling=attention.scaling,
            wte_type=native.TYPES[_stored_dtype(body.wte)],
            wpe_type=native.TYPES[_stored_dtype(body.wpe)],
            wte=self._table(body.wte, (self._vocabulary, embd)),
            wpe=self._table(body.wpe, (body.wpe.weight.shape[0], embd)),
            ln_f=self._norm(body.ln_f, embd),
            head=self._weight(model.lm_head, embd, self._vocabulary),
            layer=layers,
        )

    def _tensor(
        self, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
    ) -> int:
        """The address of a tensor that is to be in one piece."""
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
            raise StepRefused(f"a {needed} tensor of {list(shape)} is needed, and there is {found}")
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _table(self, table: Any, shape: tuple[int, ...]) -> int:
        """The address of an embedding's weight."""
        return self._tensor(table.weight, shape, _stored_dtype(table))

    def _norm(self, norm: nn.Module, embd: int) -> LmNorm:
        if type(norm) is not nn.LayerNorm:
            raise StepRefused(f"a norm is {type(norm).__name__}")
        return LmNorm(self._tensor(norm.weight, (embd,)), self._tensor(norm.bias, (embd,)))

    def _weight(self, linear: Any, inputs: int, outputs: int) -> LmWeight:
        if isinstance(linear, QuantLinear):
            packed = linear.packed
            if packed is None or linear.order is not None:
                raise StepRefused("a packed linear is not multiplied by our own kernels as it lies")
            if (packed.in_features, packed.out_features) != (inputs, outputs):
                raise StepRefused(f"a packed linear of {packed.in_features} to {packed.out_features}")
            self._keep.append(packed)
            return LmWeight(packed.address, None, packed.planes)
        if type(linear) not in (nn.Linear, StoredHead):
            raise StepRefused(f"a linear is {type(linear).__name__}")
        dtype = _stored_dtype(linear)
        weight = self._tensor(linear.weight, (outputs, inputs), dtype)
        bias = None if linear.bias is None else self._tensor(linear.bias, (outputs,))
        dense = header.LmDense(
            inputs, outputs, weight, bias, native.TYPES[torch.bfloat16], native.TYPES[dtype]
        )
        self._keep.append(dense)
        return LmWeight(None, ctypes.addressof(dense), 0)


def _stored_dtype(module: nn.Module) -> torch.dtype:
    """Of the weight of an embedding or a linear, as it is to be: bfloat16, or what a stored one keeps."""
    return torch.float16 if isinstance(module, StoredEmbedding | StoredHead) else torch.bfloat16


def why_not(model: Any) -> str:
    """Why this model can have no native step, as far as can be told without its weights; "" if it can."""
    if refusal := dispatch.why_not_native():
        return refusal
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", "") != "gpt_bigcode" or not hasattr(model, "lm_head"):
        return "the native step knows GPTBigCode only"
    table = model.get_input_embeddings()
    dtype, device = getattr(table, "activations", table.weight.dtype), table.weight.device
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return f"the native step is for bfloat16 on the CPU, not {dtype} on {device}"
    if config.activation_function not in _ACTIVATIONS:
        return f"the native step does not know the activation {config.activation_function}"
    if config.add_cross_attention or model.training:
        return "the native step is for a decoder alone, in eval mode"
    if model.transformer.h[0].attn.head_dim % _HEAD_UNIT:
        return f"the size of a head is no multiple of {_HEAD_UNIT}"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "the model's modules have hooks, which a native step would pass by"
    return ""


def checked_step(model: Any, cache: KVCache, ids: Sequence[int]) -> tuple[NativeStep, torch.Tensor]:
    """A step made and tried: (the step, its logits for `ids`, which are in the cache now).

    The model's own eager forward decides, in the same state; where the two differ by more than bfloat16
    does, the cache is left as it was. Raises StepRefused.
    """
    length = cache.length
    try:
        step = NativeStep(model, cache)
        expected = model(
            input_ids=torch.tensor([list(ids)]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=len(ids),
        ).logits[0]
        cache.cut(length)
        logits = step.step(ids)
        error = float(((logits - expected).norm(dim=1) / expected.float().norm(dim=1)).amax())
        if not error <= _TOLERANCE:  # not a number is no small number
            raise StepRefused(
                f"the native step's logits differ from the eager ones by {error:.2g} of their norm"
            )
    except StepRefused:
        cache.cut(min(length, cache.length))
        raise
    except Exception as error:  # a model of this name may still be built otherwise
        cache.cut(min(length, cache.length))
        raise StepRefused(one_line(error)) from error
    return step, logits
