"""What a kind of cards must tell and do."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Properties:
    """What a card is."""

    name: str
    total: int
    """Bytes of memory."""
    capability: str
    """How its maker names what it can do: "8.6", "gfx1100"; "" where there is no such name."""
    multiprocessors: int
    """Units that run programs of a kernel at the same time; 1 where torch does not say."""
    bfloat16: bool
    """Whether it multiplies bfloat16 in hardware."""
    float64: bool
    """Whether it has 64-bit floats at all."""
    shares_memory: bool
    """Whether its memory is the host's."""


class Cards(ABC):
    """The cards of one kind in this machine. Methods that take a device raise RuntimeError as torch does."""

    type: str
    """torch's device type."""
    label: str
    """What users call it: "CUDA", "ROCm", "XPU", "MPS"."""
    maker: str
    triton: str
    """Triton's backend that compiles for it; "" if there is none."""
    timed = False
    """Whether `kernels/card_timing.py` can time products on it."""
    pins = True
    """Whether a copy from pinned memory does not wait for it."""
    visibility: str
    """The user's next step where the driver is installed and torch finds no card."""

    @property
    def build_advice(self) -> str:
        """How to get a torch that sees it."""
        return f"Install torch with {self.label}: https://pytorch.org/get-started/locally/"

    @abstractmethod
    def build(self) -> str:
        """What torch was built for, as "CUDA 12.8"; "" if not for these cards."""

    @abstractmethod
    def driver_present(self) -> bool:
        """Whether the driver is installed; without it no card can be used. Imports no torch."""

    @abstractmethod
    def count(self) -> int:
        """The cards that torch sees."""

    @abstractmethod
    def properties(self, device: torch.device) -> Properties:
        """See Properties."""

    @abstractmethod
    def memory(self, device: torch.device) -> tuple[int, int]:
        """Bytes (free, total), with what this process needs for the driver already allocated."""

    @abstractmethod
    def synchronize(self, device: torch.device) -> None:
        """Wait until the card has finished all queued work."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Return the freed memory that torch keeps to the driver."""

    @abstractmethod
    def allocated(self, device: torch.device) -> int:
        """Bytes of this process's tensors on the card."""

    @abstractmethod
    def peak(self, device: torch.device) -> int:
        """Most bytes allocated since `reset_peak`."""

    @abstractmethod
    def reset_peak(self, device: torch.device) -> bool:
        """Start a new peak. False where torch cannot."""

    def why_no_graph(self) -> str:
        """Why decode steps cannot be captured as a graph; "" if they can."""
        return f"torch {_torch_version()} has no graphs for {self.label}"

    @contextlib.contextmanager
    def capturing(self, device: torch.device, pool: Any) -> Iterator[Any]:
        """Capture what runs inside into a graph, which has `replay` and `pool`. pool: of another graph."""
        raise RuntimeError(self.why_no_graph())
        yield

    def using(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Make it the card that kernels are launched on."""
        return contextlib.nullcontext()


def _torch_version() -> str:
    import torch

    return str(torch.__version__)
