"""Rounding one column block: the grids of its groups, GPTQ inside it, and refinement passes.

With H = R R^T and E = W - Q the error that H measures is |R^T E|^2. A group adds |V|^2 to it, where

    V = T - s R^T z,    T = R^T W + the corrections for the errors of earlier columns,

R is the group's own corner, z its integers minus the zero-point, and s the scale. Later groups correct any
errors before them, so what they add cannot be predicted. Grid and integers of a group therefore minimize V:

- GPTQ rounds the whole group with every range that `grid` tries, and the best range is chosen;
- its scale is fitted to its integers (s = T . R^T z / |R^T z|^2), and the group is rounded with it again;
- in each pass every integer is rounded again, given all others of the group: coordinate descent in the metric
  R R^T, as QuantEase (Behdin et al. 2023, arXiv:2309.01885) does over all columns. The scale is refitted.

With `passes` 0 the grid is the best for the group's compensated weights one by one (`find_grid`), and the
integers are GPTQ's.

On a CPU our own C library does this (csrc/gemm), for 64 outputs at a time in the core's cache. The torch code
here does the same on GPUs and in float64, without waiting for the device.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from lowmem.convert.math import products
from lowmem.convert.math.grid import Grid, find_grid, grid_of_range, quantize_to, range_of, ranges, storable

from lowmem.kernels.native import header
from lowmem.kernels.native import library as native

WIDEST = header.ROUND_MOST
"""Columns of the widest group whose ranges are compared after GPTQ."""


@dataclass(frozen=True)
class Rule:
    """How a group's grid and integers are chosen."""

    bits: int
    sym: bool
    width: int
    """Columns in a group."""
    passes: int
    """Refinement passes."""
    search: bool = True
    """False if the grids are given."""

    @property
    def maxq(self) -> int:
        """The largest stored integer."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Block:
    """The tensors of one column block, which `round_block` reads and writes."""

    r: torch.Tensor
    """[block, block], R on and above its diagonal, anything below."""
    error: torch.Tensor
    """[block, out], W; becomes W - Q."""
    residual: torch.Tensor
    """[block, out], the correction for the errors of earlier columns; becomes V."""
    codes: torch.Tensor
    """uint8 [block, out], written."""
    scales: torch.Tensor
    """[groups of the block, out], written; read where rule.search is False (then one row serves the block,
    which may be a part of a group)."""
    zeros: torch.Tensor
    """As `scales`."""


def round_block(rule: Rule, block: Block) -> None:
    """Round the columns of one block."""
    r, error, residual = block.r, block.error, block.residual
    codes, scales, zeros = block.codes, block.scales, block.zeros
    floats = (r, error, residual, scales, zeros)
    if products.ours(*floats) and codes.is_contiguous() and {t.dtype for t in floats} == {torch.float32}:
        _round_natively(rule, block)
        return
    corner = r.triu()
    width = rule.width if rule.search else r.shape[0]
    for number, begin in enumerate(range(0, r.shape[0], width)):
        end = begin + width
        inside = slice(begin, end)
        own = corner[inside, inside]
        target = torch.addmm(residual[inside], corner[:end, inside].T, error[:end])
        if not rule.search:
            grid = Grid(scales[number], zeros[number])
            z = _gptq(own, target, grid, rule.maxq)
        elif rule.passes == 0:
            compensated = torch.linalg.solve_triangular(own.T, target, upper=False)
            grid = find_grid(compensated, own.diagonal().square(), rule.bits, rule.sym)
            z = _gptq(own, target, grid, rule.maxq)
        else:
            grid, z = _search(own, target, rule)
        scales[number], zeros[number] = grid.scale, grid.zero
        codes[inside] = (z + grid.zero).to(torch.uint8)
        error[inside] -= z * grid.scale
        residual[inside] = target - (own.T @ z) * grid.scale


def _gptq(own: torch.Tensor, target: torch.Tensor, grid: Grid, maxq: int) -> torch.Tensor:
    """GPTQ's integers minus the zero-point, [group, out]: each column corrects the errors before it."""
    z = torch.empty_like(target)
    for j in range(own.shape[0]):
        left = target[j] - (own[:j, j] @ z[:j]) * grid.scale if j else target[j]
        z[j] = quantize_to(left / own[j, j], grid.scale, grid.zero, maxq) - grid.zero
    return z


def _loss(own: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """|V|^2 for each output."""
    return (target - (own.T @ z) * scale).square_().sum(0)


def _fitted(own: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The best storable scale for these integers."""
    reached = own.T @ z
    curve = reached.square().sum(0)
    best = (reached * target).sum(0) / torch.where(curve > 0, curve, torch.ones_like(curve))
    return storable(torch.where(curve > 0, best, scale), scale.dtype)


def _search(own: torch.Tensor, target: torch.Tensor, rule: Rule) -> tuple[Grid, torch.Tensor]:
    """The best grid found, and its integers minus the zero-point."""
    low, high = range_of(torch.linalg.solve_triangular(own.T, target, upper=False))
    tried = [grid_of_range(low, high, share, rule.bits, rule.sym) for share in ranges(rule.bits)]
    best, best_z = tried[0], _gptq(own, target, tried[0], rule.maxq)
    best_loss = _loss(own, target, best.scale, best_z)

    def take(grid: Grid, z: torch.Tensor) -> None:
        nonlocal best, best_z, best_loss
        loss = _loss(own, target, grid.scale, z)
        better = loss < best_loss
        best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
        best_z, best_loss = torch.where(better, z, best_z), torch.where(better, loss, best_loss)

    for grid in tried[1:]:
        take(grid, _gptq(own, target, grid, rule.maxq))
    refitted = Grid(_fitted(own, target, best.scale, best_z), best.zero)
    take(refitted, _gptq(own, target, refitted, rule.maxq))
    take(Grid(_fitted(own, target, best.scale, best_z), best.zero), best_z)
    for _ in range(rule.passes):
        z = _descend(own, target, best, best_z, rule.maxq)
        take(best, z)
        take(Grid(_fitted(own, target, best.scale, best_z), best.zero), best_z)
    return best, best_z


def _descend(own: torch.Tensor, target: torch.Tensor, grid: Grid, z: torch.Tensor, maxq: int) -> torch.Tensor:
    """Move each integer in turn to its best value, given the others."""
    metric = own @ own.T
    pull = own @ (target - (own.T @ z) * grid.scale)
    moved, z = torch.zeros_like(z), z.clone()
    for j in range(own.shape[0]):
        left = pull[j] - metric[j, :j] @ moved[:j] if j else pull[j]
        wanted = z[j] * grid.scale + left / metric[j, j]
        new = quantize_to(wanted, grid.scale, grid.zero, maxq) - grid.zero
        moved[j] = (new - z[j]) * grid.scale
        z[j] = new
    return z


def _round_natively(rule: Rule, block: Block) -> None:
    r, error, residual = block.r, block.error, block.residual
    codes, scales, zeros = block.codes, block.scales, block.zeros
    columns, out = error.shape
    if not 0 < columns <= WIDEST or any(t.shape != (columns, out) for t in (residual, codes)):
        raise ValueError(f"unsupported column block {list(error.shape)}")
    width = rule.width if rule.search else columns
    if columns % width or scales.shape != (columns // width, out) or scales.stride() != zeros.stride():
        raise ValueError(f"grids {list(scales.shape)} do not fit groups of {width} columns")
    if any(t.stride(1) != 1 for t in (r, error, residual, scales)) or r.shape != (columns, columns):
        raise ValueError("rows must be contiguous, and r square")
    search = 0 if not rule.search else 2 if rule.passes else 1
    tried = ranges(rule.bits)
    arguments = header.LmRound(
        columns, width, out, error.data_ptr(), residual.data_ptr(), r.data_ptr(), codes.data_ptr(),
        scales.data_ptr(), zeros.data_ptr(), error.stride(0), residual.stride(0), r.stride(0),
        codes.stride(0), scales.stride(0), (ctypes.c_float * header.RANGES_MOST)(*tried), len(tried),
        rule.maxq, rule.sym, search, rule.passes,
    )  # fmt: skip
    with native.running() as library:
        space = native.workspace(library.lm_round_workspace())
        library.lm_round_run(ctypes.addressof(arguments), space)
