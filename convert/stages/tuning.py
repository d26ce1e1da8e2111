"""The stage that tunes a quantized layer's scales, biases and norms; its integers stay.

All of them are trained together by Adam on the distance between the layer's output and that of the
unquantized model (targets.py), over the calibration rows. Block-wise training of a quantized model's
remaining parameters comes from EfficientQAT (Chen et al. 2024, arXiv:2407.11062); here only parameters whose
rounding need not be learned are trained.

Steps are relative: to the scale, to a norm's weights, to a linear's output. So one learning rate fits all
models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lowmem.convert.math.gptq import Quantized
from lowmem.convert.math.grid import storable
from lowmem.convert.stages.context import LayerContext, Stage
from lowmem.convert.stages.quantize import restore
from lowmem.convert.stages.sizes import LayerSizes
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from lowmem.streaming.layer_calls import replaced_forwards

RATE = 2e-3
"""Adam's learning rate in the first step; it falls linearly to 0."""
LOSS_SCALE = 2.0**16
"""Factor of the loss that keeps float16 gradients from vanishing; Adam's steps do not depend on it."""
ADAM_EPS = 1e-12
"""Small, because the gradient of one scale among millions is tiny, and it should move as well."""
CHECKS = 4
"""Batches on which the layer is measured before and after; a result that is not better is discarded."""


@dataclass(frozen=True)
class Tuned:
    """The result of tuning one layer; both mappings are empty if no step reduced the error."""

    scales: Mapping[str, torch.Tensor]
    """float16 [groups, out], by linear."""
    others: Mapping[str, torch.Tensor]
    """Biases and norms by their name in the layer, in the dtype they are stored in."""
    error_before: float
    """Error of the layer's output relative to its energy."""
    error_after: float


class _Product(torch.autograd.Function):
    """x @ (z * scale) for integers z, without a float32 gradient for every weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, scale, z)
        return x @ _weight(z, scale, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        x, scale, z = ctx.saved_tensors
        back = grad @ _weight(z, scale, grad.dtype).T if ctx.needs_input_grad[0] else None
        slope = x.reshape(-1, x.shape[-1]).T @ grad.reshape(-1, grad.shape[-1])
        groups, out = scale.shape
        return back, (slope * z).view(groups, -1, out).sum(1, dtype=torch.float32), None


def _weight(z: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W^T [in, out] from integers z, int8 [in, out], and scales [groups, out]."""
    groups, out = scale.shape
    return (z.view(groups, -1, out) * scale[:, None].to(dtype)).view(z.shape)


@dataclass
class _Linear:
    """A quantized linear while it is tuned."""

    module: nn.Linear
    z: torch.Tensor
    """Integers minus zero-points [in, out], int8 where they fit."""
    scale: torch.Tensor
    """float32 [groups, out]."""
    change: nn.Parameter
    """Relative change of the scale."""

    @classmethod
    def of(cls, module: nn.Linear, found: Quantized, device: torch.device) -> _Linear:
        width = found.codes.shape[0] // found.scales.shape[0]
        z = found.codes.to(device, torch.int16)
        z -= found.zeros.to(device, torch.int16).repeat_interleave(width, 0)
        if int(z.min()) >= -128 and int(z.max()) <= 127:
            z = z.to(torch.int8)
        scale = found.scales.to(device, torch.float32)
        return cls(module, z, scale, nn.Parameter(torch.zeros_like(scale)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Product.apply(x, self.scale * (1 + self.change), self.z)
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
            for name, value in tuned.others.items():
                context.tensors[name] = value
                context.layer.get_parameter(name).data.copy_(value)
            if context.replay is not None:
                context.replay.clear()  # the outputs have changed
            restore(context, context.recipe.quantized(context.spec))

    def peak(self, sizes: LayerSizes) -> int:
        # The integers are signed now: asymmetric ones of 8 bits take two bytes.
        signed = sum(
            sizes.values([linear])
            for linear in sizes.quantized
            if sizes.config(linear).bits == 8 and not sizes.config(linear).sym
        )
        # One linear's weight and its gradient, and what the forward pass saves for the backward pass.
        step = sizes.largest * (2 + 3 * sizes.itemsize) + 3 * sizes.forward(sizes.tokens_a_step) // 2
        kept = sizes.values(sizes.layer.linears) - sizes.values(sizes.quantized)
        dense = kept * sizes.itemsize if sizes.work.replays else sizes.dense
        return sizes.held - sizes.dense + dense + signed + step

    def leave(self, sizes: LayerSizes) -> None:
        sizes.dense = sizes.whole


def tune(context: LayerContext) -> Tuned:
    """Tune scales, biases and norms of a quantized layer; the layer itself stays as it is.

    `context.quantized` is emptied, since its integers are converted. A step takes `tuning_batch.rows` rows.
    """
    steps, states, batch = context.recipe.config.tune_steps, context.states, context.tuning_batch
    wanted = context.targets.output if context.targets else None
    assert wanted is not None
    names = [linear.name for linear in context.recipe.quantized(context.spec)]
    linears = {
        name: _Linear.of(context.linear(name), context.quantized.pop(name), context.device) for name in names
    }
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
    if not after < before:
        return Tuned({}, {}, before, before)
    return Tuned(scales, rounded, before, after)


def _adam(
    linears: Mapping[str, _Linear],
    others: Mapping[str, _Other],
    loss_of: Callable[[int, Mapping[str, torch.Tensor]], torch.Tensor],
    starts: list[int],
    steps: int,
) -> None:
    """Train on one batch a step, in a random order that uses every batch before one repeats."""
    changes = [linear.change for linear in linears.values()] + [other.change for other in others.values()]
    optimizer = torch.optim.Adam(changes, lr=RATE, eps=ADAM_EPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(0)  # a resumed job must give the same bytes
    order: list[int] = []
    with torch.enable_grad():
        for _ in range(steps):
            order = order or torch.randperm(len(starts), generator=generator).tolist()
            optimizer.zero_grad()
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
