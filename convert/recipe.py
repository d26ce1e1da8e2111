"""What a conversion is asked to do, and the recipe by which an interrupted one is recognised."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lowmem.convert.calibration import CalibrationRows
from lowmem.convert.math import products
from lowmem.convert.progress import Reporter

import lowmem
from lowmem.checkpoint.source.open import Source
from lowmem.config import QuantConfig
from lowmem.errors import RecipeError
from lowmem.models.architecture import Architecture
from lowmem.plan.device import bfloat16_is_fast
from lowmem.text.units import format_bytes

GROUP_SIZES = (128, 64, 32)
"""Tried in this order when the user names none and the larger one does not divide."""
DEFAULT_SHARD = 4 << 30
RECIPE_VERSION = 1
"""Raised by every change to the converter that changes what it writes. Measurements record it."""


@dataclass(frozen=True)
class Options:
    """How a conversion runs; only `store_head`, `shard_size` and `compute_dtype` change what it writes.

    memory: the most bytes of host memory that may be used; None is what is free.
    shard_size: bytes of one file of the result. store_head: store a tied head too, for readers such as
    auto-gptq that know nothing of tied heads. force: replace OUT, drop another unfinished job.
    revision: of a hub id. compute_dtype: auto, float32 or bfloat16, for the calibration's forward passes.
    """

    device: str = "auto"
    memory: int | None = None
    shard_size: int = DEFAULT_SHARD
    store_head: bool = False
    force: bool = False
    revision: str | None = None
    compute_dtype: str = "auto"


def compute_dtype(asked: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the forward passes: 16 bits where the hardware has them, else float32."""
    if asked == "auto":
        if stored == torch.float32:
            return torch.float32
        if stored == torch.float16 and device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    if asked not in ("float32", "bfloat16", "float16"):
        raise RecipeError(f"--compute-dtype {asked!r} is not known", "Use auto, float32, bfloat16 or float16")
    dtype: torch.dtype = getattr(torch, asked)
    return dtype


def fit_group_size(config: QuantConfig | None, arch: Architecture, reporter: Reporter) -> QuantConfig:
    """A recipe whose group size divides the inputs of every linear.

    A group size that the user named is never changed: RecipeError names the linear that it does not
    divide, and a size that would do. With `config.group_size` 0 (none named) the largest of 128, 64 and
    32 that divides all is taken.
    """
    config = config or QuantConfig(group_size=0)
    sizes = {layer_linear.in_features: layer_linear.name for la in arch.layers for layer_linear in la.linears}
    for layer in arch.layers:
        for linear in layer.linears:
            for width, what in ((linear.in_features, "inputs"), (linear.out_features, "outputs")):
                if width % 32:
                    raise RecipeError(
                        f"{layer.name}.{linear.name} has {width} {what}, which 32 does not divide",
                        "The GPTQ format cannot store it",
                    )
    fitting = [size for size in GROUP_SIZES if all(n % size == 0 for n in sizes)]
    if config.group_size == 0:
        chosen = fitting[0]
        if chosen != GROUP_SIZES[0]:
            odd = next(n for n in sizes if n % GROUP_SIZES[0])
            reporter.message(
                f"group size {chosen}: {GROUP_SIZES[0]} does not divide the {odd} inputs of {sizes[odd]}"
            )
        return replace(config, group_size=chosen)
    for n, name in sizes.items():
        if config.group_size != -1 and n % config.group_size:
            raise RecipeError(
                f"group size {config.group_size} does not divide the {n} inputs of {name}",
                f"Use --group-size {fitting[0]}, or -1 for one group a row",
            )
    return config


def recipe_of(
    fingerprint: str,
    config: QuantConfig,
    calibration_digest: str,
    dtype: torch.dtype,
    device: torch.device,
    options: Options,
) -> dict[str, Any]:
    """Everything that the result's bytes depend on, by the names that a user knows."""
    return {
        "lowmem": lowmem.__version__,
        "recipe version": RECIPE_VERSION,
        "torch": torch.__version__,
        "source": fingerprint,
        **asdict(config),
        "calibration tokens": calibration_digest,
        "compute dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "products": products.name(device),
        "shard size": options.shard_size,
        "store head": options.store_head,
    }


def describe(source: Source, arch: Architecture, config: QuantConfig, rows: CalibrationRows) -> str:
    """One line: what becomes what."""
    size = sum(info.nbytes for info in source.infos.values())
    group = "one group a row" if config.group_size == -1 else f"groups of {config.group_size}"
    count, length = rows.tokens.shape
    return (
        f"{source.display} ({arch.model_type}, {len(arch.layers)} layers, {format_bytes(size)}) to "
        f"{config.bits} bits, {group}, {'symmetric' if config.sym else 'asymmetric'}; "
        f"{count} × {length} calibration tokens"
    )
