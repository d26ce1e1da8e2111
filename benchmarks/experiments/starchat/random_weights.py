"""Safetensors checkpoints of StarChat Alpha's layout with random weights, for measuring memory and time.

Weights are small, so that activations stay finite; quality means nothing. The tokenizer is tiny-starchat's,
whose ids all lie in the vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions
from safetensors.torch import save_file

from lowmem.checkpoint.manifest import quantization_config_dict
from lowmem.checkpoint.packing import pack_zeros, stored_shapes
from lowmem.config import QuantConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
Tensors = dict[str, torch.Tensor]
Weight = Callable[[str, int, int], Tensors]
"""(name, inputs, outputs) → the tensors of a linear."""


def write_source(folder: Path, dimensions: Dimensions) -> Path:
    """A float16 checkpoint, one shard per layer; returns `folder`."""
    return _write(folder, dimensions, dense_weight, {})


def write_packed(folder: Path, dimensions: Dimensions, bits: int, group_size: int) -> Path:
    """A GPTQ checkpoint of random integers, one shard per layer; returns `folder`."""
    weight, config = packed_weights(bits, group_size)
    return _write(folder, dimensions, weight, config)


def dense_weight(name: str, inputs: int, outputs: int) -> Tensors:
    """The tensor of a random linear in float16."""
    return {f"{name}.weight": (torch.randn(outputs, inputs) * inputs**-0.5).half()}


def packed_weights(bits: int, group_size: int) -> tuple[Weight, dict[str, Any]]:
    """What gives the tensors of a linear of random integers, and the config that names their format."""

    def weight(name: str, inputs: int, outputs: int) -> Tensors:
        shapes = stored_shapes(inputs, outputs, bits, group_size)
        scale = inputs**-0.5 / 2 ** (bits - 2)
        return {
            f"{name}.qweight": torch.randint(-(2**31), 2**31 - 1, shapes.qweight, dtype=torch.int32),
            f"{name}.qzeros": pack_zeros(torch.full(shapes.scales, 2 ** (bits - 1)), bits),
            f"{name}.scales": torch.full(shapes.scales, scale).half(),
            f"{name}.g_idx": (torch.arange(inputs) // group_size).int(),
        }

    quant = QuantConfig(bits=bits, group_size=group_size)
    return weight, {"quantization_config": quantization_config_dict(quant, version="0")}


def write_with_vocabulary(folder: Path, out: Path, dimensions: Dimensions) -> Path:
    """The checkpoint in `folder` with an embedding of `dimensions.vocab` rows; returns `out`.

    The layers' shards are hard links: both folders must be in one file system.
    """
    out.mkdir(parents=True, exist_ok=True)
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    outside = {name: file for name, file in index["weight_map"].items() if ".h." not in name}
    for file in set(index["weight_map"].values()) - set(outside.values()):
        (out / file).unlink(missing_ok=True)
        (out / file).hardlink_to(folder / file)
    torch.manual_seed(0)
    save_file(_outside(dimensions), out / next(iter(outside.values())), metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_bytes()) | {"vocab_size": dimensions.vocab}
    _write_rest(out, config, index["weight_map"])
    return out


def _outside(dimensions: Dimensions) -> Tensors:
    """The tensors outside the decoder layers; the head is tied."""
    n_embd = dimensions.n_embd
    return {
        "transformer.wte.weight": (torch.randn(dimensions.vocab, n_embd) * 0.05).half(),
        "transformer.wpe.weight": (torch.randn(dimensions.n_positions, n_embd) * 0.05).half(),
        **_norm("transformer.ln_f", n_embd),
    }


def _norm(name: str, n_embd: int) -> Tensors:
    return {f"{name}.weight": torch.ones(n_embd).half(), f"{name}.bias": torch.zeros(n_embd).half()}


def _write(
    folder: Path,
    dimensions: Dimensions,
    weight: Weight,
    quantization: dict[str, Any],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for shard in range(dimensions.layers + 1):
        if shard == 0:
            tensors = _outside(dimensions)
        else:
            layer = f"transformer.h.{shard - 1}"
            tensors = _norm(f"{layer}.ln_1", dimensions.n_embd) | _norm(f"{layer}.ln_2", dimensions.n_embd)
            for name, (inputs, outputs) in dimensions.linears.items():
                tensors |= weight(f"{layer}.{name}", inputs, outputs)
                tensors[f"{layer}.{name}.bias"] = torch.zeros(outputs).half()
        file = f"model-{shard + 1:05}-of-{dimensions.layers + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    _write_rest(folder, dimensions.config() | quantization, weight_map)
    return folder


def write_plain(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """A checkpoint of these tensors in one file; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    _write_rest(folder, config, dict.fromkeys(tensors, file))
    return folder


def _write_rest(folder: Path, config: dict[str, object], weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(embedded_model() / name, folder / name)
