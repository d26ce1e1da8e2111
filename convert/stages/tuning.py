"""What a quantized layer has beside its integers, tuned until it puts out what it should.

The integers stay. The scales of all groups, the biases and the norms of one decoder layer move together, by
Adam on the distance of the layer's output to the unquantized model's own (targets.py), over the calibration
rows. Block-wise training of what is left of a quantized model is EfficientQAT's idea (Chen et al. 2024,
arXiv:2407.11062); here nothing is trained whose rounding would have to be learned as well.

A step is a share of what it changes: of the scale, of a norm's weights, of what a linear puts out. So one
rate serves for all models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lowmem.convert.math.gptq import Quantized
from lowmem.convert.math.grid import storable
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from lowmem.models.architecture import LayerSpec
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import LayerCall, replaced_forwards

RATE = 2e-3
"""Of Adam's first step, falling to 0 in a straight line."""
LOUDER = 2.0**16
"""What the loss is multiplied by, so that float16's gradients are not lost; Adam does not see it."""
SMALLEST_SLOPE = 1e-12
"""Adam's eps. One scale of millions has little to do with the loss, and is to move all the same."""
CHECKS = 4
"""Chunks of rows on which the layer is measured before and after: what does not help is not kept."""


@dataclass(frozen=True)
class Tuned:
    """What came of it. error_before, error_after: of the layer's output, as a share of its energy.

    scales: float16 [groups, out] of each linear; others: biases and norms by their name in the layer, in the
    dtype they are stored in. Both are empty where nothing helped.
    """

    scales: Mapping[str, torch.Tensor]
    others: Mapping[str, torch.Tensor]
    error_before: float
    error_after: float


class _Product(torch.autograd.Function):
    """x @ (z * scale), z the integers: the gradient of the scales without one of every weight in float32."""

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
    """W^T [in, out] of integers z int8 [in, out] and scales [groups, out]."""
    groups, out = scale.shape
    return (z.view(groups, -1, out) * scale[:, None].to(dtype)).view(z.shape)


@dataclass
class _Linear:
    """A quantized linear while it is tuned. z: its integers less their zero-points [in, out], int8 where they
    fit; scale: float32 [groups, out]; change: what it moves by, as a share of itself."""

    module: nn.Linear
    z: torch.Tensor
    scale: torch.Tensor
    change: nn.Parameter

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
    """A bias or a norm's weights: what it was, and a change in units of what it works on."""

    before: torch.Tensor
    unit: float
    change: nn.Parameter

    def value(self) -> torch.Tensor:
        return self.before + self.unit * self.change


def tune_layer(
    layer: nn.Module,
    spec: LayerSpec,
    call: LayerCall,
    states: HiddenStates,
    wanted: HiddenStates,
    quantized: dict[str, Quantized],
    output_sizes: Mapping[str, float],
    *,
    steps: int,
    rows: int,
    device: torch.device,
    stored_dtype: Callable[[str], torch.dtype],
) -> Tuned:
    """Tune `layer`, whose linears were quantized to `quantized`; the layer itself is left as it was.

    states: what enters the layer; wanted: what should come out, both [rows, row_length, hidden]. quantized is
    emptied: its integers take another form. output_sizes: root mean square of what each linear puts out.
    steps: of Adam, each over so many `rows`. stored_dtype: of a bias or norm by its name in the layer; it is
    rounded to that in the end.
    """
    linears = {
        linear.name: _Linear.of(_linear(layer, linear.name), quantized.pop(linear.name), device)
        for linear in spec.linears
    }
    others = dict(_others(layer, linears, output_sizes))
    starts = list(range(0, states.shape[0], rows))
    checks = starts[:: max(1, len(starts) // CHECKS)][:CHECKS]

    def loss_of(start: int, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        inputs = states.read(start, start + rows).to(device)
        target = wanted.read(start, start + rows).to(device, torch.float32)
        as_run = {name: value.to(states.dtype) for name, value in values.items()}
        output = call.output(lambda *a, **k: functional_call(layer, as_run, a, k), inputs).float()
        return (output - target).square().mean() / target.square().mean().clamp_min(1e-30)

    def checked(values: Mapping[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return sum(float(loss_of(start, values)) for start in checks) / len(checks)

    with replaced_forwards((linear.module, linear.forward) for linear in linears.values()):
        before = checked({name: other.before for name, other in others.items()})
        _adam(linears, others, loss_of, starts, steps)
        scales = {name: linear.stored() for name, linear in linears.items()}
        rounded = {name: other.value().detach().to(stored_dtype(name)) for name, other in others.items()}
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
    """A chunk of rows a step, all of them before one comes again; the rate falls to 0."""
    changes = [linear.change for linear in linears.values()] + [other.change for other in others.values()]
    optimizer = torch.optim.Adam(changes, lr=RATE, eps=SMALLEST_SLOPE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(0)  # a resumed job gives the same bytes
    order: list[int] = []
    with torch.enable_grad():
        for _ in range(steps):
            order = order or torch.randperm(len(starts), generator=generator).tolist()
            optimizer.zero_grad()
            loss = loss_of(starts[order.pop()], {name: other.value() for name, other in others.items()})
            (LOUDER * loss).backward()
            optimizer.step()
            schedule.step()


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _others(
    layer: nn.Module, linears: Mapping[str, _Linear], output_sizes: Mapping[str, float]
) -> Iterator[tuple[str, _Other]]:
    """Every floating parameter of the layer but the linears' weights, by name."""
    for name, parameter in layer.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        if (owner_name in linears and leaf == "weight") or not parameter.is_floating_point():
            continue
        owner = layer.get_submodule(owner_name)
        if owner_name in linears:
            size = output_sizes[owner_name]
        else:
            # A norm puts out what is about as large as its weights, so its bias is measured by them too.
            beside = getattr(owner, "weight", None)
            size = float((parameter if beside is None else beside).detach().float().square().mean().sqrt())
        before = parameter.detach().float()
        yield name, _Other(before, size if size > 0 else 1.0, nn.Parameter(torch.zeros_like(before)))
