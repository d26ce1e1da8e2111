"""A tiny GPTBigCode, a slot that is filled, and float64's step over it: the oracle of the native step."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import layer_norm
from transformers.activations import ACT2FN

from lowmem.generate.cache.dense import DenseKVCache, DenseSlot
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.decoders.native_model import NativeModel
from lowmem.kernels.quant_linear import QuantLinear
from tests.helpers import tiny_model
from tests.kernels.native_oracle import ISAS

BIGCODE = ["gpt_bigcode_mqa", "gpt_bigcode_mha"]
# Of attention, which rounds queries and weights to bfloat16 with AVX-512 BF16 only.
ERRORS = {isa: 0.01 if "BF16" in isa else 2e-5 for isa in ISAS}


def bigcode(kind: str = "gpt_bigcode_mqa", *, heads: int = 4, sharp: float = 1.0, **options: Any) -> Any:
    """A tiny model in bfloat16; sharp: by how much its queries are larger, so that single keys decide."""
    model = tiny_model(kind, heads=heads, positions=1024, vocab=512, **options)
    for block in model.transformer.h:
        if kind.endswith("mqa"):
            block.attn.c_attn.weight.data[: model.config.n_embd] *= sharp
    return model.to(torch.bfloat16)


def random_ids(count: int, vocab: int = 512, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(0, vocab, (count,), generator=generator)]


@torch.inference_mode()
def filled(model: Any, length: int, capacity: int = 700, seed: int = 1) -> DenseSlot:
    """A slot of `length` random tokens, from the model's own eager forward."""
    slot = DenseKVCache(model.config.n_layer, capacity).slots[0]
    ids = random_ids(length, seed=seed)
    model(input_ids=torch.tensor([ids]), past_key_values=slot.view, use_cache=True)
    slot.commit(ids)
    return slot


class Bound:
    """The native forward of one slot."""

    def __init__(self, model: Any, slot: DenseSlot) -> None:
        self.model, self.slot = NativeModel(model), slot

    def step(self, ids: list[int]) -> torch.Tensor:
        """Append `ids`; the logits after each."""
        return self.model.forward([Feed(self.slot, ids)], [len(ids)])


def bound(model: Any, slot: DenseSlot) -> Bound:
    """The native step behind what `slot` holds."""
    return Bound(model, slot)


def contents(slot: DenseSlot, last: int) -> list[torch.Tensor]:
    """Keys and values of the last tokens, in every layer."""
    return [rows[:, :, -last:] for rows in slot.save(slot.length)]


def oracle(model: Any, slot: DenseSlot, ids: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """float64 logits of the last tokens, `ids`, and the keys and values that they should have left.

    The layers attend to the values in the slot, so its rounding causes no difference.
    """
    body, config = model.transformer, model.config
    rows, total = len(ids), slot.length
    size = config.n_embd // config.n_head
    activation = ACT2FN[config.activation_function]

    def linear(module: Any, x: torch.Tensor) -> torch.Tensor:
        weight = module.dequantize() if isinstance(module, QuantLinear) else module.weight
        y = x @ weight.double().T
        return y if module.bias is None else y + module.bias.double()

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], module.weight.double(), module.bias.double(), module.eps)

    positions = torch.arange(total - rows, total)
    x = body.wte.weight[torch.tensor(ids)].double() + body.wpe.weight[positions].double()
    left = []
    for block, layer in zip(body.h, slot.layers, strict=True):
        both = linear(block.attn.c_attn, norm(block.ln_1, x))
        if config.multi_query:
            query, key, value = both.split((config.n_embd, size, size), dim=1)
            query, key, value = query.view(rows, -1, size), key[:, None], value[:, None]
        else:
            query, key, value = both.view(rows, config.n_head, 3 * size).split(size, dim=2)
        left += [key.transpose(0, 1)[None], value.transpose(0, 1)[None]]  # [1, kv_heads, rows, size]
        keys, values = (t[0, :, :total].double() for t in (layer.keys, layer.values))  # type: ignore[index]
        keys, values = (t.expand(config.n_head, -1, -1) for t in (keys, values))
        scores = torch.einsum("rhd,htd->hrt", query, keys) * size**-0.5
        hidden = torch.arange(total)[None] > positions[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        mixed = torch.einsum("hrt,htd->rhd", weights, values).reshape(rows, -1)
        x = x + linear(block.attn.c_proj, mixed)
        wide = activation(linear(block.mlp.c_fc, norm(block.ln_2, x)))
        x = x + linear(block.mlp.c_proj, wide)
    return linear(model.lm_head, norm(body.ln_f, x)), left


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())
