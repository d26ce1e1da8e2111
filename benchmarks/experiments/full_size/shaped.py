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
from lowmem.benchmarks.demo import embedded_model
from safetensors.torch import save_file

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
    vocab: int = VOCAB

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


def write_with_vocabulary(folder: Path, out: Path, dimensions: Dimensions) -> Path:
    """The checkpoint in `folder` with an embedding of `dimensions.vocab` rows; returns `out`.

    The layers' shards are hard links: both folders must lie in one file system.
    """
    out.mkdir(parents=True, exist_ok=True)
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    outside = {name: file for name, file in index["weight_map"].items() if ".h." not in name}
    for file in set(index["weight_map"].values()) - set(outside.values()):
        (out / file).unlink(missing_ok=True)
        (out / file).hardlink_to(folder / file)
    torch.manual_seed(0)
    save_file(_outside(dimensions), out / next(iter(outside.values())), metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = json.loads((folder / "config.json").read_bytes()) | {"vocab_size": dimensions.vocab}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(folder / name, out / name)
    return out


def _outside(dimensions: Dimensions) -> dict[str, torch.Tensor]:
    """What lies outside of the decoder layers; the head is tied."""
    hidden = dimensions.hidden
    return {
        "transformer.wte.weight": (torch.randn(dimensions.vocab, hidden) * 0.05).half(),
        "transformer.wpe.weight": (torch.randn(dimensions.positions, hidden) * 0.05).half(),
        **_norm("transformer.ln_f", hidden),
    }


def _norm(name: str, hidden: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.ones(hidden).half(), f"{name}.bias": torch.zeros(hidden).half()}


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
            tensors |= _outside(dimensions)
        else:
            layer = f"transformer.h.{shard - 1}"
            for norm in ("ln_1", "ln_2"):
                tensors |= _norm(f"{layer}.{norm}", hidden)
            for name, (inputs, outputs) in dimensions.linears.items():
                tensors |= weight(f"{layer}.{name}", inputs, outputs)
                tensors[f"{layer}.{name}.bias"] = torch.zeros(outputs).half()
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
        "vocab_size": dimensions.vocab,
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
