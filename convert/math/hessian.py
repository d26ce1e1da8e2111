"""The Hessian of a linear's output error, and its factor.

For a linear y = W x the squared error of replacing W by Q over the calibration tokens is
tr((W-Q) H (W-Q)^T) with H = X^T X / tokens. GPTQ needs the upper triangular R with H = R R^T; one
factorization gives it (see `factor_in_place`), where the published algorithm takes a Cholesky, an
inverse and a second Cholesky.

H is the largest tensor of a conversion: 2.25 GiB for a linear with 24,576 inputs. So there is one buffer of
its size, which is worked on in place, in column blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lowmem.convert.math.products import add_product, mirror

from lowmem.errors import CalibrationError

COLUMN_BLOCK = 1024
"""Columns of H in one step: enough for full speed, in little temporary memory."""
PANEL = 512
"""Columns that are factored or solved before one matrix product updates all others."""

MAX_DAMPING = 100.0


class Hessian:
    """Accumulates the upper triangle of H = X^T X / tokens [in, in] in float32."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add the inputs of some tokens, x: [tokens, in] in any float dtype.

        Products of two bfloat16 numbers are exact in float32, so bfloat16 inputs are not converted.
        """
        if x.dtype != torch.bfloat16:
            x = x.to(torch.float32)
        add_product(self.sum, x.T, x, rounded=x.dtype == torch.bfloat16, upper=True)
        self.tokens += x.shape[0]

    def finish(self) -> torch.Tensor:
        """Return the symmetric mean [in, in]. It is the accumulator's own buffer; nothing can be added any
        more.

        Raises CalibrationError if an activation was not finite.
        """
        if self.tokens == 0:
            raise CalibrationError("a linear saw no calibration token")
        if not torch.isfinite(self.sum.diagonal()).all():
            raise CalibrationError(
                "the activations of the calibration text are not finite",
                "The source's weights may be damaged, or overflow in its 16-bit dtype: "
                "check it, or use --compute-dtype float32",
            )
        matrix = self.sum
        del self.sum
        mirror(matrix, 1 / self.tokens)
        return matrix


def _mirror_lower(matrix: torch.Tensor) -> None:
    """Copy the lower triangle over the upper one, in place."""
    for start, end in _column_blocks(matrix.shape[0]):
        matrix[:start, start:end] = matrix[start:end, :start].T
        corner = matrix[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).T)


def _column_blocks(n: int, width: int = COLUMN_BLOCK) -> list[tuple[int, int]]:
    return [(start, min(start + width, n)) for start in range(0, n, width)]


@dataclass(frozen=True)
class Factor:
    """H + damping = R R^T [in, in]."""

    matrix: torch.Tensor
    """R on and above the diagonal, H below it."""
    damping: float
    """What was added to the diagonal, as a fraction of its mean."""
    dead_columns: int
    """Inputs that are zero for all calibration tokens: their weights are rounded to nearest."""

    def solve_in_place(self, right: torch.Tensor) -> None:
        """Overwrite right [in, any] with R^-1 @ right. In float32, factors are rounded to bfloat16."""
        r = self.matrix
        for start, end in reversed(_column_blocks(r.shape[0], PANEL)):
            inverse = _inverse(r[start:end, start:end])
            block = add_product(torch.zeros_like(right[start:end]), inverse, right[start:end], rounded=True)
            right[start:end] = block
            add_product(right[:start], r[:start, start:end], block, alpha=-1, rounded=True)


def factor_in_place(hessian: torch.Tensor, damp_percent: float) -> Factor:
    """Compute the upper triangular R with H + damping = R R^T, written over `hessian` [in, in], symmetric.

    With J the reversal, the Cholesky factor L of J H J gives R = J L J, and R^-1 is the factor that
    GPTQ (Frantar et al. 2022, arXiv:2210.17323) computes with Cholesky, inverse, Cholesky. Blocks are
    factored from the last to the first, so that J is applied to one block at a time. Only the upper triangle
    is written: the lower one keeps H, from which a failed attempt is repeated with ten times the damping.

    Raises CalibrationError if H is not positive definite even with heavy damping.
    """
    diagonal = hessian.diagonal().clone()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones((), device=hessian.device)
    diagonal[dead] = mean
    damping = damp_percent
    while damping <= MAX_DAMPING:
        hessian.diagonal().copy_(diagonal + damping * mean)
        if _reverse_cholesky(hessian):
            return Factor(hessian, damping, int(dead.sum()))
        _mirror_lower(hessian)
        damping *= 10
    raise CalibrationError(
        "the Hessian is not positive definite, even with heavy damping",
        "Use more calibration text, or a larger --damp-percent",
    )


def _inverse(r: torch.Tensor) -> torch.Tensor:
    """The inverse of a corner's upper triangle, computed in float64. Multiplying a panel by it is faster than
    solving for the panel."""
    one = torch.eye(r.shape[0], dtype=torch.float64, device=r.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(r.double(), one, upper=True)
    return inverse.to(r.dtype)


def _reverse_cholesky(matrix: torch.Tensor) -> bool:
    """Overwrite the upper triangle of `matrix` with R; False if it is not positive definite.

    The host waits for a card once, at the end: a corner that fails spoils the upper triangle only.
    """
    on_host = matrix.device.type == "cpu"
    passed = torch.ones((), dtype=torch.bool, device=matrix.device)
    for start, end in reversed(_column_blocks(matrix.shape[0], PANEL)):
        corner = matrix[start:end, start:end]
        lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        passed &= (info == 0) & torch.isfinite(lower.diagonal()).all()
        if on_host and not passed:
            return False
        r = lower.flip(0, 1)
        corner.copy_(corner.tril(-1) + r)
        if start == 0:
            break
        above = matrix[:start, start:end]
        panel = add_product(
            torch.zeros_like(above, memory_format=torch.contiguous_format), above, _inverse(r).T
        )
        above.copy_(panel)
        add_product(matrix[:start, :start], panel, panel.T, alpha=-1, upper=True)
    return bool(passed)
