"""The contract of a kernel: what multiplies activations by the weight of a linear.

Importing this module needs no torch, so that the planner can ask a kernel for its workspace before torch is
loaded. registry.py lists the kernels; the modules that compute are imported when a kernel is first used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.checkpoint.formats import LinearFormat

if TYPE_CHECKING:
    import torch
    from torch import nn

TOLERANCES = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.01}
"""Relative error, in the 2-norm, that a kernel may have against the reference, by dtype of the activations.
Rounding scales, weights and sums to 16 bits costs a few thousandths."""


class Unsuitable(ValueError):
    """A kernel cannot multiply by this linear's weight; the text says why."""


@dataclass(frozen=True)
class LinearSpec:
    """A linear without its tensors."""

    in_features: int
    out_features: int
    bias: bool = False
    format: LinearFormat | None = None
    """How the weight is packed; None for a weight in 16 or 32 bits."""

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.in_features * self.out_features

    @property
    def group_size(self) -> int:
        """Input columns that share a scale, as their number."""
        size = self.format.group_size if self.format else -1
        return self.in_features if size == -1 else size

    @property
    def widest(self) -> int:
        """The larger of its two sizes."""
        return max(self.in_features, self.out_features)


class Kernel(ABC):
    """Multiplies by the weights of linears. Stateless, except for memory that its linears share."""

    name: str
    """Shown to users."""
    about: str = ""
    """Why one would use it, in a phrase for users."""
    row_invariant = False
    """Whether a row of the output has the same bits whatever other rows are multiplied with it."""
    trusted = False
    """Tested by this project on every instruction set, so that it needs no trial (see trial.py)."""

    trial_rows: tuple[int, ...] = (1, 64)
    """Numbers of rows that a trial multiplies: many kernels have other code for decode than for prefill."""

    @abstractmethod
    def why_not(self, spec: LinearSpec, device: str, dtype: str) -> str:
        """The reason why the kernel cannot multiply by such a linear; "" when it can.

        device: as "cpu" or "cuda:0". dtype: of the activations, as "bfloat16". Tensors may still turn out to
        be unsuitable: see `prepare`.
        """

    @abstractmethod
    def workspace(self, spec: LinearSpec, rows: int, itemsize: int) -> int:
        """The most bytes held beside the weight, the activations and the result at one moment.

        Covers the product with `rows` activations of `itemsize` bytes, and `prepare`, unless the loader fills
        the linear a slice at a time. Needs no torch.
        """

    @abstractmethod
    def prepare(self, linear: Any, dtype: torch.dtype) -> nn.Module:
        """Return the module to use in place of `linear`: it multiplies x [..., in] to [..., out] in `dtype`.

        linear: a PackedLinear, or an nn.Linear where `format` is None. Its tensors are checked here, once,
        and repacked if need be. The result is `linear` itself or takes over its tensors, and `linear` must
        not be used any more. Raises Unsuitable if the kernel does not support the tensors; exceptions of
        the kernel's own code pass through.
        """

    def tolerance(self, dtype: str) -> float:
        """See TOLERANCES."""
        return TOLERANCES[dtype]
