"""The dequantized linears of a version, in float32, and the bits that they are stored in.

Bits are counted alike for all: integers with their scales and zero-points or minimums, over the weights that
they stand for. GPTQ's group indices, which are the same for all versions, are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from lowmem.checkpoint.source.base import Source

SCALE_BITS = 16


@dataclass(frozen=True)
class Linear:
    """How a linear is stored."""

    name: str
    """The model's."""
    kind: str
    """ "4-bit g128", or ggml's name of the type."""
    weights: int
    bits: float
    """Stored bits, all of them."""


def gptq_bits(bits: int, group_size: int) -> float:
    """Stored bits per weight: the integer, and its share of a float16 scale and of a zero-point."""
    return bits + (SCALE_BITS + bits) / group_size


def average_bits(linears: Iterable[Linear]) -> float:
    """Stored bits per weight over all linears."""
    found = list(linears)
    return sum(linear.bits for linear in found) / sum(linear.weights for linear in found)


def kinds_of(linears: Iterable[Linear]) -> list[tuple[str, int]]:
    """(kind, number of linears), the most frequent kind first."""
    return Counter(linear.kind for linear in linears).most_common()


def of_grid(name: str, weights: int, bits: int, group_size: int) -> Linear:
    """A linear on a grid with groups, as GPTQ and AutoRound store it."""
    return Linear(name, f"{bits}-bit g{group_size}", weights, weights * gptq_bits(bits, group_size))


def read_gptq(source: Source, names: Iterable[str]) -> Iterator[tuple[Linear, torch.Tensor]]:
    """The linears of a GPTQ folder, [outputs, inputs]. names: of the decoder layers' linears.

    A linear that is not quantized counts with its own dtype. Raises SourceError for a damaged folder.
    """
    for name in names:
        weight = source.dense(f"{name}.weight").float()
        stored = source.quantized.get(name)
        if stored is None:
            info = source.infos[f"{name}.weight"]
            yield Linear(name, info.dtype, info.numel, 8 * info.nbytes), weight
        else:
            group = stored.group_size if stored.group_size > 0 else weight.shape[1]
            yield of_grid(name, weight.numel(), stored.bits, group), weight


def read_tuned(source: Source, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Norms and biases of a GPTQ folder by name; those that it lacks are left out."""
    return {name: source.dense(name).float() for name in names if name in source.infos}


def read_gguf(file: Path, names: Iterable[str], config: Any) -> Iterator[tuple[Linear, torch.Tensor]]:
    """The linears of a GGUF file, dequantized by the package gguf. config: transformers', of the model."""
    import gguf
    import torch

    from lowmem.export.families import row_order
    from lowmem.export.tensors import name_map

    stored_names = name_map(config)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name in names:
        tensor = stored[stored_names.get_name(f"{name}.weight", try_suffixes=(".weight",))]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(np.array(values, dtype=np.float32))
        order = row_order(f"{name}.weight", weight.shape[0], config)
        if order is not None:
            weight = weight[torch.argsort(order)]
        kind = tensor.tensor_type.name
        yield Linear(name, kind, weight.numel(), 8 * int(tensor.n_bytes)), weight


def read_dense(
    file: Path, names: Iterable[str], widths: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[Linear, torch.Tensor]]:
    """The linears of a safetensors file of dequantized weights. widths: (bits, group size) of each."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    for name in names:
        weight = tensors[f"{name}.weight"].float()
        yield of_grid(name, weight.numel(), *widths[name]), weight
