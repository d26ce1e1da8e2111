"""The error that rounding a weight to a grid leaves, without running GPTQ.

GPTQ's error in one linear is a sum over columns in whitened coordinates (convert/math/gptq.py): with
H = R R^T, column j contributes r_jj^2 times the squared rounding error of one weight. GPTQ moves a weight
before it rounds it, but hardly changes how the weights of a group are spread. So the error of rounding the
original weights to the best of a few grids, each weighted by what its column counts, stands for GPTQ's.
"""

from __future__ import annotations

import torch
from lowmem.convert.math.grid import ranges

from lowmem.checkpoint.formats import LinearFormat

_AT_A_TIME = 1 << 20
"""Weights that are rounded together."""


def rounding_error(weight: torch.Tensor, importance: torch.Tensor, format: LinearFormat) -> torch.Tensor:
    """The weighted squared error of each output's weights, rounded to the best of a few grids.

    weight: [out, in] in float32. importance: [out, in], what a squared error of each weight counts.
    Returns float64 [out].
    """
    out, columns = weight.shape
    width = columns if format.group_size == -1 else format.group_size
    step = max(1, _AT_A_TIME // columns)
    parts = [
        _errors(weight[i : i + step].reshape(-1, width), importance[i : i + step].reshape(-1, width), format)
        for i in range(0, out, step)
    ]
    return torch.cat(parts).view(out, -1).sum(1, dtype=torch.float64)


def _errors(weight: torch.Tensor, importance: torch.Tensor, format: LinearFormat) -> torch.Tensor:
    """The least error of each group [groups, width] over the ranges of the converter's own search.

    With integers z the best scale is a / b, with a = sum(h w z) and b = sum(h z^2), and its error is
    sum(h w^2) - a^2 / b.
    """
    maxq, half = (1 << format.bits) - 1, 1 << (format.bits - 1)
    low = weight.amin(1, keepdim=True).clamp_max_(0)
    high = weight.amax(1, keepdim=True).clamp_min_(0)
    weighted = importance * weight
    best = torch.zeros(len(weight))
    for share in ranges(format.bits):
        if format.sym:
            scale = torch.where(-low >= high, -low, -high) / half * share
            zero = torch.full_like(low, half)
        else:
            scale = (high - low) / maxq * share
            zero = (-low * share / _not_zero(scale)).round_().clamp_(1, maxq)
        z = (weight / _not_zero(scale)).round_()
        z = torch.minimum(torch.maximum(z, -zero), maxq - zero)
        a = (weighted * z).sum(1)
        b = (importance * z.square_()).sum(1)
        best = torch.maximum(best, torch.where(b > 0, a.square() / _not_zero(b), 0.0))
    return ((weighted * weight).sum(1) - best).clamp_min_(0)


def _not_zero(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values == 0, 1.0, values)
