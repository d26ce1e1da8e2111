"""Which tokens an answer may continue with. The engine knows no more of a grammar than this."""

from __future__ import annotations

from typing import Protocol

import torch


class Constraint(Protocol):
    """The tokens that one answer may have; follows the answer token by token."""

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and no token may follow."""

    def allowed(self) -> torch.Tensor:
        """The ids that may come next, int64 [n] on the host, ascending, n at least 1.

        Calls without `accept` between them give the same ids. Raises InvalidRequestError if there is none.
        """

    def accept(self, token: int) -> None:
        """Go on behind a chosen token, one of `allowed`."""
