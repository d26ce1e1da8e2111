"""The sizes of one decoder layer, and what it holds in memory between two stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from lowmem.convert.recipe import Recipe

from lowmem.checkpoint import formats
from lowmem.checkpoint.formats import LinearFormat
from lowmem.config import QuantConfig
from lowmem.models.architecture import Architecture, LayerSpec, LinearSpec

FLOAT32 = 4
"""Bytes of a float32 value."""


def packed_bytes(linear: LinearSpec, config: QuantConfig) -> int:
    """Bytes of qweight, qzeros, scales and g_idx of one linear."""
    format = LinearFormat(config.bits, config.group_size)
    return formats.packed_bytes(linear.in_features, linear.out_features, format)


@dataclass(frozen=True)
class Workload:
    """The properties of a conversion that its memory and disk plans depend on."""

    arch: Architecture
    recipe: Recipe
    rows: int
    """Calibration rows."""
    row_length: int
    """Tokens in a row."""
    dtype: torch.dtype
    """Of the forward passes."""
    device: torch.device
    read_overhead: Callable[[int], int] = lambda numel: FLOAT32 * numel
    """Bytes that reading a tensor of that many values takes, as `Source.read_overhead` gives them."""

    @property
    def hidden(self) -> int:
        """Features of a hidden state."""
        return self.arch.hidden

    @property
    def hidden_bytes(self) -> int:
        """Bytes of all hidden states between two layers."""
        return self.rows * self.row_length * self.hidden * self.dtype.itemsize

    @property
    def replays(self) -> bool:
        """Whether outputs of finished linears are kept in files. A GPU recomputes them faster."""
        return self.recipe.config.true_sequential and self.device.type == "cpu"

    def packed_bytes(self, layer: LayerSpec) -> int:
        """Bytes of a layer's packed linears."""
        found = ((one, self.recipe.of(f"{layer.name}.{one.name}")) for one in layer.linears)
        return sum(packed_bytes(one, config) for one, config in found if config)

    def sizes(self, layer: LayerSpec, rows: int, rows_a_step: int) -> LayerSizes:
        """The sizes of a layer that runs `rows` at a time, and is tuned with `rows_a_step`."""
        shapes = [self.arch.shapes[f"{layer.name}.{name}"] for name in self.arch.inside(layer)]
        whole = sum(math.prod(shape) for shape in shapes) * self.dtype.itemsize
        tokens, tokens_a_step = rows * self.row_length, rows_a_step * self.row_length
        return LayerSizes(self, layer, whole, tokens, tokens_a_step, dense=whole)


@dataclass
class LayerSizes:
    """Bytes that one decoder layer takes on the compute device.

    The second half of the fields describes the layer at the beginning of a stage; `Stage.leave` updates it.
    """

    work: Workload
    layer: LayerSpec
    whole: int
    """All of the layer's tensors in the compute dtype."""
    tokens: int
    """Tokens that run through the layer at a time."""
    tokens_a_step: int
    """Tokens in one step of tuning."""

    dense: int = 0
    """Dense tensors that are in memory now."""
    packed: int = 0
    """Packed linears."""
    starts: int = 0
    """Where training the integers begins, one byte a weight, until the layer is tuned."""
    hessians: int = 0
    lacking: dict[str, int] = field(default_factory=dict)
    """The matrices that say what linears lack, by the first linear of a group."""

    @property
    def itemsize(self) -> int:
        """Bytes of a value in the compute dtype."""
        return self.work.dtype.itemsize

    @property
    def held(self) -> int:
        """Bytes held between two stages."""
        return self.dense + self.packed + self.starts + self.hessians + sum(self.lacking.values())

    @property
    def largest(self) -> int:
        """Number of weight values in the largest linear."""
        return max(self.values([linear]) for linear in self.layer.linears)

    def config(self, linear: LinearSpec) -> QuantConfig:
        """How a quantized linear of the layer is quantized."""
        config = self.work.recipe.of(f"{self.layer.name}.{linear.name}")
        assert config is not None
        return config

    @property
    def quantized(self) -> tuple[LinearSpec, ...]:
        """The layer's linears that are quantized."""
        return self.work.recipe.quantized(self.layer)

    def values(self, linears: Sequence[LinearSpec]) -> int:
        """Number of weight values in `linears`."""
        return sum(linear.in_features * linear.out_features for linear in linears)

    def forward(self, tokens: int) -> int:
        """Bytes of the temporary tensors in a forward pass of `tokens` tokens.

        They are the residual stream, norms, attention heads, and the widest linear's output and activation.
        """
        hidden = self.layer.linears[0].in_features
        widest = max(max(one.in_features, one.out_features) for one in self.layer.linears)
        return tokens * (8 * hidden + 4 * widest) * max(self.itemsize, 2)
