"""The Hessian of a linear's output error, and its factor.

For a linear y = W x the squared error of replacing W by Q over the calibration tokens is
tr((W-Q) H (W-Q)^T) with H = X^T X / tokens. GPTQ needs the upper triangular R with H = R R^T; one
factorization gives it (see `factor_in_place`), where the published algorithm takes a Cholesky, an
inverse and a second Cholesky.

H is by far the largest thing that a conversion holds: 2.25 GiB for a linear with 24,576 inputs. So
there is one buffer of its size, and what is done to it is done in place, in column blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowmem.errors import CalibrationError

COLUMN_BLOCK = 1024
"""Columns of H that one matrix product updates: large enough for full speed, small as temporary memory."""

MAX_DAMPING = 100.0


class Hessian:
    """Accumulates H = X^T X / tokens in float32, [in, in], upper triangle only."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add the inputs of some tokens, x: [tokens, in] in any float dtype."""
        x = x.to(torch.float32)
        n = x.shape[1]
        for start in range(0, n, COLUMN_BLOCK):
            end = min(start + COLUMN_BLOCK, n)
            self.sum[:end, start:end].addmm_(x[:, :end].T, x[:, start:end])
        self.tokens += x.shape[0]

    def finish(self) -> torch.Tensor:
        """The whole symmetric mean [in, in]. The accumulator's buffer itself: it is used up.

        Raises CalibrationError when an activation was not finite.
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
        for start, end in _column_blocks(matrix.shape[0]):
            block = matrix[:end, start:end]
            block /= self.tokens
            matrix[start:end, :start] = block[:start].T
            corner = block[start:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
        return matrix


def _mirror_lower(matrix: torch.Tensor) -> None:
    """Copy the lower triangle over the upper one, in place."""
    for start, end in _column_blocks(matrix.shape[0]):
        matrix[:start, start:end] = matrix[start:end, :start].T
        corner = matrix[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).T)


def _column_blocks(n: int) -> list[tuple[int, int]]:
    return [(start, min(start + COLUMN_BLOCK, n)) for start in range(0, n, COLUMN_BLOCK)]


def permute_in_place(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """matrix[order][:, order] without a second matrix."""
    for start, end in _column_blocks(matrix.shape[1]):
        matrix[:, start:end] = matrix[:, start:end][order]
    for start, end in _column_blocks(matrix.shape[0]):
        matrix[start:end] = matrix[start:end][:, order]


@dataclass(frozen=True)
class Factor:
    """H + damping = R R^T [in, in], and what it took to factor it.

    matrix: R on and above the diagonal, H below it. diagonal: [in], that of the damped H.
    """

    matrix: torch.Tensor
    diagonal: torch.Tensor
    damping: float
    """What was added to the diagonal, as a fraction of its mean."""
    dead_columns: int
    """Inputs that no calibration token used: rounded to nearest, since nothing is known of them."""

    def hessian_corner(self, start: int, end: int) -> torch.Tensor:
        """H[start:end, start:end], whole."""
        lower = self.matrix[start:end, start:end].tril(-1)
        return lower + lower.T + self.diagonal[start:end].diag()

    def hessian_rows_times(self, start: int, end: int, right: torch.Tensor) -> torch.Tensor:
        """H[start:end] @ right, right: [in, out]."""
        product = self.hessian_corner(start, end) @ right[start:end]
        product.addmm_(self.matrix[start:end, :start], right[:start])
        product.addmm_(self.matrix[end:, start:end].T, right[end:])
        return product

    def solve_in_place(self, right: torch.Tensor) -> None:
        """H^-1 @ right, written over right [in, out]: H = R R^T, so one triangle after the other."""
        r = self.matrix
        for start, end in reversed(_column_blocks(r.shape[0])):
            block = torch.linalg.solve_triangular(r[start:end, start:end], right[start:end], upper=True)
            right[start:end] = block
            right[:start].addmm_(r[:start, start:end], block, alpha=-1)
        for start, end in _column_blocks(r.shape[0]):
            block = torch.linalg.solve_triangular(r[start:end, start:end].T, right[start:end], upper=False)
            right[start:end] = block
            right[end:].addmm_(r[start:end, end:].T, block, alpha=-1)


def factor_in_place(hessian: torch.Tensor, damp_percent: float) -> Factor:
    """The upper triangular R with H + damping = R R^T, written over `hessian` [in, in], symmetric.

    With J the reversal, the Cholesky factor L of J H J gives R = J L J, and R^-1 is the factor that
    GPTQ (Frantar et al. 2022, arXiv:2210.17323) reaches with Cholesky, inverse, Cholesky. The blocks
    are taken from the last to the first, so J is never applied to more than one of them, and only the
    upper triangle is written: the lower one keeps H, from which a failed attempt starts again with
    ten times the damping.

    Raises CalibrationError if even a heavy damping leaves H not positive definite.
    """
    diagonal = hessian.diagonal().clone()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones((), device=hessian.device)
    diagonal[dead] = mean
    damping = damp_percent
    while damping <= MAX_DAMPING:
        hessian.diagonal().copy_(diagonal + damping * mean)
        if _reverse_cholesky(hessian):
            return Factor(hessian, diagonal + damping * mean, damping, int(dead.sum()))
        _mirror_lower(hessian)
        damping *= 10
    raise CalibrationError(
        "the Hessian is not positive definite, even with heavy damping",
        "Use more calibration text, or a larger --damp-percent",
    )


def _reverse_cholesky(matrix: torch.Tensor) -> bool:
    """Overwrite the upper triangle of `matrix` by R; False if it is not positive definite."""
    for start, end in reversed(_column_blocks(matrix.shape[0])):
        corner = matrix[start:end, start:end]
        lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
            return False
        r = lower.flip(0, 1)
        corner.copy_(corner.tril(-1) + r)
        if start == 0:
            break
        panel = torch.linalg.solve_triangular(r.T, matrix[:start, start:end], upper=False, left=False)
        matrix[:start, start:end] = panel
        for left, right in _column_blocks(start):
            matrix[:left, left:right].addmm_(panel[:left], panel[left:right].T, alpha=-1)
            matrix[left:right, left:right] -= (panel[left:right] @ panel[left:right].T).triu_()
    return True
