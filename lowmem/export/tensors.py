"""What becomes of each tensor of a model in a GGUF file: its name, its type, the order of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lowmem.checkpoint.dequantize import PackedWeight
from lowmem.checkpoint.headers.gguf import TYPES
from lowmem.checkpoint.packed_values import examine
from lowmem.checkpoint.source.base import Source
from lowmem.errors import SourceError
from lowmem.export.blocks import BLOCK, GridFacts, grid_facts
from lowmem.export.families import FAMILIES, rope_factors, row_order
from lowmem.models.architecture import Architecture

HEAD_TYPES = ("f16", "bf16", "q8_0")
"""What the embedding and the head can be stored in, other than as they are."""
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SIZES = {name: (values, nbytes) for name, values, nbytes in TYPES.values()}


@dataclass(frozen=True)
class Stored:
    """A tensor of the file."""

    name: str
    source: str
    """Its name in the source's `dense_infos`; "" for one that is computed."""
    shape: tuple[int, ...]
    kind: str
    """ggml's type."""
    order: torch.Tensor | None = None
    """The source's rows in the order of the file, int64; None for their own order."""
    grid: GridFacts | None = None
    """Of a quantized linear."""
    values: torch.Tensor | None = None
    """Of a computed one."""
    rounded: str = ""
    """Why its values change, and what it is stored in, for messages; "" for one that is exact."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        values, nbytes = _SIZES[self.kind]
        return math.prod(self.shape) // values * nbytes


def name_map(config: Any) -> Any:
    """gguf's map from transformers' tensor names to llama.cpp's."""
    import gguf

    architecture = FAMILIES[config.model_type].architecture
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, config.num_hidden_layers)


def plan_tensors(
    source: Source,
    arch: Architecture,
    head_kind: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[Stored]:
    """Every tensor of the file, in the model's order.

    Matrices keep their dtype, quantized linears their integers where a type of ggml holds them. Norms, biases
    and positions become float32, which llama.cpp adds without rounding. head_kind: one of HEAD_TYPES for the
    embedding and the head. progress: called after each linear. Raises SourceError for a tensor that is
    missing, damaged, or that llama.cpp has no place for.
    """
    config = source.config()
    names, stored_names = name_map(config), source.resolve(arch.shapes)
    tied = arch.tied or source.head_is_tied(stored_names[arch.embedding], stored_names[arch.head])
    plan = []
    for name, shape in arch.shapes.items():
        if tied and name == arch.head:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise SourceError(f"llama.cpp has no place for the tensor {name!r}", "Run it with lowmem instead")
        found = stored_names[name]
        if (own := source.dense_infos[found].shape) != shape:
            raise SourceError(
                f"{found} has shape {list(own)}, and config.json says {list(shape)}",
                "The config does not belong to these weights",
            )
        order = row_order(name, shape[0], config)
        grid = _grid(source, found)
        kind = grid.kind if grid else _dense_kind(source, stored, found, head_kind)
        rounded = _why_rounded(grid) if grid else _narrowed(source, found, stored, kind)
        plan.append(Stored(stored, found, shape, kind, order, grid, rounded=rounded))
        if grid:
            progress()
    if (factors := rope_factors(config)) is not None:
        plan.append(Stored("rope_freqs.weight", "", tuple(factors.shape), "F32", values=factors))
    return plan


def _dense_kind(source: Source, stored: str, found: str, head_kind: str | None) -> str:
    """The type of a tensor that is not quantized."""
    info = source.dense_infos[found]
    if len(info.shape) == 1 or stored.startswith("position_embd"):
        return "F32"
    if head_kind and stored in ("token_embd.weight", "output.weight"):
        if head_kind == "q8_0" and info.shape[1] % BLOCK:
            raise SourceError(
                f"{found} has rows of {info.shape[1]} values, which are not whole blocks of {BLOCK}",
                "Leave --head out",
            )
        return head_kind.upper()
    return _KINDS[info.dtype]


def _grid(source: Source, name: str) -> GridFacts | None:
    """The facts of a quantized linear; None for another tensor. Raises SourceError if it is damaged."""
    linear = source.packed_name(name)
    if linear is None:
        return None
    zeros, scales, g_idx = (source.read(f"{linear}.{part}") for part in ("qzeros", "scales", "g_idx"))
    # Neither the check nor the facts need the integers.
    shape = source.infos[f"{linear}.qweight"].shape
    packed = PackedWeight(
        source.quantized[linear],
        torch.empty(shape, dtype=torch.int32, device="meta"),
        zeros,
        scales,
        g_idx,
    )
    assert source.format is not None
    for fault in examine(linear, packed, source.format).faults:
        raise fault.error()
    source.release()
    return grid_facts(packed)


def _why_rounded(grid: GridFacts) -> str:
    """Why no type of ggml holds a quantized linear exactly; "" if one does."""
    if grid.exact:
        return ""
    if grid.block_type:
        why = "scales that are not float16"
    elif not grid.whole_rows:
        why = "rows that are not whole blocks of 32 columns"
    elif not grid.blocks:
        why = "groups that are out of order, or not whole blocks of 32 columns"
    else:
        why = "zero-points far from the middle"
    return f"{grid.bits}-bit linears with {why}, in {grid.kind}"


def _narrowed(source: Source, found: str, stored: str, kind: str) -> str:
    """The message on a tensor that is stored in a type that holds less than its dtype."""
    own = _KINDS[source.dense_infos[found].dtype]
    return "" if kind in ("F32", own) else f"{stored}, {own} in the checkpoint, in {kind}"


def bits_per_weight(plan: list[Stored]) -> float:
    """Stored bits of the linears of the decoder layers, divided by the number of their weights."""
    linears = [s for s in plan if s.name.startswith("blk.") and len(s.shape) == 2]
    return 8 * sum(s.nbytes for s in linears) / sum(math.prod(s.shape) for s in linears)


def main_kind(plan: list[Stored]) -> str:
    """The type of most weights of the decoder layers' linears."""
    count: dict[str, int] = {}
    for stored in plan:
        if stored.name.startswith("blk.") and len(stored.shape) == 2:
            count[stored.kind] = count.get(stored.kind, 0) + math.prod(stored.shape)
    return max(count, key=lambda kind: count[kind])


def kinds_of(plan: list[Stored]) -> Iterator[tuple[str, int]]:
    """The types of the decoder layers' linears, each with its number of linears."""
    kinds = [s.kind for s in plan if s.name.startswith("blk.") and len(s.shape) == 2]
    for kind in dict.fromkeys(kinds):
        yield kind, kinds.count(kind)
