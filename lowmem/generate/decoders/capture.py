"""How a step of fixed shapes is captured, and compared with the eager one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from lowmem.cards.find import cards_of, is_card
from lowmem.generate.decoders.contract import DecoderRefused

CARD_GRAPH = "graph"
FIRST_WINDOW = 512
# Relative, in the 2-norm of the logits: a mask, or another kernel for it, sums in another order.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.03}
_WARM_UPS = 2  # the first calls load kernels and allocate workspaces, which a capture cannot do


class Graphs(Protocol):
    """Captures a step. Tests replace it with a recorder that runs on the CPU."""

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Returns the tensor that every replay fills, and the replay."""


class CardGraphs:
    """torch's graphs of a card, all in one memory pool: the only code here that a CPU cannot run.

    Raises DecoderRefused if torch has none for the device.
    """

    def __init__(self, device: torch.device) -> None:
        if not is_card(device):
            raise DecoderRefused(f"a graph needs a card; the model is on {device}")
        self.device, self._cards = device, cards_of(device)
        self._pool: Any = None
        if problem := self._cards.why_no_graph():
            raise DecoderRefused(problem)

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """See `Graphs`. Nothing runs while it is captured; an operation that waits for the host raises."""
        with self._cards.capturing(self.device, self._pool) as graph:
            output = run()
        self._pool = graph.pool()
        return output, graph.replay


class Capture:
    """Makes a forward of fixed shapes a graph, or compiles it.

    graphs: None to compile with `backend`, a backend of torch.compile.
    """

    def __init__(self, graphs: Graphs | None, backend: str) -> None:
        self._graphs, self._backend = graphs, backend
        self.made = 0
        """How many forwards were captured or compiled."""

    def __call__(self, forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Returns what repeats `forward` on the same inputs, which must be filled already.

        Each call returns logits in memory of their own.
        """
        self.made += 1
        if self._graphs is None:
            compiled: Callable[[], torch.Tensor] = torch.compile(
                forward, backend=self._backend, fullgraph=True, dynamic=False
            )
            return lambda: compiled().clone()
        for _ in range(_WARM_UPS):
            forward()
        output, replay = self._graphs.capture(forward)

        def run() -> torch.Tensor:
            replay()
            return output.clone()  # the next replay overwrites it

        return run


def window_of(length: int, capacity: int) -> int:
    """The rows that a step behind `length` tokens reads: FIRST_WINDOW, doubled until one more fits."""
    size = FIRST_WINDOW
    while size < length + 1:
        size *= 2
    return min(size, capacity)


def difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    """How logits [1, vocab] differ from the eager ones by more than rounding; "" if they do not.

    The most likely token must be the same, or one that is as likely in the eager logits within the tolerance.
    """
    if got.shape != expected.shape or got.dtype is not expected.dtype:
        return f"logits {list(got.shape)} of {got.dtype}, eager {list(expected.shape)} of {expected.dtype}"
    tolerance = TOLERANCES[expected.dtype]
    got, expected = got.float(), expected.float()
    error = float((got - expected).norm() / expected.norm())
    if not error <= tolerance:  # true for NaN
        return f"its logits differ from the eager ones by {error:.2g} of their norm"
    short = float(expected.max() - expected[0, got.argmax()])
    if short > tolerance * float(expected.abs().max()):
        return "its most likely token is not the eager one"
    return ""
