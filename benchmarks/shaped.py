"""Checkpoints in StarChat Alpha's layout with made-up weights, of any number of layers: for memory and time.

The tokenizer is tiny-starchat's, whose ids are all in the vocabulary. Weights are small and random, so that
activations stay finite; nothing can be said about quality.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.demo import embedded_model
from lowmem.checkpoint.manifest import quantization_config_dict
from lowmem.checkpoint.packing import pack_zeros, stored_shapes
from lowmem.config import QuantConfig

VOCAB = 49156
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Dimensions:
    """StarChat Alpha's, with fewer layers."""

    layers: int
    hidden: int = 6144
    heads: int = 48
    positions: int = 8192

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a decoder layer's linears."""
        hidden = self.hidden
        return {
            "attn.c_attn": (hidden, hidden + 2 * (hidden // self.heads)),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, 4 * hidden),
            "mlp.c_proj": (4 * hidden, hidden),
        }


def write_source(folder: Path, dimensions: Dimensions) -> Path:
    """A float16 checkpoint, a shard a layer; returns `folder`."""

    def weight(name: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": (torch.randn(outputs, inputs) * inputs**-0.5).half()}

    return _write(folder, dimensions, weight, None)


def write_packed(folder: Path, dimensions: Dimensions, bits: int, group_size: int) -> Path:
    """A GPTQ checkpoint of random integers, a shard a layer; returns `folder`."""

    def weight(name: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
        shapes = stored_shapes(inputs, outputs, bits, group_size)
        scale = inputs**-0.5 / 2 ** (bits - 2)
        return {
            f"{name}.qweight": torch.randint(-(2**31), 2**31 - 1, shapes.qweight, dtype=torch.int32),
            f"{name}.qzeros": pack_zeros(torch.full(shapes.scales, 2 ** (bits - 1)), bits),
            f"{name}.scales": torch.full(shapes.scales, scale).half(),
            f"{name}.g_idx": (torch.arange(inputs) // group_size).int(),
        }

    config = QuantConfig(bits=bits, group_size=group_size)
    return _write(folder, dimensions, weight, quantization_config_dict(config, version="0"))


def _write(
    folder: Path,
    dimensions: Dimensions,
    weight: Callable[[str, int, int], dict[str, torch.Tensor]],
    quantization: dict[str, object] | None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    hidden, count = dimensions.hidden, dimensions.layers + 1
    weight_map = {}
    for shard in range(count):
        tensors: dict[str, torch.Tensor] = {}
        if shard == 0:
            tensors["transformer.wte.weight"] = (torch.randn(VOCAB, hidden) * 0.05).half()
            tensors["transformer.wpe.weight"] = (torch.randn(dimensions.positions, hidden) * 0.05).half()
            norms = ["transformer.ln_f"]
        else:
            layer = f"transformer.h.{shard - 1}"
            norms = [f"{layer}.ln_1", f"{layer}.ln_2"]
            for name, (inputs, outputs) in dimensions.linears.items():
                tensors |= weight(f"{layer}.{name}", inputs, outputs)
                tensors[f"{layer}.{name}.bias"] = torch.zeros(outputs).half()
        for norm in norms:
            tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = (
                torch.ones(hidden).half(),
                torch.zeros(hidden).half(),
            )
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {
        "model_type": "gpt_bigcode",
        "architectures": ["GPTBigCodeForCausalLM"],
        "n_layer": dimensions.layers,
        "n_embd": hidden,
        "n_head": dimensions.heads,
        "n_inner": 4 * hidden,
        "n_positions": dimensions.positions,
        "vocab_size": VOCAB,
        "multi_query": True,
        "activation_function": "gelu",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "torch_dtype": "float16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(embedded_model() / name, folder / name)
    return folder
