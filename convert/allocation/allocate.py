"""From a size to a recipe: sensitivities, measured or kept, and the best allocation for the size."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from lowmem.convert.allocation.measure import ROWS, Measurement, check_memory, measure
from lowmem.convert.calibration import CalibrationSpec, load_rows
from lowmem.convert.recipe import LinearSettings, Recipe

from lowmem.checkpoint.readers import READERS
from lowmem.plan import device as machine
from lowmem.plan.fit.allocation import Allocation, best_allocation, best_of_heads
from lowmem.plan.fit.budget import SizeBudget, left_for_linears
from lowmem.plan.fit.sensitivities import Sensitivities, read_kept, weights_digest
from lowmem.plan.shape import read_shape
from lowmem.streaming.pass_folder import digest_of

if TYPE_CHECKING:
    from lowmem.convert.inputs import ConversionInputs
    from lowmem.convert.progress import Reporter


def allocate(
    inputs: ConversionInputs, budget: SizeBudget, calibration: CalibrationSpec, reporter: Reporter
) -> Allocation:
    """Choose how each linear is stored. The sensitivities are measured unless an earlier run did.

    inputs: with a recipe whose bits do not count. calibration: where the measured rows come from. Raises
    MemoryBudgetError for a size below the smallest, or a memory limit that is too low to measure.
    """
    left = left_for_linears(budget, read_shape(inputs.source.path))
    found = sensitivities(inputs, calibration, reporter)
    reader = READERS[inputs.options.reader] if inputs.options.reader else None
    if reader is None:
        allocation = best_of_heads(left, lambda nbytes: best_allocation(found, nbytes))
    else:
        alike = list(reader.must_match(found.linears).values())

        def restricted(nbytes: int) -> Allocation:
            return best_allocation(found, nbytes, allows=lambda one: not reader.allows(one), alike=alike)

        allocation = best_of_heads(left, restricted)
    head = "" if allocation.head_bits == 16 else f" with a head of {allocation.head_bits} bits"
    reporter.message(
        f"{budget.label()}: {allocation.bits_per_weight:.2f} bits per weight on average{head}, "
        f"predicted KL divergence {allocation.predicted_kld:.2g}"
    )
    return allocation


def sensitivities(
    inputs: ConversionInputs, calibration: CalibrationSpec, reporter: Reporter
) -> Sensitivities:
    """The sensitivities of the source's linears, from lowmem's cache or measured now."""
    spec = replace(calibration, rows=max(1, min(ROWS, calibration.rows // 4)))
    vocabulary = inputs.arch.shapes[inputs.arch.embedding][0]
    rows = load_rows(spec, inputs.tokenizer, inputs.dialogue, vocabulary)
    kept = read_kept(weights_digest(inputs.source.path), digest_of(rows.tokens))
    if kept:
        reporter.message("the sensitivities were measured before")
        return kept
    work = Measurement(inputs.weights, inputs.source.config(), rows.tokens, _dtype(inputs), inputs.device)
    check_memory(work, inputs.options.memory or machine.host_memory_available() + machine.host_memory_used())
    count, length = rows.tokens.shape
    reporter.message(f"measuring how much each linear matters, on {count} × {length} calibration tokens")
    try:
        return measure(work, reporter.measuring)
    except KeyboardInterrupt:
        reporter.message("the layers measured so far are kept: repeat the command to go on after them")
        raise


def recipe_of(allocation: Allocation, base: Recipe) -> Recipe:
    """The recipe of an allocation; everything but bits, group sizes and symmetry is as in `base`."""
    usual = allocation.default
    config = replace(base.config, bits=usual.bits, group_size=usual.group_size, sym=usual.sym)
    linears = {
        name: LinearSettings(format.bits, format.group_size, format.sym)
        for name, format in allocation.linears.items()
    }
    return Recipe(config, linears)


def _dtype(inputs: ConversionInputs) -> torch.dtype:
    """Of the passes: gradients of a whole model exceed the range of float16."""
    if inputs.dtype != torch.float16:
        return inputs.dtype
    return torch.bfloat16 if machine.bfloat16_is_fast(inputs.device) else torch.float32
