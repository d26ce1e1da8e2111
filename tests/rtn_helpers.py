"""A GPTQ checkpoint quantized by round-to-nearest, for the tests of the runtime.

It uses no code of the converter, so the reader is tested against an independent writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lowmem.checkpoint.formats import LinearFormat, layout_for
from lowmem.checkpoint.manifest import quantization_config_dict
from lowmem.checkpoint.packing import pack_rows, pack_zeros
from lowmem.config import QuantConfig
from tests.helpers import embedding_name, save_source


@dataclass(frozen=True)
class Rtn:
    """A linear's integers q [in, out], zeros and scales [groups, out], and g_idx [in]."""

    q: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor

    def weight(self) -> torch.Tensor:
        """The dequantized float32 weight [out, in]."""
        rows = self.g_idx.long()
        return ((self.q.float() - self.zeros.float()[rows]) * self.scales.float()[rows]).T.contiguous()


def rtn(
    weight: torch.Tensor, bits: int, group_size: int, *, act_order_seed: int | None = None, sym: bool = False
) -> Rtn:
    """Round weight [out, in] to nearest. act_order_seed: assign columns to random groups.

    sym: the zero-point is the middle, and the scale's sign puts the longer side of the grid where it helps.
    """
    columns = weight.shape[1]
    size = columns if group_size == -1 else group_size
    g_idx = torch.arange(columns) // size
    if act_order_seed is not None:
        g_idx = g_idx[torch.randperm(columns, generator=torch.Generator().manual_seed(act_order_seed))]
    groups = int(g_idx.max()) + 1
    maxq = 2**bits - 1
    transposed = weight.detach().float().T  # [in, out]
    scales, zeros = torch.empty(groups, weight.shape[0]), torch.empty(groups, weight.shape[0])
    for group in range(groups):
        part = transposed[g_idx == group]
        if sym:
            low, high = part.amin(0), part.amax(0)
            longer = torch.where(-low > high, low, high)
            scales[group] = (longer / -(2 ** (bits - 1))).half().float()
            zeros[group] = 2 ** (bits - 1)
            continue
        low, high = part.amin(0).clamp(max=0), part.amax(0).clamp(min=0)
        scales[group] = ((high - low) / maxq).clamp(min=1e-4).half().float()
        zeros[group] = (-low / scales[group]).round().clamp(1, maxq)
    q = (transposed / scales[g_idx] + zeros[g_idx]).round().clamp(0, maxq).to(torch.uint8)
    return Rtn(q, zeros.long(), scales.half(), g_idx.int())


def layer_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the decoder layers by name, without the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }


def write_rtn_checkpoint(
    model: Any,
    folder: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    shards: int = 1,
    layout: str = "",
    act_order_seed: int | None = None,
    tokenizer: bool = True,
    sym: bool = False,
    others: Mapping[str, int] | None = None,
) -> Any:
    """Write `model` quantized into `folder`, and replace the weights of `model` by the dequantized ones.

    layout: a key of LAYOUTS; by default the one that lowmem writes for the widths. others: the bits of
    linears that differ, by the end of their names.

    Afterwards `model` is the oracle for a reader of the folder.
    """
    save_source(model, folder, tokenizer=tokenizer)
    (folder / "model.safetensors").unlink()
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings and embedding_name(model) != "lm_head.weight":
        tensors.pop("lm_head.weight", None)
    linears = layer_linears(model)
    differ = {n: b for n in linears for end, b in (others or {}).items() if n.endswith(end)}
    if differ:
        layout = layout or layout_for((bits, *differ.values()))
    for name, linear in linears.items():
        own = differ.get(name, bits)
        packed = rtn(linear.weight, own, group_size, act_order_seed=act_order_seed, sym=sym)
        linear.weight.data = packed.weight().to(linear.weight.dtype)
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"] = pack_rows(packed.q, own, layout)
        tensors[f"{name}.qzeros"] = pack_zeros(packed.zeros, own, layout)
        tensors[f"{name}.scales"] = packed.scales
        tensors[f"{name}.g_idx"] = packed.g_idx
    config = json.loads((folder / "config.json").read_text())
    quant = QuantConfig(bits=bits, group_size=group_size, sym=sym, desc_act=False)
    formats = {n: LinearFormat(b, group_size, sym) for n, b in differ.items()}
    config["quantization_config"] = quantization_config_dict(quant, version="0", linears=formats)
    config["quantization_config"]["desc_act"] = act_order_seed is not None
    if layout:
        config["quantization_config"]["checkpoint_format"] = layout
    (folder / "config.json").write_text(json.dumps(config))
    save_shards(tensors, folder, shards)
    return model


def save_shards(tensors: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """Write safetensors into `folder`: one file, or `shards` files and an index."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
