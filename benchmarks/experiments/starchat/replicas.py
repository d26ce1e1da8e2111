"""Checkpoints of StarChat Alpha's real size without its weights: true headers over holes in sparse files.

Code that reads only headers cannot tell them from the real ones, and they take a few hundred KB of disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions, Stored, nbytes_of

from lowmem.checkpoint.manifest import quantization_config_dict
from lowmem.config import QuantConfig

SHARD_BYTES = 10 * 1000**3
"""transformers' max_shard_size when StarChat Alpha was saved."""
GPTQ_SHARD_BYTES = 4 << 30
"""lowmem's own."""
_CODES = {torch.float16: "F16", torch.int32: "I32"}


def starchat_header_replica(folder: Path, **dimensions: int) -> Path:
    """StarChat Alpha as it is published: float16 pickle shards of up to 10 GB, config and index.

    torch.save itself writes the shards, without the data. dimensions: of `Dimensions`. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = Dimensions(**dimensions)
    groups = _by_size(model.tensors(), SHARD_BYTES)
    files = [f"pytorch_model-{n:05}-of-{len(groups):05}.bin" for n in range(1, len(groups) + 1)]
    for file, group in zip(files, groups, strict=True):
        # Memory that is never written to takes no room: a shard's 10 GB are only an address range.
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in group.items()}
        with torch.serialization.skip_data():
            torch.save(tensors, folder / file)
    _write_index(folder / "pytorch_model.bin.index.json", dict(zip(files, groups, strict=True)))
    _write_json(folder / "config.json", model.config())
    ids = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0}
    _write_json(folder / "generation_config.json", ids)
    return folder


def gptq_header_replica(folder: Path, bits: int, group_size: int, **dimensions: int) -> Path:
    """StarChat Alpha as `lowmem convert` writes it: packed linears, the rest float16, shards of 4 GiB.

    Config and lowmem-report.json name the quantization and the base model. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = Dimensions(**dimensions)
    quant = QuantConfig(bits=bits, group_size=group_size)
    groups = _by_size(model.packed_tensors(quant), GPTQ_SHARD_BYTES)
    files = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = ["model.safetensors"]
    else:
        _write_index(folder / "model.safetensors.index.json", dict(zip(files, groups, strict=True)))
    for file, group in zip(files, groups, strict=True):
        _write_sparse_safetensors(folder / file, group)
    config = model.config()
    for key in ("torch_dtype", "_name_or_path"):
        del config[key]
    config |= {"dtype": "float16", "tie_word_embeddings": True}
    config["quantization_config"] = quantization_config_dict(quant, version="0")
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [49155, 0]})
    report = {"base_model": "HuggingFaceH4/starchat-alpha", "license": "bigcode-openrail-m"}
    _write_json(folder / "lowmem-report.json", report)
    return folder


def _by_size(tensors: Mapping[str, Stored], limit: int) -> list[dict[str, Stored]]:
    """Shards of at most `limit` bytes, filled in order."""
    groups: list[dict[str, Stored]] = [{}]
    filled = 0
    for name, stored in tensors.items():
        size = nbytes_of({name: stored})
        if groups[-1] and filled + size > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = stored
        filled += size
    return groups


def _write_sparse_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """The header, and a hole of the data's size."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, stored in tensors.items():
        end = position + nbytes_of({name: stored})
        shape, dtype = stored
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)


def _write_index(path: Path, shards: Mapping[str, Mapping[str, Stored]]) -> None:
    weight_map = {name: file for file, group in shards.items() for name in group}
    total = sum(nbytes_of(group) for group in shards.values())
    _write_json(path, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
