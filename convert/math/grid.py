"""The grid of a group: the scale and the zero-point that its weights are rounded to.

A weight w is stored as q = clamp(round(w / scale) + zero, 0, 2^bits - 1) and read as (q - zero) * scale.
Plain min-max spends levels on the outermost weight. Here several ranges are tried, each is refitted by
least squares to the integers that it gives, and what leaves the least weighted squared error stays. The
weights of that error come from the Hessian, so a column that matters counts for more.

A symmetric grid has one level more on its negative side (-8..7). The scale's sign says which side of
the weights gets it: the format allows a negative scale, and at 3 bits the extra level is worth much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALE_DTYPE = torch.float16
"""What GPTQ files store; the grid is rounded to it before any weight is, so nothing shifts later."""

CANDIDATES = 10
SHRINK_TO = {8: 0.96, 4: 0.62, 3: 0.5, 2: 0.35}
"""The narrowest range tried, as a fraction of the one that leaves no weight out, by bits."""
WIDEN_TO = {8: 1.01, 4: 1.06, 3: 1.12, 2: 1.3}
"""The widest one: a little more than all, since rounding may like the coarser step."""
ROW_CHUNK_ELEMENTS = 1 << 17
"""Elements of a group that are searched at a time: their temporaries stay in the cache."""


@dataclass(frozen=True)
class Grid:
    """scale: float [out], exactly representable in float16; zero: float [out], an integer value."""

    scale: torch.Tensor
    zero: torch.Tensor


def quantize_to(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, maxq: int) -> torch.Tensor:
    """The integers, as floats, of `weight` [..., out] on a grid [out]."""
    return torch.addcdiv(zero, weight, scale).round_().clamp_(0, maxq)


def ranges(bits: int) -> list[float]:
    """The ranges that are tried, as fractions of the one that leaves no weight out."""
    step = (SHRINK_TO[bits] - WIDEN_TO[bits]) / (CANDIDATES - 1)
    return [WIDEN_TO[bits] + step * i for i in range(CANDIDATES)]


def grid_of_range(low: torch.Tensor, high: torch.Tensor, share: float, bits: int, sym: bool) -> Grid:
    """The grid of a share of the range from low to high [out], 0 in it."""
    maxq, half = (1 << bits) - 1, 1 << (bits - 1)
    if sym:
        # The side that reaches further is the grid's negative one, which has a level more.
        scale = storable(torch.where(-low >= high, -low, -high) / half * share, low.dtype)
        return Grid(scale, torch.full_like(low, half))
    scale = storable((high - low) / maxq * share, low.dtype)
    # Zero-points 1..maxq: the format stores zero - 1, and readers disagree about a stored -1.
    return Grid(scale, (-low * share / scale).round_().clamp_(1, maxq))


def find_grid(weight: torch.Tensor, importance: torch.Tensor, bits: int, sym: bool) -> Grid:
    """The best grid of one group by each weight's own error. weight: [group, out]; importance: [group], not
    negative."""
    out = weight.shape[1]
    step = max(1, ROW_CHUNK_ELEMENTS // weight.shape[0])
    parts = [
        _search(weight[:, i : i + step].contiguous(), importance, bits, sym) for i in range(0, out, step)
    ]
    return Grid(torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]))


def storable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` as `dtype`, rounded to float16, kept away from 0 and infinity."""
    tiny, huge = torch.finfo(SCALE_DTYPE).smallest_normal, torch.finfo(SCALE_DTYPE).max
    size = scale.abs().clamp(tiny, huge)
    return torch.where(scale < 0, -size, size).to(SCALE_DTYPE).to(dtype)


def range_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest of each output's weights [group, out], and 0 at least."""
    return weight.amin(0).clamp_max_(0), weight.amax(0).clamp_min_(0)


def _search(weight: torch.Tensor, importance: torch.Tensor, bits: int, sym: bool) -> Grid:
    """Try ranges; of the integers z that each gives, take the scale that fits them best.

    With a = sum(h w z) and b = sum(h z^2) that scale is a / b, and the error it leaves is
    sum(h w^2) - a^2 / b: no pass over the weights is needed to know it.
    """
    maxq = (1 << bits) - 1
    low, high = range_of(weight)
    weighted = importance[:, None] * weight
    best_gain = torch.full_like(low, -1)
    best_scale, best_zero = torch.ones_like(low), torch.ones_like(low)
    for share in ranges(bits):
        grid = grid_of_range(low, high, share, bits, sym)
        z = (weight * grid.scale.reciprocal()).round_()
        z = torch.minimum(torch.maximum(z, -grid.zero), maxq - grid.zero)
        a = (weighted * z).sum(0)
        b = importance @ z.square_()
        gain = torch.where(b > 0, a.square() / b, 0.0)
        fitted = storable(torch.where(b > 0, a / b, grid.scale), weight.dtype)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, fitted, best_scale)
        best_zero = torch.where(better, grid.zero, best_zero)
    return Grid(best_scale, best_zero)
