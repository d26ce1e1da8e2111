"""The grid of a group: the scale and zero-point to which its weights are rounded.

A weight w is stored as q = clamp(round(w / scale) + zero, 0, 2^bits - 1) and read as (q - zero) * scale.
Min-max grids spend levels on the outermost weight. Here several ranges are tried, each is refitted by least
squares to the integers that it gives, and the one with the smallest squared error is chosen. The error is
weighted by the Hessian, so important columns count more.

A symmetric grid has one more level on its negative side (-8..7). The sign of the scale decides which side of
the weights gets it: the format allows negative scales, and at 3 bits one level matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALE_DTYPE = torch.float16
"""The dtype of scales in GPTQ files. Grids are rounded to it before any weight is rounded to them."""

CANDIDATES = 10
SHRINK_TO = {8: 0.96, 7: 0.93, 6: 0.88, 5: 0.78, 4: 0.62, 3: 0.5, 2: 0.35}
"""The narrowest range tried, by bits, as a fraction of the range that covers all weights."""
WIDEN_TO = {8: 1.01, 7: 1.01, 6: 1.02, 5: 1.03, 4: 1.06, 3: 1.12, 2: 1.3}
"""The widest range tried; above 1, since a coarser step may round better."""
ROW_CHUNK_ELEMENTS = 1 << 17
"""Elements of a group that are searched together, so that temporaries stay in the CPU's cache."""


@dataclass(frozen=True)
class Grid:
    """The grid of one group for every output."""

    scale: torch.Tensor
    """Float [out], exact in float16."""
    zero: torch.Tensor
    """Float [out], integer values."""


def quantize_to(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, maxq: int) -> torch.Tensor:
    """Compute the integers, as floats, of `weight` [..., out] on a grid [out]."""
    return torch.addcdiv(zero, weight, scale).round_().clamp_(0, maxq)


def ranges(bits: int) -> list[float]:
    """Return the ranges to try, as fractions of the range that covers all weights."""
    step = (SHRINK_TO[bits] - WIDEN_TO[bits]) / (CANDIDATES - 1)
    return [WIDEN_TO[bits] + step * i for i in range(CANDIDATES)]


def grid_of_range(low: torch.Tensor, high: torch.Tensor, share: float, bits: int, sym: bool) -> Grid:
    """Compute the grid of a fraction `share` of the range from low to high [out], which includes 0."""
    maxq, half = (1 << bits) - 1, 1 << (bits - 1)
    if sym:
        # The longer side becomes the grid's negative side, which has one more level.
        scale = storable(torch.where(-low >= high, -low, -high) / half * share, low.dtype)
        return Grid(scale, torch.full_like(low, half))
    scale = storable((high - low) / maxq * share, low.dtype)
    # Zero-points 1..maxq: the format stores zero - 1, and readers disagree on a stored -1.
    return Grid(scale, (-low * share / scale).round_().clamp_(1, maxq))


def find_grid(weight: torch.Tensor, importance: torch.Tensor, bits: int, sym: bool) -> Grid:
    """Find the grid of one group with the smallest error of single weights, weighted by importance.

    weight: [group, out]. importance: [group], not negative.
    """
    out = weight.shape[1]
    step = max(1, ROW_CHUNK_ELEMENTS // weight.shape[0])
    parts = [
        _search(weight[:, i : i + step].contiguous(), importance, bits, sym) for i in range(0, out, step)
    ]
    return Grid(torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]))


def storable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round `scale` to a normal float16 number; returns it as `dtype`."""
    tiny, huge = torch.finfo(SCALE_DTYPE).smallest_normal, torch.finfo(SCALE_DTYPE).max
    size = scale.abs().clamp(tiny, huge)
    return torch.where(scale < 0, -size, size).to(SCALE_DTYPE).to(dtype)


def range_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the smallest and largest of each output's weights [group, out], extended to include 0."""
    return weight.amin(0).clamp_max_(0), weight.amax(0).clamp_min_(0)


def _search(weight: torch.Tensor, importance: torch.Tensor, bits: int, sym: bool) -> Grid:
    """Try ranges, and fit a scale to the integers z of each.

    With a = sum(h w z) and b = sum(h z^2) the best scale is a / b, and its error is sum(h w^2) - a^2 / b,
    which takes no further pass over the weights.
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
