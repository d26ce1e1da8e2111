"""What a conversion is asked to do, and by what an interrupted one is recognised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from lowmem.cards.find import is_card
from lowmem.checkpoint.formats import LinearFormat, layout_for
from lowmem.checkpoint.readers import READERS, listed
from lowmem.config import BITS, TRAINED_BITS, QuantConfig
from lowmem.errors import RecipeError
from lowmem.models.architecture import LayerSpec, LinearSpec
from lowmem.plan.device import bfloat16_is_fast
from lowmem.plan.fit.budget import SizeBudget

DEFAULT_SHARD = 4 << 30
RECIPE_VERSION = 2
"""Raised by every change to the converter that changes what it writes. Measurements record it."""


@dataclass(frozen=True)
class ConvertOptions:
    """How a conversion runs; `store_head`, `shard_size`, `compute_dtype` and `reader` change the result."""

    device: str = "auto"
    """"auto", "cpu", "cuda:N" or "xpu:N"."""
    memory: int | None = None
    """The most bytes of host memory to use; None is what is free."""
    shard_size: int = DEFAULT_SHARD
    """Bytes of one safetensors file."""
    store_head: bool = False
    """Store a tied head too, for readers such as auto-gptq that do not support tied heads."""
    force: bool = False
    """Replace the output folder, and discard another unfinished conversion."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    reader: str | None = None
    """The program that must load the result, a name of checkpoint.readers.READERS."""
    compute_dtype: str = "auto"
    """Of the calibration's forward passes: "auto", "float32", "bfloat16" or "float16"."""
    budget: SizeBudget | None = None
    """The size for which bits, group size and symmetry of each linear are chosen; None takes the config's."""


DENSE_BITS = 16
"""`LinearSettings.bits` of a linear that is not quantized."""


@dataclass(frozen=True)
class LinearSettings:
    """How one linear is stored, where linears differ."""

    bits: int
    """Bits per weight: one of config.BITS, or 16 for a linear that is not quantized."""
    group_size: int = 0
    """Input columns that share a scale; -1 is one group per row, 0 the size of the recipe's `config`. It
    divides the inputs of the linear. Of linears that share an input each larger size is a multiple of each
    smaller one."""
    sym: bool = True
    """As QuantConfig.sym."""

    @property
    def dense(self) -> bool:
        """Whether the linear stays in 16 bits."""
        return self.bits == DENSE_BITS


@dataclass(frozen=True)
class Recipe:
    """How each linear of a model is quantized.

    Settings of a linear that are those of `config` are dropped, so that recipes which store every linear
    alike are equal. Raises RecipeError for settings that cannot be stored.
    """

    config: QuantConfig
    """What holds for the whole model, and for every linear without settings of its own."""
    linears: Mapping[str, LinearSettings] = field(default_factory=dict)
    """The linears that differ, by full name, such as `transformer.h.0.attn.c_attn`."""

    def __post_init__(self) -> None:
        own = LinearSettings(self.config.bits, self.config.group_size, self.config.sym)
        found = {name: self._complete(self.linears[name]) for name in sorted(self.linears)}
        for settings in dict.fromkeys(found.values()):
            if settings.bits not in (DENSE_BITS, *BITS):
                raise RecipeError(f"{settings.bits} bits is not supported", f"Use 16, {listed(BITS)}")
            self._config(settings)
        differ = {name: settings for name, settings in found.items() if settings != own}
        object.__setattr__(self, "linears", differ)

    def _complete(self, settings: LinearSettings) -> LinearSettings:
        """The settings with the group size that they mean."""
        if settings.dense:
            return LinearSettings(DENSE_BITS, -1)
        return replace(settings, group_size=settings.group_size or self.config.group_size)

    def _config(self, settings: LinearSettings) -> QuantConfig | None:
        """The whole model's config with a linear's settings. Raises RecipeError for values out of range."""
        if settings.dense:
            return None
        return replace(self.config, bits=settings.bits, group_size=settings.group_size, sym=settings.sym)

    def of(self, linear: str) -> QuantConfig | None:
        """How one linear, given by its full name, is quantized; None if it stays in 16 bits.

        Only bits, group size and symmetry differ between linears.
        """
        settings = self.linears.get(linear)
        return self._config(settings) if settings else self.config

    def for_linears(self, names: Iterable[str]) -> Recipe:
        """The same recipe, with a `config` whose settings some of these linears have: all of a model."""
        own = LinearSettings(self.config.bits, self.config.group_size, self.config.sym)
        found = [self.linears.get(name, own) for name in names]
        if own in found:
            return self
        most, _ = Counter(one for one in found if not one.dense).most_common(1)[0]
        config = replace(self.config, bits=most.bits, group_size=most.group_size, sym=most.sym)
        return Recipe(config, self.linears)

    @property
    def layout(self) -> str:
        """The layout of every quantized linear, a key of formats.LAYOUTS."""
        return layout_for({self.config.bits} | {one.bits for one in self.linears.values() if not one.dense})

    def format_of(self, linear: str) -> LinearFormat | None:
        """How one linear is stored; None if it stays in 16 bits."""
        config = self.of(linear)
        if config is None:
            return None
        return LinearFormat(config.bits, config.group_size, config.sym, layout=self.layout)

    def exceptions(self, reader: str | None = None) -> dict[str, LinearFormat | None]:
        """The formats of the linears that differ, as `quantization_config_dict` takes them.

        reader: whose joined linears are named too.
        """
        found = {name: self.format_of(name) for name in self.linears}
        return READERS[reader].with_joined(found) if reader else found

    def quantized(self, layer: LayerSpec) -> tuple[LinearSpec, ...]:
        """The linears of a layer that are quantized, in the order of execution."""
        return tuple(linear for group in self.groups(layer) for linear in group)

    def groups(self, layer: LayerSpec) -> tuple[tuple[LinearSpec, ...], ...]:
        """The same, in groups that share an input."""
        kept = (
            tuple(linear for linear in group if not self._is_dense(f"{layer.name}.{linear.name}"))
            for group in layer.groups
        )
        return tuple(group for group in kept if group)

    def _is_dense(self, linear: str) -> bool:
        return linear in self.linears and self.linears[linear].dense

    def trains(self, config: QuantConfig) -> bool:
        """Whether tuning trains the integers of a linear that is quantized like this, too."""
        return self.config.tune_steps > 0 and config.bits <= TRAINED_BITS

    def entries(self) -> dict[str, Any]:
        """The settings that the result depends on, by the names that users see, as plain values."""
        settings: dict[str, Any] = asdict(self.config)
        if self.linears:
            settings["linears"] = {
                name: [one.bits, one.group_size, one.sym] for name, one in self.linears.items()
            }
        return settings


def compute_dtype(requested: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype of the forward passes; "auto" is 16 bits where the hardware computes with them
    fast.
    """
    if requested == "auto":
        if stored == torch.float32:
            return torch.float32
        if stored == torch.float16 and is_card(device):
            return torch.float16
        return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    if requested not in ("float32", "bfloat16", "float16"):
        raise RecipeError(f"unknown --compute-dtype {requested!r}", "Use auto, float32, bfloat16 or float16")
    dtype: torch.dtype = getattr(torch, requested)
    return dtype
