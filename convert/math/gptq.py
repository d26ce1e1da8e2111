"""GPTQ of one linear: round column by column, and let the columns to come make up for each error.

With H = R R^T, R upper triangular, column j is rounded from

    w_j + ((W - Q)[:, :j] @ R[:j, j]) / R[j, j]

which is Babai's nearest-plane algorithm, and gives the integers of the published column loop
(Frantar et al. 2022) to the last bit. It looks to the left only: what all earlier columns ask of a block is
one matrix product. Inside a block see rounding.py.

Where a linear is to put out W x + d instead of W x, the best real weight would be W + E[d x^T] H^-1, and the
error of an integer one is |(W - Q) R + Y|^2 with Y = E[d x^T] R^-T, but for a constant. So what is lacking
takes one triangular solve and is added to what earlier columns ask for. GPTAQ (Li et al. 2025,
arXiv:2504.02692) puts the same into the column loop.

Everything here lies transposed, [in, out], as the packed format does: one column of W is one
contiguous row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lowmem.convert.math.grid import find_grid
from lowmem.convert.math.hessian import Factor, factor_in_place
from lowmem.convert.math.products import add_product, permute
from lowmem.convert.math.rounding import WIDEST, Block, Rule, round_block

from lowmem.config import QuantConfig

COLUMN_BLOCK = 128
"""Columns that are rounded before they are multiplied with those to come."""
FAR_BLOCK = 1024
"""Columns that are corrected at once by all before them: the errors are packed once for so many."""


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
    or against what `quantize` was asked to come close to instead, as far as an unrounded weight could."""
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

    def whiten_in_place(self, lacking: torch.Tensor) -> torch.Tensor:
        """R^-1 E[x d^T], written over E[x d^T] [in, out]: Y^T, in the factor's order of columns."""
        if self.order is not None:
            _permute_rows_in_place(lacking, self.order)
        self.factor.solve_in_place(lacking)
        return lacking

    def ordered(self, weight_t: torch.Tensor) -> torch.Tensor:
        """W^T [in, out], its rows put into the factor's order in place."""
        if self.order is not None:
            _permute_rows_in_place(weight_t, self.order)
        return weight_t


def prepare(hessian: torch.Tensor, config: QuantConfig) -> Prepared:
    """Order and factor the symmetric H [in, in], which is used up: a second copy would not fit."""
    order = column_order(hessian.diagonal(), config)
    if order is not None:
        permute(hessian, order)
    return Prepared(factor_in_place(hessian, config.damp_percent), order)


def quantize(
    weight_t: torch.Tensor,
    prepared: Prepared,
    config: QuantConfig,
    column_block: int = COLUMN_BLOCK,
    wanted: torch.Tensor | None = None,
) -> Quantized:
    """Quantize W^T, weight_t [in, out] in float32 or float64, as the factor is, or in bfloat16.

    `weight_t` is used up: it becomes the error W - Q, in its own dtype (columns far apart are multiplied in
    bfloat16 anyway). wanted: Y^T [in, out] in the factor's dtype, what the linear should put out beside W x
    (see `Prepared.whiten_in_place`); used up too. The result does not depend on `column_block`, except for
    rounding.
    """
    result = _round_columns(prepared.ordered(weight_t), prepared, config, column_block, wanted)
    if prepared.order is not None:
        _permute_rows_in_place(result.codes, torch.argsort(prepared.order))
    return result


def _permute_rows_in_place(matrix: torch.Tensor, order: torch.Tensor, chunk: int = 512) -> None:
    for start in range(0, matrix.shape[1], chunk):
        matrix[:, start : start + chunk] = matrix[:, start : start + chunk][order]


def _round_columns(
    error: torch.Tensor,
    prepared: Prepared,
    config: QuantConfig,
    column_block: int,
    wanted: torch.Tensor | None,
) -> Quantized:
    """Nothing in these loops asks the device for a value."""
    factor, order = prepared.factor, prepared.order
    n, out = error.shape
    r, width, device = factor.matrix, group_width(config, n), error.device
    codes = torch.empty(n, out, dtype=torch.uint8, device=device)
    # In the factor's order of groups; error: rows before the block hold W - Q, the others still W.
    scales = torch.empty(n // width, out, dtype=r.dtype, device=device)
    zeros = torch.empty_like(scales)
    squared_error = torch.zeros((), dtype=torch.float64, device=device)
    wide = width > WIDEST
    block = column_block if wide else width * max(1, column_block // width)
    far = width if wide else block * max(1, FAR_BLOCK // block)
    rule = Rule(config.bits, config.sym, width, config.passes, search=not wide)
    for outer in range(0, n, far):
        outer_end = min(outer + far, n)
        if wanted is None:
            residual = torch.zeros(outer_end - outer, out, dtype=r.dtype, device=device)
        else:
            residual = wanted[outer:outer_end]
        add_product(residual, r[:outer, outer:outer_end].T, error[:outer], rounded=True)
        near = error[outer:outer_end].to(r.dtype)  # itself, or a copy of more bits
        if wide:
            group = outer // width
            corner = r[outer:outer_end, outer:outer_end]
            grid = find_grid(
                _compensated(near, corner, residual) if outer else near,
                corner.diagonal().square(),
                config.bits,
                config.sym,
            )
            scales[group], zeros[group] = grid.scale, grid.zero
        for start in range(0, outer_end - outer, block):
            end = min(start + block, outer_end - outer)
            inside, columns = slice(start, end), slice(outer + start, outer + end)
            add_product(residual[inside], r[outer : outer + start, columns].T, near[:start], rounded=True)
            groups = slice(
                columns.start // width, columns.start // width + 1 if wide else columns.stop // width
            )
            corner, part = r[columns, columns], residual[inside]
            round_block(
                rule, Block(corner, near[inside], part, codes[columns], scales[groups], zeros[groups])
            )
            squared_error += torch.linalg.vector_norm(residual[inside]).double().square()
        if near.dtype != error.dtype:
            error[outer:outer_end] = near
    if order is not None:
        back = torch.argsort(order[::width] // width)
        scales, zeros = scales[back], zeros[back]
    return Quantized(
        codes,
        scales.to(torch.float16),
        zeros.to(torch.uint8),
        float(squared_error),
        factor.damping,
        factor.dead_columns,
    )


def _compensated(weight: torch.Tensor, corner: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """A wide group's weights [group, out] as they should be, given all errors before it and none in it."""
    shift: torch.Tensor = torch.linalg.solve_triangular(corner.T, residual, upper=False)
    return weight + shift
