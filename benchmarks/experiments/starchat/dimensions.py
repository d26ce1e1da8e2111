"""StarChat Alpha's dimensions, config and tensors, for made-up models of its layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowmem.checkpoint.packing import stored_shapes
from lowmem.config import QuantConfig

VOCAB = 49156
"""StarCoderBase's 49152 tokens and the four dialogue tokens."""
WIDTHS = ((8, 128), (4, 128), (3, 64), (2, 32))
"""(bits, group size) of the converter's own choice: what experiments compare."""
Stored = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


@dataclass(frozen=True)
class Dimensions:
    """StarChat Alpha's, unless given. The MLP is four times as wide as `n_embd`, the head is tied, and
    there is one key and one value head."""

    layers: int = 40
    n_embd: int = 6144
    heads: int = 48
    n_positions: int = 8192
    vocab: int = VOCAB

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a decoder layer's linears."""
        n_embd = self.n_embd
        return {
            "attn.c_attn": (n_embd, n_embd + 2 * (n_embd // self.heads)),
            "attn.c_proj": (n_embd, n_embd),
            "mlp.c_fc": (n_embd, 4 * n_embd),
            "mlp.c_proj": (4 * n_embd, n_embd),
        }

    def config(self) -> dict[str, Any]:
        """config.json in the spelling of transformers 4.28, which saved StarChat Alpha."""
        return {
            "_name_or_path": "bigcode/starcoderbase",
            "activation_function": "gelu",
            "architectures": ["GPTBigCodeForCausalLM"],
            "attention_softmax_in_fp32": True,
            "multi_query": True,
            "attn_pdrop": 0.1,
            "bos_token_id": 0,
            "embd_pdrop": 0.1,
            "eos_token_id": 0,
            "inference_runner": 0,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "max_batch_size": None,
            "max_sequence_length": None,
            "model_type": "gpt_bigcode",
            "n_embd": self.n_embd,
            "n_head": self.heads,
            "n_inner": 4 * self.n_embd,
            "n_layer": self.layers,
            "n_positions": self.n_positions,
            "pad_key_length": True,
            "pre_allocate_kv_cache": False,
            "resid_pdrop": 0.1,
            "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": True,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "torch_dtype": "float16",
            "transformers_version": "4.28.1",
            "use_cache": True,
            "validate_runner_input": True,
            "vocab_size": self.vocab,
        }

    def tensors(self) -> dict[str, Stored]:
        """The state dict in its order, all float16; the copy of the tied head last."""
        n_embd = self.n_embd
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.weight": (self.vocab, n_embd),
            "transformer.wpe.weight": (self.n_positions, n_embd),
        }
        for layer in range(self.layers):
            for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
                inputs, outputs = self.linears.get(name, (n_embd, n_embd))
                prefix = f"transformer.h.{layer}.{name}"
                shapes[f"{prefix}.weight"] = (outputs, inputs) if name in self.linears else (n_embd,)
                shapes[f"{prefix}.bias"] = (outputs,)
        shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (n_embd,)
        shapes["lm_head.weight"] = (self.vocab, n_embd)
        return {name: (shape, torch.float16) for name, shape in shapes.items()}

    def packed_tensors(self, quant: QuantConfig) -> dict[str, Stored]:
        """The tensors of `lowmem convert`'s result, in the order in which it writes them: no head."""
        dense = self.tensors()
        del dense["lm_head.weight"]
        found = {name: stored for name, stored in dense.items() if ".h." not in name}
        for layer in range(self.layers):
            prefix = f"transformer.h.{layer}."
            inside = {n: s for n, s in dense.items() if n.startswith(prefix) and len(s[0]) == 1}
            for name, (inputs, outputs) in self.linears.items():
                shapes = stored_shapes(inputs, outputs, quant.bits, quant.group_size)
                for part in ("qweight", "qzeros", "scales", "g_idx"):
                    dtype = torch.float16 if part == "scales" else torch.int32
                    inside[f"{prefix}{name}.{part}"] = (getattr(shapes, part), dtype)
            found |= dict(sorted(inside.items()))
        return found


def nbytes_of(tensors: Mapping[str, Stored]) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
