"""The stages that quantize a group of linears: factor its Hessian, round each linear, put the result back."""

from __future__ import annotations

import torch
from lowmem.convert.math import gptq, hessian, rounding
from lowmem.convert.math.products import add_product
from lowmem.convert.stages import integers
from lowmem.convert.stages.capture import Group
from lowmem.convert.stages.context import LayerContext, LinearReport, Stage
from lowmem.convert.stages.sizes import FLOAT32, LayerSizes, packed_bytes
from torch import nn

from lowmem.checkpoint.dequantize import PackedWeight, dequantize
from lowmem.checkpoint.formats import QUANT_PARTS, LinearFormat
from lowmem.checkpoint.packing import pack_rows, pack_zeros
from lowmem.checkpoint.values import all_finite
from lowmem.config import QuantConfig
from lowmem.errors import SourceError
from lowmem.models.architecture import LinearSpec


class FactorHessian(Stage):
    """Factor the Hessian of a group in place, with its columns in an order that suits every linear."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.name = f"factor of {group[0].name}"

    def run(self, context: LayerContext) -> None:
        first, captured = self.group[0], context.captured
        configs = [context.config(linear) for linear in self.group]
        with context.seconds.of("factor"):
            context.prepared = gptq.prepare(captured.hessians.pop(first.name).finish(), *configs)
            targets = context.targets
            if targets is not None and first.name in targets.inputs and first.name in captured.lacking:
                lacking = captured.lacking.pop(first.name)
                lacking *= configs[0].correction / captured.tokens
                context.shared_lack = context.prepared.whiten_in_place(lacking)

    def peak(self, sizes: LayerSizes) -> int:
        n = self.group[0].in_features
        return sizes.held + 3 * min(n, hessian.COLUMN_BLOCK) * n * FLOAT32


class RoundLinear(Stage):
    """Quantize and pack one linear, and free its dense weight."""

    def __init__(self, linear: LinearSpec, alone: bool) -> None:
        self.linear = linear
        self.alone = alone
        """Whether no other linear shares its input."""
        self.name = f"rounding of {linear.name}"

    def run(self, context: LayerContext) -> None:
        name, config = self.linear.name, context.config(self.linear)
        assert context.prepared is not None
        with context.seconds.of("quantize"):
            weight = _take_weight_t(context.linear(name), f"{context.spec.name}.{name}")
            wanted = _wanted(weight, name, context, config)
            result = gptq.quantize(weight, context.prepared, config, wanted=wanted)
            del wanted
            if context.recipe.trains(config):
                context.starts[name] = integers.start_of(weight, result.scales, context.prepared.order)
            del weight
        with context.seconds.of("pack"):
            context.tensors.update(packed(name, result, context.format(self.linear)))
        energy = context.captured.mean_energy(name)
        if context.recipe.config.tune_steps:
            context.output_rms[name] = (energy / self.linear.out_features) ** 0.5
        report = LinearReport(
            name,
            self.linear.in_features,
            self.linear.out_features,
            result.squared_error / energy if energy > 0 else 0.0,
            result.damping,
            result.dead_columns,
        )
        context.reports.append(report)
        context.on_linear(report)

    def peak(self, sizes: LayerSizes) -> int:
        n, out = self.linear.in_features, self.linear.out_features
        config, weight = sizes.config(self.linear), n * out
        # The transposed copy is made before the linear's own weight is dropped.
        copied = sizes.held + weight * (FLOAT32 if sizes.work.dtype != torch.bfloat16 else sizes.itemsize)
        # What the linear lacks: solved in place where its own matrix holds it, else made from the group's.
        wanted = weight * FLOAT32 * sizes.work.recipe.config.corrects
        if self.alone and sizes.lacking.get(self.linear.name) == wanted:
            wanted = 0
        width = gptq.group_width(config, n)
        columns = 3 * gptq.FAR_BLOCK + 2 * (min(width, n) if width > rounding.WIDEST else 0)
        temporary = (columns * out + 512 * n) * FLOAT32
        return max(copied, copied - weight * sizes.itemsize + wanted + weight + temporary)

    def leave(self, sizes: LayerSizes) -> None:
        weight, config = self.linear.in_features * self.linear.out_features, sizes.config(self.linear)
        sizes.dense -= weight * sizes.itemsize
        sizes.packed += packed_bytes(self.linear, config)
        sizes.starts += weight * sizes.work.recipe.trains(config)


class RestoreGroup(Stage):
    """Restore a quantized group's dequantized weights, or store the group's outputs in files.

    keep_outputs: compute the group's outputs once, write them to files (replay.py), then free the weights.
    restore: whether this stage restores the weights; False if tuning follows, which restores them itself.
    """

    def __init__(self, group: Group, keep_outputs: bool, restore: bool = True) -> None:
        self.group = group
        self.keep_outputs = keep_outputs
        self.restore = restore
        self.name = f"outputs of {group[0].name}"

    def run(self, context: LayerContext) -> None:
        context.prepared = context.shared_lack = None
        if context.targets is not None:
            context.targets.drop(self.group)
        with context.seconds.of("forward"):
            if self.restore:
                restore(context, self.group)
            if self.keep_outputs:
                assert context.replay is not None
                linears = [(linear.name, context.linear(linear.name)) for linear in self.group]
                context.replay.compute(linears, context.states.shape[0], context.batch.rows)
                for _, linear in linears:
                    _drop_weight(linear)

    def _weights(self, sizes: LayerSizes) -> int:
        return sizes.values(self.group) * sizes.itemsize

    def _freed(self, sizes: LayerSizes) -> int:
        return self.group[0].in_features ** 2 * FLOAT32 + sizes.lacking.get(self.group[0].name, 0)

    def peak(self, sizes: LayerSizes) -> int:
        widths = self.group[0].in_features + max(linear.out_features for linear in self.group)
        chunk = 3 * sizes.tokens * widths * sizes.itemsize
        return sizes.held - self._freed(sizes) + self._weights(sizes) + chunk

    def leave(self, sizes: LayerSizes) -> None:
        sizes.hessians -= self.group[0].in_features ** 2 * FLOAT32
        sizes.lacking.pop(self.group[0].name, None)
        if self.restore and not self.keep_outputs:
            sizes.dense += self._weights(sizes)


def restore(context: LayerContext, linears: tuple[LinearSpec, ...]) -> None:
    """Restore the weights of quantized linears exactly as inference will dequantize their packed tensors."""
    for spec in linears:
        linear = context.linear(spec.name)
        tensors = (context.tensors[f"{spec.name}.{part}"] for part in QUANT_PARTS)
        packed = PackedWeight(context.format(spec), *tensors)
        weight = dequantize(packed, linear.weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)


def _take_weight_t(linear: nn.Linear, full_name: str) -> torch.Tensor:
    """W^T [in, out] in float32 or bfloat16; the linear's own weight is dropped.

    Raises SourceError for weights that are not finite.
    """
    weight = linear.weight.detach()
    if not all_finite(weight):
        raise SourceError(f"{full_name}.weight holds values that are not finite", "Download the source again")
    dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    transposed = torch.empty(weight.shape[::-1], dtype=dtype, device=weight.device)
    transposed.copy_(weight.T)
    del weight
    _drop_weight(linear)
    return transposed


def _drop_weight(linear: nn.Linear) -> None:
    """Free a linear's weight; its shape and dtype stay known."""
    meta = torch.empty_like(linear.weight, device="meta")
    linear._parameters["weight"] = nn.Parameter(meta, requires_grad=False)


def _wanted(
    weight_t: torch.Tensor, name: str, context: LayerContext, config: QuantConfig
) -> torch.Tensor | None:
    """What the linear should output beside W x, as `gptq.quantize` takes it."""
    captured, prepared, shared = context.captured, context.prepared, context.shared_lack
    if name in captured.lacking:
        assert prepared is not None
        lacking = captured.lacking.pop(name)
        lacking *= config.correction / captured.tokens
        return prepared.whiten_in_place(lacking)
    if shared is None:
        return None
    return add_product(torch.zeros_like(weight_t, dtype=shared.dtype), shared, weight_t, rounded=True)


def packed(name: str, result: gptq.Quantized, format: LinearFormat) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear as they are stored, by their names in the layer."""
    n = result.codes.shape[0]
    width = n // result.scales.shape[0]
    return {
        f"{name}.qweight": pack_rows(result.codes, format.bits, format.layout),
        f"{name}.qzeros": pack_zeros(result.zeros, format.bits, format.layout),
        f"{name}.scales": result.scales,
        f"{name}.g_idx": (torch.arange(n, dtype=torch.int32, device=result.codes.device) // width),
    }
