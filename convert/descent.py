"""A second look at every integer: coordinate descent on the error that GPTQ leaves.

GPTQ takes the columns once, and a column is rounded before those after it are. Here each column is rounded
once more, now that all others are known: with E = W - Q and P = H E, column j does best at

    q_j + P_j / H_jj

rounded to its grid. After the columns of a group its scale is refitted by least squares to the integers.
Neither step can raise tr(E^T H E). The order and the steps are those of cyclic coordinate descent on a
lattice; QuantEase (Behdin et al. 2023, arXiv:2309.01885) does the same from round-to-nearest, without scales.

Everything lies transposed, [in, out], and in the order of the factor, as in gptq.py.
"""

from __future__ import annotations

import torch

from convert.grid import quantize_to, storable
from convert.hessian import Factor

COLUMN_BLOCK = 128
WIDEST_REFIT = 512
"""Columns of the widest group whose scale is refitted: a wider one does not stand in one column block."""


def descend(
    error: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group_of: torch.Tensor,
    factor: Factor,
    maxq: int,
) -> torch.Tensor:
    """One pass over all columns; `error` = W - Q, `codes`, `scales` are changed in place.

    error: [in, out]; codes: uint8 [in, out]; scales, zeros: [groups, out]; group_of: int64 [groups], the row
    of scales of each run of in/groups columns. Returns what the pass took off tr(E^T H E), H damped: float64,
    one number.
    """
    n = error.shape[0]
    width = n // scales.shape[0]
    refits = width <= WIDEST_REFIT
    step = max(COLUMN_BLOCK, width) if refits else COLUMN_BLOCK
    rows = group_of.tolist()
    gained = torch.zeros((), dtype=torch.float64, device=error.device)
    for start in range(0, n, step):
        end = min(start + step, n)
        corner = factor.hessian_corner(start, end)
        pivots = corner.diagonal().tolist()
        pull = factor.hessian_rows_times(start, end, error)
        moved = torch.zeros_like(pull)
        for j in range(start, end):
            i = j - start
            if i:
                pull[i].addmv_(moved[:i].T, corner[i, :i], alpha=-1)
            scale, zero = scales[rows[j // width]], zeros[rows[j // width]]
            value = codes[j].to(error.dtype).sub_(zero).mul_(scale)
            q = quantize_to(torch.add(value, pull[i], alpha=1 / pivots[i]), scale, zero, maxq)
            codes[j] = q.to(torch.uint8)
            torch.sub(q.sub_(zero).mul_(scale), value, out=moved[i])
        # One column that moves by m takes m (2 P - H_jj m) off the error.
        gained += moved.mul(2 * pull - corner.diagonal()[:, None] * moved).sum(dtype=torch.float64)
        pull -= corner.triu() @ moved  # each row knows the moves before its own; now all of them
        error[start:end] -= moved
        for first in range(start, end, width) if refits else ():
            group = rows[first // width]
            inside = slice(first - start, first - start + width)
            integers = codes[first : first + width].to(error.dtype).sub_(zeros[group])
            change, gain = _refit(integers, pull[inside], corner[inside, inside], scales[group])
            gained += gain
            error[first : first + width] -= change
            pull -= corner[:, inside] @ change
    return gained


def _refit(
    integers: torch.Tensor, pull: torch.Tensor, corner: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move `scale` [out] in place to where it leaves the least error: the change of the values [width, out],
    and what that takes off the error.

    A scale that changes by d takes 2 d (z . P) - d^2 (z . H z) off the error, z its integers.
    """
    slope = (integers * pull).sum(0)
    curve = (integers * (corner @ integers)).sum(0)
    fitted = storable(torch.where(curve > 0, scale + slope / curve, scale), scale.dtype)
    step = fitted - scale
    gain = step * (2 * slope - step * curve)
    step = torch.where(gain > 0, step, torch.zeros_like(step))
    scale += step
    return integers.mul_(step), gain.clamp_min_(0).sum(dtype=torch.float64)
