"""Everything a conversion needs, opened and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lowmem.convert.allocation.allocate import allocate, recipe_of
from lowmem.convert.calibration import CalibrationRows, CalibrationSpec, load_rows
from lowmem.convert.math import products
from lowmem.convert.progress import Reporter
from lowmem.convert.recipe import RECIPE_VERSION, ConvertOptions, Recipe, compute_dtype
from lowmem.convert.stages.sizes import Workload

import lowmem
from lowmem.cards.find import resolve_device
from lowmem.checkpoint.headers.folder import names_in_index
from lowmem.checkpoint.readers import READERS, listed
from lowmem.checkpoint.source.fitted import fitted
from lowmem.checkpoint.source.open import Source, open_source
from lowmem.config import GROUP_SIZES, QuantConfig
from lowmem.errors import CalibrationError, RecipeError
from lowmem.models.architecture import Architecture, build_model, inspect
from lowmem.models.dialogue import Dialogue
from lowmem.models.experts import refuse_experts
from lowmem.models.layer_state import check_checkpoint
from lowmem.plan.fit.allocation import Allocation
from lowmem.streaming.weights import ModelWeights
from lowmem.text.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ConversionInputs:
    """The source, the calibration rows, and the recipe and options of a conversion."""

    source: Source
    weights: ModelWeights
    recipe: Recipe
    options: ConvertOptions
    rows: CalibrationRows
    tokenizer: PreTrainedTokenizerBase
    dialogue: Dialogue | None
    dtype: torch.dtype
    """Of the forward passes."""
    device: torch.device
    allocation: Allocation | None = None
    """How the recipe was chosen, if it was made for a size."""

    @property
    def arch(self) -> Architecture:
        """The source's architecture."""
        return self.weights.arch

    @property
    def workload(self) -> Workload:
        """The sizes that the memory and disk plans depend on."""
        count, length = self.rows.tokens.shape
        return Workload(
            self.arch, self.recipe, count, length, self.dtype, self.device, self.source.read_overhead
        )

    def entries(self) -> dict[str, Any]:
        """The settings that the result's bytes depend on, by the names that users see.

        job.json and the model card hold it; an interrupted conversion is recognised by it.
        """
        return {
            "lowmem": lowmem.__version__,
            # A result without the entry is of version 1.
            **({"recipe version": RECIPE_VERSION} if RECIPE_VERSION > 1 else {}),
            "torch": torch.__version__,
            "source": self.source.fingerprint(),
            **self.recipe.entries(),
            "calibration tokens": self.rows.digest,
            "compute dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "products": products.name(self.device),
            "shard size": self.options.shard_size,
            "store head": self.options.store_head,
            # It names joined linears in `dynamic`.
            **({"for": self.options.reader} if self.options.reader and self.recipe.linears else {}),
        }

    def describe(self) -> str:
        """One line: the source, its size, and the recipe."""
        config = self.recipe.config
        size = sum(info.nbytes for info in self.source.infos.values())
        group = "one group a row" if config.group_size == -1 else f"groups of {config.group_size}"
        count, length = self.rows.tokens.shape
        return (
            f"{self.source.display} ({self.arch.model_type}, {len(self.arch.layers)} layers, "
            f"{format_bytes(size)}) to {config.bits} bits, {group}, "
            f"{'symmetric' if config.sym else 'asymmetric'}{self._exceptions()}; "
            f"{count} × {length} calibration tokens"
        )

    def _exceptions(self) -> str:
        """How many linears are quantized otherwise, and how many are not."""
        settings = self.recipe.linears.values()
        kept = sum(one.dense for one in settings)
        found = [f"{len(settings) - kept} linears otherwise"] * (len(settings) > kept)
        return "".join(f", {part}" for part in (*found, *[f"{kept} linears not"] * (kept > 0)))


def prepare(
    source_name: str,
    config: QuantConfig | Recipe | None,
    calibration: CalibrationSpec,
    options: ConvertOptions,
    reporter: Reporter,
) -> ConversionInputs:
    """Open the source, read the calibration rows and check the options.

    reporter: receives each notice for the user. Raises LowmemError for errors that the user can correct.
    """

    def check(folder: Path) -> None:
        check_checkpoint(folder)
        refuse_experts(source_name, names_in_index(folder))

    opened = open_source(
        source_name, options.revision, progress=reporter.message, quantized=False, check=check
    )
    check_checkpoint(opened.path)
    refuse_experts(opened.display, opened.infos)
    source = fitted(opened, build_model(opened.config(), torch.float32, buffers=False))
    for note in source.notes:
        reporter.warning(note)
    model_config = source.config()
    arch = inspect(model_config)
    weights = ModelWeights(source, arch)
    chosen = fit_recipe(config, arch, reporter.message)
    if options.budget is None:  # else the allocation decides
        check_reader(options.reader, chosen, arch)
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit and calibration.row_length > limit:
        raise CalibrationError(
            f"rows of {calibration.row_length} tokens do not fit the model's {limit} positions",
            f"Use --row-length {limit} or less",
        )
    device = resolve_device(options.device, float64=True)
    tokenizer = source.tokenizer()
    dialogue = Dialogue.detect(tokenizer)
    rows = load_rows(calibration, tokenizer, dialogue, arch.shapes[arch.embedding][0])
    for note in rows.notes:
        reporter.message(note)
    dtype = compute_dtype(options.compute_dtype, weights.dtype, device)
    inputs = ConversionInputs(source, weights, chosen, options, rows, tokenizer, dialogue, dtype, device)
    if options.budget is None:
        return inputs
    allocation = allocate(inputs, options.budget, calibration, reporter)
    recipe = recipe_of(allocation, chosen)
    check_reader(options.reader, recipe, arch)
    return replace(inputs, recipe=recipe, allocation=allocation)


def check_reader(reader: str | None, recipe: Recipe, arch: Architecture) -> None:
    """Raise RecipeError if the program of that name does not load what the recipe makes of a model."""
    if reader is None:
        return
    if reader not in READERS:
        raise RecipeError(f"--for {reader} is not known", f"Use {listed(READERS)}")
    READERS[reader].check({name: recipe.format_of(name) for name in arch.linear_names()})


def fit_recipe(
    recipe: QuantConfig | Recipe | None, arch: Architecture, message: Callable[[str], None]
) -> Recipe:
    """Return a recipe whose group sizes divide the inputs of every linear that is quantized.

    Where the config's group size is 0 it is the largest of 128, 64 and 32 that divides all inputs. A group
    size that the user named is never changed. Raises RecipeError for a group size that does not divide the
    inputs of a linear, with a size that works; for a linear that GPTQ's words cannot hold or that is not of
    the model; and if no linear is quantized.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe(recipe or QuantConfig(group_size=0))
    linears = {f"{layer.name}.{linear.name}": linear for layer in arch.layers for linear in layer.linears}
    if unknown := next((name for name in recipe.linears if name not in linears), None):
        raise RecipeError(f"the model has no linear {unknown}", f"Its first linear is {next(iter(linears))}")
    packed = {name: linear for name, linear in linears.items() if recipe.of(name)}
    if not packed:
        raise RecipeError("all linears would stay in 16 bits", "Leave some to be quantized")
    widths: dict[int, str] = {}
    for name, linear in packed.items():
        widths.setdefault(linear.in_features, linear.name)
        for width, what in ((linear.in_features, "inputs"), (linear.out_features, "outputs")):
            if width % 32:
                raise RecipeError(
                    f"{name} has {width} {what}, which 32 does not divide",
                    "The GPTQ format cannot store it",
                )
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    if recipe.config.group_size == 0:
        chosen = fitting[0]
        if chosen != GROUP_SIZES[0]:
            odd = next(width for width in widths if width % GROUP_SIZES[0])
            message(
                f"group size {chosen}: {GROUP_SIZES[0]} does not divide the {odd} inputs of {widths[odd]}"
            )
        recipe = Recipe(replace(recipe.config, group_size=chosen), recipe.linears)
    recipe = recipe.for_linears(linears)
    for name, linear in packed.items():
        config = recipe.of(name)
        if config and config.group_size != -1 and linear.in_features % config.group_size:
            raise RecipeError(
                f"group size {config.group_size} does not divide the {linear.in_features} inputs of {name}",
                f"Use --group-size {fitting[0]}, or -1 for one group a row",
            )
    return recipe
