"""GPTQ of one linear: round column by column, and let the columns to come make up for each error.

With H = R R^T, R upper triangular, column j is rounded from

    w_j + ((W - Q)[:, :j] @ R[:j, j]) / R[j, j]

which is Babai's nearest-plane algorithm, and gives the integers of the published column loop
(Frantar et al. 2022) to the last bit. It looks to the left only: the correction of a whole block of
columns by all the earlier ones is one matrix product.

Everything here lies transposed, [in, out], as the packed format does: one column of W is one
contiguous row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from convert.descent import descend
from convert.grid import Grid, find_grid, quantize_to
from convert.hessian import Factor, factor_in_place, permute_in_place
from lowmem.config import QuantConfig

COLUMN_BLOCK = 128


@dataclass(frozen=True)
class Quantized:
    """The integers of a linear and their grid, in the checkpoint's own column order."""

    codes: torch.Tensor
    """uint8 [in, out]"""
    scales: torch.Tensor
    """float16 [groups, out]"""
    zeros: torch.Tensor
    """uint8 [groups, out]"""
    squared_error: float
    """Mean squared error of the outputs over the calibration tokens, summed over the outputs: against W x,
    or against what `quantize` was asked to come close to instead."""
    damping: float
    dead_columns: int


def group_width(config: QuantConfig, in_features: int) -> int:
    """Columns in a group; -1 means all of them."""
    return in_features if config.group_size == -1 else config.group_size


def column_order(diagonal: torch.Tensor, config: QuantConfig) -> torch.Tensor | None:
    """The order in which columns are rounded, or None for their own.

    Act-order takes the columns with the largest diag H first, while most others can still make up for
    them. Here that order holds inside each group, and among the groups by their largest column: a
    group stays together, so its grid can be found when all errors before it are known, and g_idx stays
    column // group_size.
    """
    if not config.desc_act:
        return None
    n = diagonal.shape[0]
    width = group_width(config, n)
    grouped = diagonal.view(n // width, width)
    inside = torch.argsort(grouped, dim=1, descending=True, stable=True)
    groups = torch.argsort(grouped.amax(1), descending=True, stable=True)
    first = torch.arange(0, n, width, device=diagonal.device)
    return (inside + first[:, None])[groups].reshape(-1)


@dataclass(frozen=True)
class Prepared:
    """The factor of a Hessian whose columns stand in `order`: shared by all linears with one input."""

    factor: Factor
    order: torch.Tensor | None

    def regress_in_place(self, lacking: torch.Tensor) -> None:
        """H^-1 E[x d^T], written over E[x d^T] [in, out]: what W^T has to move by for W x to come as close
        to W x + d as it can.

        With d what an input that earlier layers have damaged makes the linear lack, the moved weight is the
        one to round: ||(W + move - Q) x||^2 is the distance of Q x to W x + d, but for a constant. GPTAQ
        (Li et al. 2025, arXiv:2504.02692) puts the same into the column loop.
        """
        if self.order is not None:
            _permute_rows_in_place(lacking, self.order)
        self.factor.solve_in_place(lacking)
        if self.order is not None:
            _permute_rows_in_place(lacking, torch.argsort(self.order))


def prepare(hessian: torch.Tensor, config: QuantConfig) -> Prepared:
    """Order and factor the symmetric H [in, in], which is used up: a second copy would not fit."""
    order = column_order(hessian.diagonal(), config)
    if order is not None:
        permute_in_place(hessian, order)
    return Prepared(factor_in_place(hessian, config.damp_percent), order)


def quantize(
    weight_t: torch.Tensor,
    prepared: Prepared,
    config: QuantConfig,
    column_block: int = COLUMN_BLOCK,
) -> Quantized:
    """Quantize W^T, weight_t [in, out] (float32 or float64, as the factor is).

    `weight_t` is used up: it becomes the error W - Q. The result does not depend on `column_block`,
    except for rounding.
    """
    order = prepared.order
    if order is not None:
        _permute_rows_in_place(weight_t, order)
    result = _round_columns(weight_t, prepared.factor, config, order, column_block)
    if order is not None:
        _permute_rows_in_place(result.codes, torch.argsort(order))
    return result


def _permute_rows_in_place(matrix: torch.Tensor, order: torch.Tensor, chunk: int = 512) -> None:
    for start in range(0, matrix.shape[1], chunk):
        matrix[:, start : start + chunk] = matrix[:, start : start + chunk][order]


def _round_columns(
    weight_t: torch.Tensor,
    factor: Factor,
    config: QuantConfig,
    order: torch.Tensor | None,
    column_block: int,
) -> Quantized:
    n, out = weight_t.shape
    r = factor.matrix
    width = group_width(config, n)
    groups = n // width
    codes = torch.empty(n, out, dtype=torch.uint8, device=weight_t.device)
    scales = torch.empty(groups, out, dtype=weight_t.dtype, device=weight_t.device)
    zeros = torch.empty_like(scales)
    diagonal = r.diagonal().clone()
    pivots = diagonal.tolist()
    squared_error = torch.zeros((), dtype=torch.float64, device=weight_t.device)
    error = weight_t  # rows before `start` hold W - Q, the others still W
    grid: Grid | None = None
    for start in range(0, n, column_block):
        end = min(start + column_block, n)
        # [block, out]: what the columns before this block ask of it, before the division by R[j, j]
        pull = r[:start, start:end].T @ error[:start]
        block_r = r[start:end, start:end].T.contiguous()  # row j: R[start:end, j]
        misses = torch.empty_like(pull)
        for j in range(start, end):
            i = j - start
            if j % width == 0:
                group = (j if order is None else int(order[j])) // width
                whole_block = j == start and end - start == width
                compensated = _compensated(error, r, j, j + width, pull if whole_block else None)
                grid = find_grid(compensated, diagonal[j : j + width].square(), config.bits, config.sym)
                scales[group] = grid.scale
                zeros[group] = grid.zero
            assert grid is not None
            if i:
                pull[i].addmv_(error[start:j].T, block_r[i, :i])
            target = torch.add(error[j], pull[i], alpha=1 / pivots[j])
            q = quantize_to(target, grid.scale, grid.zero, config.maxq)
            codes[j] = q.to(torch.uint8)
            value = q.sub_(grid.zero).mul_(grid.scale)
            torch.sub(target, value, out=misses[i])
            error[j].sub_(value)
        # sum_j R[j,j]^2 (target - value)^2 = ||(W - Q) R||^2, the error that H measures
        squared_error += misses.square().sum(1).mul(diagonal[start:end].square()).sum().double()
    first = torch.arange(0, n, width, device=weight_t.device)
    group_of = (first if order is None else order[first]) // width
    for _ in range(config.passes):
        squared_error -= descend(error, codes, scales, zeros, group_of, factor, config.maxq)
    return Quantized(
        codes,
        scales.to(torch.float16),
        zeros.to(torch.uint8),
        float(squared_error),
        factor.damping,
        factor.dead_columns,
    )


def _compensated(
    error: torch.Tensor, r: torch.Tensor, start: int, end: int, pull: torch.Tensor | None
) -> torch.Tensor:
    """The group's weights [group, out] as they should be, given all errors before it and none in it."""
    if start == 0:
        return error[:end]
    if pull is None:
        pull = r[:start, start:end].T @ error[:start]
    shift: torch.Tensor = torch.linalg.solve_triangular(r[start:end, start:end].T, pull, upper=False)
    return error[start:end] + shift
