"""How much the model's KL divergence rises with the rounding errors of one decoder layer's weights.

Let g_t be the gradient of the log-probability of sampled next tokens with respect to a linear's output at
token t of a row, and x_t its input. For a small change D of the weight, the KL divergence of the model's
predictions rises by 1/2 E[(sum_t g_t^T D x_t)^2] a row: the expectation is the Fisher information of the
weight, and the sum over a row's tokens keeps what errors of several tokens add to or take from each other,
as they do in keys and values.

GPTQ's errors are D = V R^-1 with H = R R^T and independent entries v_oj in proportion to r_jj: with
x^ = diag(r) R^-1 x, the rise is 1/2 sum_oj e_oj^2 E[(sum_t g_to x^_tj)^2] for rounding errors e_oj. The
second factor is the `importance` of a weight; rounding_error.py gives e. Only blocks on H's diagonal are
used, and a sample of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from lowmem.convert.allocation.rounding_error import rounding_error
from lowmem.convert.math.hessian import factor_in_place
from torch import nn
from torch.utils.hooks import RemovableHandle

from lowmem.checkpoint.formats import LinearFormat
from lowmem.models.architecture import LayerSpec, LinearSpec

HESSIAN_BLOCK = 1024
"""Inputs whose correlations count."""
DAMP_PERCENT = 0.01
"""Of the Hessian's mean diagonal, as the converter's default."""
OUTPUTS = 256
"""Outputs of a linear that are sampled."""


@dataclass
class Recorder:
    """Records the inputs of a layer's linears, and the gradients at their outputs, while rows run through it.

    Both are kept in bfloat16 on the CPU: [tokens, in] for each group, [tokens, out] for each linear.
    """

    layer: nn.Module
    spec: LayerSpec
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """By the first linear of a group, one tensor a row."""
    gradients: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """By linear, one tensor a row."""

    def __enter__(self) -> Recorder:
        self._handles: list[RemovableHandle] = []
        for group in self.spec.groups:
            for linear in group:
                keep = self.inputs.setdefault(linear.name, []) if linear is group[0] else None
                module = self.layer.get_submodule(linear.name)
                self._handles.append(module.register_forward_hook(self._hook(linear.name, keep)))
        return self

    def _hook(self, name: str, keep: list[torch.Tensor] | None) -> Callable[..., None]:
        gradients = self.gradients.setdefault(name, [])

        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if keep is not None:
                keep.append(_kept(args[0]))
            output.register_hook(lambda gradient: gradients.append(_kept(gradient)))

        return hook

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _kept(values: torch.Tensor) -> torch.Tensor:
    return values.detach().reshape(-1, values.shape[-1]).to("cpu", torch.bfloat16)


def rises(
    recorded: Recorder, options: Sequence[LinearFormat], generator: torch.Generator
) -> dict[str, list[float]]:
    """The rise of the KL divergence in nats a token, by linear and option.

    The recorded rows are consumed. A linear whose inputs an option's group size does not divide has
    infinity there.
    """
    found: dict[str, list[float]] = {}
    for group in recorded.spec.groups:
        rows = recorded.inputs.pop(group[0].name)
        whitened = _whitened(rows)
        for linear in group:
            gradients = recorded.gradients.pop(linear.name)
            weight = recorded.layer.get_parameter(f"{linear.name}.weight").detach()
            found[linear.name] = _of_linear(linear, weight, whitened, gradients, options, generator)
    return found


def _of_linear(
    linear: LinearSpec,
    weight: torch.Tensor,
    whitened: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    options: Sequence[LinearFormat],
    generator: torch.Generator,
) -> list[float]:
    sample, share = _sampled(weight, gradients, generator)
    importance = torch.zeros(len(sample), linear.in_features)
    tokens = 0
    for x, gradient in zip(whitened, gradients, strict=True):
        importance += (gradient[:, sample].float().T @ x.float()).square_()
        tokens += len(x)
    importance /= 2 * tokens
    picked = weight[sample.to(weight.device)].float().cpu()
    result = []
    for option in options:
        if option.group_size != -1 and linear.in_features % option.group_size:
            result.append(float("inf"))
            continue
        result.append(float((rounding_error(picked, importance, option) / share).sum()))
    return result


def _sampled(
    weight: torch.Tensor, gradients: Sequence[torch.Tensor], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, how often each is expected among them): drawn in proportion to what they seem to matter."""
    out = weight.shape[0]
    if out <= OUTPUTS:
        return torch.arange(out), torch.ones(out, dtype=torch.float64)
    energy = torch.stack([part.double().square().sum(0) for part in gradients]).sum(0)
    size = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).double().square().cpu()
    matter = energy * size
    # A tenth of the draws are uniform, so that no output's share is tiny.
    chance = 0.9 * matter / matter.sum().clamp_min(1e-300) + 0.1 / out
    sample = torch.multinomial(chance, OUTPUTS, replacement=True, generator=generator)
    return sample, chance[sample] * OUTPUTS


def _whitened(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """x^ = diag(r) R^-1 x of every token [tokens, in], in blocks of inputs; float32 becomes bfloat16."""
    columns, tokens = rows[0].shape[1], sum(len(row) for row in rows)
    result = [torch.empty_like(row) for row in rows]
    for start in range(0, columns, HESSIAN_BLOCK):
        block = slice(start, start + HESSIAN_BLOCK)
        parts = [row[:, block].float() for row in rows]
        hessian = torch.zeros(parts[0].shape[1], parts[0].shape[1])
        for part in parts:
            hessian.addmm_(part.T, part, alpha=1 / tokens)
        r = factor_in_place(hessian, DAMP_PERCENT).matrix.triu()
        for part, into in zip(parts, result, strict=True):
            white = torch.linalg.solve_triangular(r, part.T, upper=True).T
            into[:, block] = white * r.diagonal()
    return result
