"""Tiny models, a slot that is filled, and float64's step over it: the oracle of the native step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from lowmem.generate.cache.dense import DenseKVCache, DenseSlot
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.decoders.native_model import NativeModel
from lowmem.kernels.native import library as native
from lowmem.kernels.quant_linear import QuantLinear
from tests.helpers import random_model, tiny_config, tiny_model
from tests.kernels.native_oracle import ISAS

NATIVE = [
    pytest.mark.skipif(not native.available(), reason="the library is not compiled"),
    pytest.mark.usefixtures("threads_as_they_were"),
]
"""The marks of a file whose tests run the library."""
BIGCODE = ["gpt_bigcode_mqa", "gpt_bigcode_mha"]
LLAMA_LIKE = ["llama", "mistral", "qwen2", "qwen3", "granite", "starcoder2"]
# Of attention, which rounds queries and weights to bfloat16 with AVX-512 BF16 only.
ERRORS = {isa: 0.01 if "BF16" in isa else 2e-5 for isa in ISAS}


def bigcode(kind: str = "gpt_bigcode_mqa", *, heads: int = 4, sharp: float = 1.0, **options: Any) -> Any:
    """A tiny model in bfloat16; sharp: by how much its queries are larger, so that single keys decide."""
    model = tiny_model(kind, heads=heads, positions=1024, vocab=512, **options)
    for block in model.transformer.h:
        if kind.endswith("mqa"):
            block.attn.c_attn.weight.data[: model.config.n_embd] *= sharp
    return model.to(torch.bfloat16)


def llama_like(kind: str, **settings: Any) -> Any:
    """A tiny model of one of LLAMA_LIKE in bfloat16, with these settings in its config."""
    config = tiny_config(kind, vocab=512, positions=1024)
    for name, value in settings.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return random_model(config, dtype=torch.bfloat16)


def random_ids(count: int, vocab: int = 512, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(0, vocab, (count,), generator=generator)]


@torch.inference_mode()
def filled(model: Any, length: int, capacity: int = 700, seed: int = 1) -> DenseSlot:
    """A slot of `length` random tokens, from the model's own eager forward."""
    slot = DenseKVCache(model.config.num_hidden_layers, capacity).slots[0]
    ids = random_ids(length, seed=seed)
    model(input_ids=torch.tensor([ids]), past_key_values=slot.view, use_cache=True)
    slot.commit(ids)
    return slot


class Bound:
    """The native forward of one slot."""

    def __init__(self, model: Any, slot: DenseSlot) -> None:
        self.model, self.slot = NativeModel(model, slot.capacity), slot

    def step(self, ids: list[int]) -> torch.Tensor:
        """Append `ids`; the logits after each."""
        return self.model.forward([Feed(self.slot, ids)], [len(ids)])


def bound(model: Any, slot: DenseSlot) -> Bound:
    """The native step behind what `slot` holds."""
    return Bound(model, slot)


def contents(slot: DenseSlot, last: int) -> list[torch.Tensor]:
    """Keys and values of the last tokens, in every layer."""
    return [rows[:, :, -last:] for rows in slot.save(slot.length)]


class _Stored(CacheLayerMixin):
    """A slot's layer as float64's cache: the slot's rows are attended to, appended ones are kept aside."""

    is_sliding = False
    is_compileable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.appended: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        self.appended = [key_states, value_states]
        total = self.length + key_states.shape[-2]
        return self.keys[:, :, :total].double(), self.values[:, :, :total].double()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


def exact(model: Any) -> Any:
    """transformers' own model in float64, with packed linears dequantized."""
    packed = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    twin = type(model)(model.config).eval()
    for name, linear in packed.items():
        plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        plain.weight.data = linear.dequantize().clone()
        if linear.bias is not None:
            plain.bias.data = linear.bias.clone()
        twin.set_submodule(name, plain)
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{part}.") for part in packed)
    }
    twin.double().load_state_dict(state, strict=False)
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            twin.get_buffer(name).data = buffer.clone()
    return twin


def oracle(model: Any, slot: DenseSlot, ids: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """float64 logits of the last tokens, `ids`, and the keys and values that they should have left.

    The layers attend to the values in the slot, so its rounding causes no difference.
    """
    before = slot.length - len(ids)
    layers = [_Stored(layer.keys, layer.values, before) for layer in slot.layers]  # type: ignore[arg-type]
    logits = exact(model)(input_ids=torch.tensor([ids]), past_key_values=Cache(layers=layers)).logits[0]
    return logits, [part for layer in layers for part in layer.appended]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())
