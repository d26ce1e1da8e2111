"""Checkpoints of StarChat Alpha's real size without its weights: true headers over holes on the disk.

What reads headers alone cannot tell them from the real ones, and they take a few hundred KB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowmem.checkpoint.manifest import quantization_config_dict
from lowmem.checkpoint.packing import stored_shapes
from lowmem.config import QuantConfig

STARCHAT_VOCAB = 49156  # StarCoderBase's 49152 and the four dialogue tokens

SHARD_BYTES = 10 * 1000**3  # transformers' max_shard_size when StarChat Alpha was saved
GPTQ_SHARD_BYTES = 4 << 30  # lowmem's own
_CODES = {torch.float16: "F16", torch.int32: "I32"}

Stored = tuple[tuple[int, ...], torch.dtype]  # shape and dtype


def starchat_config(
    *, layers: int = 40, n_embd: int = 6144, heads: int = 48, n_positions: int = 8192
) -> dict[str, Any]:
    """StarChat Alpha's config.json, in its old spelling."""
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
        "n_embd": n_embd,
        "n_head": heads,
        "n_inner": 4 * n_embd,
        "n_layer": layers,
        "n_positions": n_positions,
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
        "vocab_size": STARCHAT_VOCAB,
    }


def starchat_linears(n_embd: int = 6144, heads: int = 48) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a decoder layer's linears; one key and one value head."""
    return {
        "attn.c_attn": (n_embd, n_embd + 2 * (n_embd // heads)),
        "attn.c_proj": (n_embd, n_embd),
        "mlp.c_fc": (n_embd, 4 * n_embd),
        "mlp.c_proj": (4 * n_embd, n_embd),
    }


def starchat_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of StarChat Alpha's state dict, in its order, the copy of the tied head last."""
    n_embd = config["n_embd"]
    linears = starchat_linears(n_embd, config["n_head"])
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], n_embd),
        "transformer.wpe.weight": (config["n_positions"], n_embd),
    }
    for layer in range(config["n_layer"]):
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            inputs, outputs = linears.get(name, (n_embd, n_embd))
            prefix = f"transformer.h.{layer}.{name}"
            shapes[f"{prefix}.weight"] = (outputs, inputs) if name in linears else (n_embd,)
            shapes[f"{prefix}.bias"] = (outputs,)
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (n_embd,)
    shapes["lm_head.weight"] = (config["vocab_size"], n_embd)
    return shapes


def starchat_header_replica(folder: Path, **dimensions: int) -> Path:
    """StarChat Alpha as it is published: float16 pickle shards of up to 10 GB, config and index.

    torch.save itself writes the shards, without the data. dimensions: of starchat_config, if not the real
    ones. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = starchat_config(**dimensions)
    groups = _by_size({n: (s, torch.float16) for n, s in starchat_shapes(config).items()}, SHARD_BYTES)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"pytorch_model-{number:05}-of-{len(groups):05}.bin"
        # Memory that is never touched is never there: a shard's 10 GB are only an address range.
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in group.items()}
        with torch.serialization.skip_data():
            torch.save(tensors, folder / file)
        weight_map.update(dict.fromkeys(group, file))
    total = sum(_nbytes(stored) for group in groups for stored in group.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "pytorch_model.bin.index.json", index)
    _write_json(folder / "config.json", config)
    ids = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0}
    _write_json(folder / "generation_config.json", ids)
    return folder


def gptq_header_replica(folder: Path, bits: int, group_size: int, **dimensions: int) -> Path:
    """StarChat Alpha as `lowmem convert` writes it: packed linears, the rest float16, no head of its own.

    Shards of 4 GiB, their index, config with the quantization, and a lowmem-report.json that names the base
    model. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = starchat_config(**dimensions)
    quant = QuantConfig(bits=bits, group_size=group_size)
    groups = _by_size(_gptq_tensors(config, quant), GPTQ_SHARD_BYTES)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = (
            f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else "model.safetensors"
        )
        _sparse_safetensors(folder / file, group)
        weight_map.update(dict.fromkeys(group, file))
    if len(groups) > 1:
        total = sum(_nbytes(stored) for group in groups for stored in group.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    for key in ("torch_dtype", "_name_or_path"):
        del config[key]
    config |= {"dtype": "float16", "tie_word_embeddings": True}
    config["quantization_config"] = quantization_config_dict(quant, version="0")
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [49155, 0]})
    report = {"base_model": "HuggingFaceH4/starchat-alpha", "license": "bigcode-openrail-m"}
    _write_json(folder / "lowmem-report.json", report)
    return folder


def _gptq_tensors(config: Mapping[str, Any], quant: QuantConfig) -> dict[str, Stored]:
    """Shape and dtype of every tensor, in the order in which the converter writes them."""
    linears = starchat_linears(config["n_embd"], config["n_head"])
    dense = starchat_shapes(config)
    del dense["lm_head.weight"]
    outside = {name: shape for name, shape in dense.items() if ".h." not in name}
    tensors: dict[str, Stored] = {name: (shape, torch.float16) for name, shape in outside.items()}
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}."
        inside: dict[str, Stored] = {}
        for name, shape in dense.items():
            if name.startswith(prefix) and len(shape) == 1:
                inside[name] = (shape, torch.float16)
        for name, (inputs, outputs) in linears.items():
            shapes = stored_shapes(inputs, outputs, quant.bits, quant.group_size)
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                dtype = torch.float16 if part == "scales" else torch.int32
                inside[f"{prefix}{name}.{part}"] = (getattr(shapes, part), dtype)
        tensors |= dict(sorted(inside.items()))
    return tensors


def _by_size(tensors: Mapping[str, Stored], limit: int) -> list[dict[str, Stored]]:
    """Shards of at most `limit` bytes, filled in order."""
    groups: list[dict[str, Stored]] = [{}]
    filled = 0
    for name, stored in tensors.items():
        if groups[-1] and filled + _nbytes(stored) > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = stored
        filled += _nbytes(stored)
    return groups


def _nbytes(stored: Stored) -> int:
    shape, dtype = stored
    return math.prod(shape) * dtype.itemsize


def _sparse_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """The header, and a hole of the data's size."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, stored in tensors.items():
        end = position + _nbytes(stored)
        shape, dtype = stored
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
