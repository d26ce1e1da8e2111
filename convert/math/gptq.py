"""GPTQ of one linear: round column by column, and correct each error in the columns that follow.

With H = R R^T, R upper triangular, column j is rounded from

    w_j + ((W - Q)[:, :j] @ R[:j, j]) / R[j, j]

which is Babai's nearest-plane algorithm, and gives exactly the integers of the published column loop
(Frantar et al. 2022). It looks to the left only, so the corrections of a block for all earlier columns are
one matrix product. rounding.py rounds the columns inside a block.

If a linear should output W x + d instead of W x, the best real weight is W + E[d x^T] H^-1, and the error of
integers is |(W - Q) R + Y|^2, up to a constant, with Y = E[d x^T] R^-T. So d takes one triangular solve, and
Y is added to the corrections for earlier columns. GPTAQ (Li et al. 2025, arXiv:2504.02692) does the same in
the column loop.

All matrices are transposed, [in, out], like the packed format: a column of W is a contiguous row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lowmem.convert.math.grid import find_grid
from lowmem.convert.math.hessian import Factor, factor_in_place
from lowmem.convert.math.products import add_product, permute
from lowmem.convert.math.rounding import WIDEST, Block, Rule, round_block

from lowmem.config import QuantConfig

COLUMN_BLOCK = 128
"""Columns that are rounded before one product corrects those that follow in the far block."""
FAR_BLOCK = 1024
"""Columns that one product corrects for all columns before them; it packs their errors once."""


@dataclass(frozen=True)
class Quantized:
    """The integers of a linear and their grid, in the checkpoint's column order."""

    codes: torch.Tensor
    """uint8 [in, out]"""
    scales: torch.Tensor
    """float16 [groups, out]"""
    zeros: torch.Tensor
    """uint8 [groups, out]"""
    squared_error: float
    """Squared error of the output vector, averaged over the calibration tokens. The reference is W x or, with
    `wanted`, the output of the best unrounded weight."""
    damping: float
    """See `Factor`."""
    dead_columns: int
    """See `Factor`."""


def group_width(config: QuantConfig, in_features: int) -> int:
    """Return the number of columns in a group; a group size of -1 means all columns."""
    return in_features if config.group_size == -1 else config.group_size


def nested(widths: Iterable[int]) -> bool:
    """Whether each larger group of columns consists of whole smaller ones, for groups of these widths."""
    order = sorted(widths)
    return all(larger % smaller == 0 for smaller, larger in itertools.pairwise(order))


def column_order(diagonal: torch.Tensor, *configs: QuantConfig) -> torch.Tensor | None:
    """Choose the order in which columns are rounded; None for the given order.

    Act-order rounds the columns with the largest diag H first, while most others can still correct their
    errors. Here groups are sorted by their largest column, and columns inside their group. So the grid of a
    group is chosen when all errors before it are known, and g_idx stays column // group_size.

    configs: of the linears that share the input. If their groups have several widths, the smaller groups are
    sorted inside the larger ones, so that the columns of every group of each linear stay together. Raises
    ValueError unless the widths are `nested`.
    """
    if not configs[0].desc_act:
        return None
    n = diagonal.shape[0]
    widths = {group_width(config, n) for config in configs} | {n}
    if not nested(widths):
        raise ValueError(f"groups of {sorted(widths)} columns do not divide each other")
    units = torch.arange(n, device=diagonal.device)[:, None]  # columns that stay together, in their order
    for width in sorted(widths):
        grouped = units.view(n // width, -1, units.shape[1])
        largest = diagonal[grouped].amax(2)
        order = torch.argsort(largest, dim=1, descending=True, stable=True)
        units = grouped.gather(1, order[:, :, None].expand_as(grouped)).view(n // width, width)
    return units.reshape(-1)


@dataclass(frozen=True)
class Prepared:
    """The factor of a Hessian with its columns in `order`; linears that share an input share it."""

    factor: Factor
    order: torch.Tensor | None

    def whiten_in_place(self, lacking: torch.Tensor) -> torch.Tensor:
        """Overwrite E[x d^T] [in, out] with R^-1 E[x d^T] = Y^T, in the factor's column order."""
        if self.order is not None:
            _permute_rows_in_place(lacking, self.order)
        self.factor.solve_in_place(lacking)
        return lacking

    def ordered(self, weight_t: torch.Tensor) -> torch.Tensor:
        """Permute the rows of W^T [in, out] in place to the factor's order."""
        if self.order is not None:
            _permute_rows_in_place(weight_t, self.order)
        return weight_t


def prepare(hessian: torch.Tensor, *configs: QuantConfig) -> Prepared:
    """Order and factor the symmetric H [in, in] in place: a second copy would not fit in memory.

    configs: of the linears that share the input. Column order and damping are those of the first.
    """
    order = column_order(hessian.diagonal(), *configs)
    if order is not None:
        permute(hessian, order)
    return Prepared(factor_in_place(hessian, configs[0].damp_percent), order)


def quantize(
    weight_t: torch.Tensor,
    prepared: Prepared,
    config: QuantConfig,
    column_block: int = COLUMN_BLOCK,
    wanted: torch.Tensor | None = None,
) -> Quantized:
    """Quantize W^T, weight_t [in, out], in the factor's dtype (float32 or float64) or in bfloat16.

    weight_t: is overwritten with the error W - Q in its own dtype (distant columns are multiplied in bfloat16
    anyway). wanted: Y^T [in, out] in the factor's dtype, the change of the output that the linear should make
    beside W x (`Prepared.whiten_in_place`); is overwritten. column_block: changes the result only by
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
    """`quantize` in the factor's column order. No step of the loops waits for the device."""
    factor, order = prepared.factor, prepared.order
    n, out = error.shape
    r, width, device = factor.matrix, group_width(config, n), error.device
    codes = torch.empty(n, out, dtype=torch.uint8, device=device)
    # Groups in the factor's order. error: rows before the block hold W - Q, the others W.
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
        near = error[outer:outer_end].to(r.dtype)  # a view, or a copy with more bits
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
    """A wide group's weights [group, out], corrected for all errors before the group."""
    shift: torch.Tensor = torch.linalg.solve_triangular(corner.T, residual, upper=False)
    return weight + shift
