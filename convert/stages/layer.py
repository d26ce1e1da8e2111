"""The stages of one decoder layer, in order, and the stages at its ends: read, write, next hidden states."""

from __future__ import annotations

import torch
from lowmem.convert.math.gptq import group_width, nested
from lowmem.convert.recipe import Recipe
from lowmem.convert.stages.capture import CaptureInputs, Group
from lowmem.convert.stages.context import LayerContext, Stage
from lowmem.convert.stages.quantize import FactorHessian, RestoreGroup, RoundLinear
from lowmem.convert.stages.record import RecordTargets
from lowmem.convert.stages.sizes import LayerSizes
from lowmem.convert.stages.tuning import TuneLayer

from lowmem.checkpoint.files.writer import TensorPlan, write_tensors
from lowmem.errors import RecipeError
from lowmem.models.architecture import LayerSpec


def layer_stages(layer: LayerSpec, recipe: Recipe, *, replays: bool) -> list[Stage]:
    """List every stage of one decoder layer, from its source tensors to its file and the next hidden
    states.
    """
    return [ReadLayer(), *quantizing_stages(layer, recipe, replays=replays), WriteLayer(), AdvanceStates()]


def quantizing_stages(layer: LayerSpec, recipe: Recipe, *, replays: bool) -> list[Stage]:
    """List the stages that quantize a layer in memory.

    With true_sequential each group sees the outputs of the quantized ones before it; otherwise all inputs are
    captured in one pass of the unquantized layer. replays: finished linears' outputs are kept in files.
    """
    config = recipe.config
    stages: list[Stage] = [RecordTargets()] if config.follows_unquantized else []
    all_groups = recipe.groups(layer)
    if not all_groups:  # RecordTargets still advances the unquantized stream
        return stages
    last = all_groups[-1]
    passes = [[group] for group in all_groups] if config.true_sequential else [list(all_groups)]
    for groups in passes:
        # Only AdvanceStates needs the last group's outputs, once: no file pays for itself.
        keep = replays and groups[-1] is not last
        stages.append(CaptureInputs(groups, keep))
        for group in groups:
            _check_group(layer, group, recipe)
            stages.append(FactorHessian(group))
            stages += [RoundLinear(linear, alone=len(group) == 1) for linear in group]
            stages.append(RestoreGroup(group, keep, restore=keep or not (replays and config.tune_steps)))
    if config.tune_steps:
        stages.append(TuneLayer())
    return stages


def _check_group(layer: LayerSpec, group: Group, recipe: Recipe) -> None:
    """Raise RecipeError unless the columns of an input can be ordered by the groups of all its linears."""
    configs = [recipe.of(f"{layer.name}.{linear.name}") for linear in group]
    widths = {group_width(config, group[0].in_features) for config in configs if config}
    if recipe.config.desc_act and not nested(widths):
        raise RecipeError(
            f"{', '.join(linear.name for linear in group)} of {layer.name} share an input, and their group "
            f"sizes {', '.join(str(width) for width in sorted(widths))} do not divide each other",
            "Give them group sizes of which each larger one is a multiple of each smaller one",
        )


class ReadLayer(Stage):
    """Read the layer's tensors from the source, and begin to read the next layer's.

    They are copied to the card where it has room for them, else read into the page cache.
    """

    name = "read"

    def run(self, context: LayerContext) -> None:
        weights = context.weights
        assert weights is not None
        with context.seconds.of("read"):
            found = None if context.prefetch is None else context.prefetch.take(context.spec)
            weights.fill_layer(context.layer, context.spec, context.states.dtype, context.device, found)
            if context.following is None:
                return
            if context.prefetch is None:
                weights.read_ahead(context.following)
            else:
                context.prefetch.start(context.following)

    def peak(self, sizes: LayerSizes) -> int:
        return sizes.whole + sizes.work.read_overhead(sizes.largest)


class WriteLayer(Stage):
    """Write the packed linears and the layer's other tensors to a file of their own."""

    name = "write"

    def run(self, context: LayerContext) -> None:
        weights, prefix = context.weights, f"{context.spec.name}."
        assert weights is not None
        quantized = {f"{linear.name}.weight" for linear in context.recipe.quantized(context.spec)}
        plans = [
            TensorPlan(prefix + name, tensor.dtype, tuple(tensor.shape))
            for name, tensor in context.tensors.items()
        ]
        plans += [
            weights.plan(prefix + name)
            for name in weights.arch.inside(context.spec)
            if name not in quantized and name not in context.tensors
        ]

        def read(name: str) -> torch.Tensor:
            made = context.tensors.get(name.removeprefix(prefix))
            return weights.read_narrowed(name) if made is None else made.cpu()

        with context.seconds.of("write"):
            if context.prefetch is not None:
                context.prefetch.finish()  # the source is read by one thread at a time
            write_tensors(context.files.staged, sorted(plans, key=lambda plan: plan.name), read)
        weights.source.release()

    def peak(self, sizes: LayerSizes) -> int:
        return sizes.held


class AdvanceStates(Stage):
    """Run the calibration rows through the quantized layer: the hidden states at the next layer's input."""

    name = "next hidden states"

    def run(self, context: LayerContext) -> None:
        start, call, replay = 0, context.batch.call, context.replay

        def run(chunk: torch.Tensor) -> torch.Tensor:
            nonlocal start
            hidden = chunk.to(context.device)
            if replay is None:
                output = call.run(context.layer, hidden)
            else:
                output = replay.run(context.layer, call, start, hidden)
            start += chunk.shape[0]
            return output.cpu()

        with context.seconds.of("forward"):
            context.states = context.states.advance(
                context.files.next_states, context.batch.rows, run, where=f"after {context.spec.name}"
            )
        if replay is not None:
            replay.clear()

    def peak(self, sizes: LayerSizes) -> int:
        return sizes.whole + sizes.packed + sizes.forward(sizes.tokens)
