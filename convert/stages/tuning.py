"""The stage that tunes a quantized layer: its integers, scales, biases and norms together.

They are trained on the distance between the layer's output and that of the unquantized model (targets.py),
over the calibration rows: the integers as integers.py describes, the others by Adam. Block-wise training of
all of a quantized layer's parameters comes from EfficientQAT (Chen et al. 2024, arXiv:2407.11062).

Steps are relative: to a step of the grid, to the scale, to a norm's weights, to a linear's output. So one
learning rate fits all models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from lowmem.convert.math.gptq import group_width
from lowmem.convert.math.grid import storable
from lowmem.convert.stages.context import LayerContext, Stage
from lowmem.convert.stages.integers import Product, Scratch, TrainedWeight
from lowmem.convert.stages.quantize import restore
from lowmem.convert.stages.sizes import FLOAT32, LayerSizes
from torch import nn
from torch.func import functional_call

from lowmem.checkpoint.packing import pack_rows, unpack_rows, unpack_zeros
from lowmem.models.architecture import LinearSpec
from lowmem.streaming.layer_calls import replaced_forwards

RATE = 1.2e-2
"""Adam's learning rate in the first step, for the largest integer of a grid in its steps. So a scale's own is
this over 2^(bits - 1); biases and norms have that of the narrowest linear. It falls linearly to 0."""
INTEGER_RATE = 1e-3
"""The usual change of a hidden value in the first step, in steps of the grid; it falls alike."""
LOSS_SCALE = 2.0**16
"""Factor of the loss that keeps float16 gradients from vanishing; Adam's steps do not depend on it."""
ADAM_EPS = 1e-12
"""Small, because the gradient of one scale among millions is tiny, and it should move as well."""
CHECKS = 4
"""Batches on which the layer is measured before and after; a result that is not better is discarded."""


@dataclass(frozen=True)
class Tuned:
    """The result of tuning one layer; the mappings are empty if no step reduced the error."""

    scales: Mapping[str, torch.Tensor]
    """float16 [groups, out], by linear."""
    words: Mapping[str, torch.Tensor]
    """`qweight` of the linears whose integers were trained."""
    others: Mapping[str, torch.Tensor]
    """Biases and norms by their name in the layer, in the dtype they are stored in."""
    error_before: float
    """Error of the layer's output relative to its energy."""
    error_after: float


@dataclass
class _Linear:
    """A quantized linear while it is tuned."""

    module: nn.Linear
    weight: TrainedWeight
    scale: torch.Tensor
    """float32 [groups, out]."""
    change: nn.Parameter
    """Relative change of the scale."""

    @classmethod
    def of(cls, spec: LinearSpec, context: LayerContext, slopes: Scratch) -> _Linear:
        """A linear as it was rounded; what training begins at is taken from the context."""
        config, format = context.config(spec), context.format(spec)
        qweight, qzeros, scales = (
            context.tensors[f"{spec.name}.{part}"] for part in ("qweight", "qzeros", "scales")
        )
        codes = unpack_rows(qweight, format.bits, format.layout)
        zeros = unpack_zeros(qzeros, format.bits, format.layout).to(torch.uint8)
        weight = TrainedWeight.of(codes, zeros, config.maxq, context.starts.pop(spec.name, None))
        weight.slopes = slopes
        scale = scales.to(torch.float32)
        return cls(context.linear(spec.name), weight, scale, nn.Parameter(torch.zeros_like(scale)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Product.apply(x, self.scale * (1 + self.change), self.weight)
        return y if self.module.bias is None else y + self.module.bias.to(y.dtype)

    def stored(self) -> torch.Tensor:
        return storable(self.scale * (1 + self.change.detach()), torch.float32).to(torch.float16)


@dataclass
class _Other:
    """A bias or a norm's weights while they are tuned."""

    before: torch.Tensor
    unit: float
    """Size of what the parameter works on; the change is measured in it."""
    change: nn.Parameter

    def value(self) -> torch.Tensor:
        return self.before + self.unit * self.change


class TuneLayer(Stage):
    """Tune the layer, and store the result if the layer's output came closer to its target."""

    name = "tuning"

    def run(self, context: LayerContext) -> None:
        with context.seconds.of("tune"):
            tuned = tune(context)
            for name, scales in tuned.scales.items():
                context.tensors[f"{name}.scales"] = scales
            for name, words in tuned.words.items():
                context.tensors[f"{name}.qweight"] = words
            for name, value in tuned.others.items():
                context.tensors[name] = value
                context.layer.get_parameter(name).data.copy_(value)
            if context.replay is not None:
                context.replay.clear()  # the outputs have changed
            restore(context, context.recipe.quantized(context.spec))

    def peak(self, sizes: LayerSizes) -> int:
        wide = [one for one in sizes.quantized if sizes.config(one).bits == 8 and not sizes.config(one).sym]
        trained = [one for one in sizes.quantized if sizes.work.recipe.trains(sizes.config(one))]
        quantized, largest = sizes.values(sizes.quantized), sizes.largest
        # Signed integers; their fractions of two bytes take the place of the starts of one.
        integers = quantized + sizes.values(wide) + 2 * sizes.values(trained) - sizes.starts
        # The scale, its change, the gradient and Adam's two moments; the product of the first two.
        grids = [(one.out_features, one.in_features, sizes.config(one)) for one in sizes.quantized]
        scales = 6 * FLOAT32 * sum(out * (n // group_width(config, n)) for out, n, config in grids)
        # The weights of the step, the gradient of one, and what the forward pass saves for the backward pass.
        step = (quantized + largest) * sizes.itemsize + 3 * sizes.forward(sizes.tokens_a_step) // 2
        converted = largest * 5  # while one linear's words become integers, or integers words
        kept = sizes.values(sizes.layer.linears) - quantized
        dense = kept * sizes.itemsize if sizes.work.replays else sizes.dense
        return sizes.held - sizes.dense + dense + integers + scales + step + converted

    def leave(self, sizes: LayerSizes) -> None:
        sizes.dense, sizes.starts = sizes.whole, 0


def tune(context: LayerContext) -> Tuned:
    """Tune a quantized layer; the layer itself and its tensors stay as they are.

    `context.starts` is emptied. A step takes `tuning_batch.rows` rows.
    """
    steps, states, batch = context.recipe.config.tune_steps, context.states, context.tuning_batch
    wanted = context.targets.output if context.targets else None
    assert wanted is not None
    specs = context.recipe.quantized(context.spec)
    slopes = Scratch()
    linears = {spec.name: _Linear.of(spec, context, slopes) for spec in specs}
    others = dict(_others(context.layer, linears, context.output_rms))
    starts = list(range(0, states.shape[0], batch.rows))
    checks = starts[:: max(1, len(starts) // CHECKS)][:CHECKS]

    def loss_of(start: int, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        inputs = states.read(start, start + batch.rows).to(context.device)
        target = wanted.read(start, start + batch.rows).to(context.device, torch.float32)
        as_run = {name: value.to(states.dtype) for name, value in values.items()}
        output = batch.call.output(
            lambda *a, **k: functional_call(context.layer, as_run, a, k), inputs
        ).float()
        return (output - target).square().mean() / target.square().mean().clamp_min(1e-30)

    def checked(values: Mapping[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return sum(float(loss_of(start, values)) for start in checks) / len(checks)

    with replaced_forwards((linear.module, linear.forward) for linear in linears.values()):
        before = checked({name: other.before for name, other in others.items()})
        _adam(linears, others, loss_of, starts, steps)
        scales = {name: linear.stored() for name, linear in linears.items()}
        rounded = {
            name: other.value().detach().to(context.stored_dtype(name)) for name, other in others.items()
        }
        for name, linear in linears.items():
            linear.scale, linear.change = scales[name].float(), nn.Parameter(torch.zeros_like(linear.scale))
        after = checked(rounded)
    for linear in linears.values():
        linear.weight.free()
    if not after < before:
        return Tuned({}, {}, {}, before, before)
    formats = {spec.name: context.format(spec) for spec in specs}
    words = {
        name: pack_rows(linear.weight.codes(), formats[name].bits, formats[name].layout)
        for name, linear in linears.items()
        if linear.weight.fraction is not None
    }
    return Tuned(scales, words, rounded, before, after)


def _adam(
    linears: Mapping[str, _Linear],
    others: Mapping[str, _Other],
    loss_of: Callable[[int, Mapping[str, torch.Tensor]], torch.Tensor],
    starts: list[int],
    steps: int,
) -> None:
    """Train on one batch a step, in a random order that uses every batch before one repeats."""

    def left(step: int) -> float:
        """The share of the first step's rates."""
        return 1 - step / steps

    rates = [2 * RATE / (linear.weight.maxq + 1) for linear in linears.values()]
    groups = [
        {"params": [linear.change], "lr": rate} for linear, rate in zip(linears.values(), rates, strict=True)
    ]
    groups.append({"params": [other.change for other in others.values()], "lr": max(rates)})
    optimizer = torch.optim.Adam(groups, eps=ADAM_EPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, left)
    generator = torch.Generator().manual_seed(0)  # a resumed job must give the same bytes
    order: list[int] = []
    with torch.enable_grad():
        for step in range(steps):
            order = order or torch.randperm(len(starts), generator=generator).tolist()
            optimizer.zero_grad()
            for linear in linears.values():
                linear.weight.rate = INTEGER_RATE * left(step)
            loss = loss_of(starts[order.pop()], {name: other.value() for name, other in others.items()})
            (LOSS_SCALE * loss).backward()
            optimizer.step()
            schedule.step()


def _others(
    layer: nn.Module, linears: Mapping[str, _Linear], output_rms: Mapping[str, float]
) -> Iterator[tuple[str, _Other]]:
    """Every floating-point parameter of the layer except the linears' weights, by name.

    Without the biases of linears that are not quantized.
    """
    for name, parameter in layer.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = layer.get_submodule(owner_name)
        if isinstance(owner, nn.Linear) and (leaf == "weight" or owner_name not in linears):
            continue
        if not parameter.is_floating_point():
            continue
        if owner_name in linears:
            size = output_rms[owner_name]
        else:
            # A norm's output is about as large as its weights, so its bias is measured by them too.
            beside = getattr(owner, "weight", None)
            size = float((parameter if beside is None else beside).detach().float().square().mean().sqrt())
        before = parameter.detach().float()
        yield name, _Other(before, size if size > 0 else 1.0, nn.Parameter(torch.zeros_like(before)))
