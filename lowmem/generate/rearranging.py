"""Packed weights into the order in which memory is read fastest, a few at a time, between tokens.

A model answers as soon as its files are mapped, in GPTQ's own order, whose rows lie pages apart: read at two
thirds of the memory's pace. The same words in panels are read at all of it (csrc/panels.c), but to copy them
all first would hold the first token back by longer than it takes itself. So every token is followed by some
of that work, for as long as the token took, until all is done.
"""

from __future__ import annotations

import time

from torch import nn

from lowmem.plan.device import host_memory_available
from lowmem.quant_linear import QuantLinear

_MARGIN = 256 << 20
"""Bytes of the host's memory that are left alone."""


class Rearranging:
    """The packed linears of `model` that are still in their files' order."""

    def __init__(self, model: nn.Module) -> None:
        self._left = [m for m in model.modules() if isinstance(m, QuantLinear) and m.in_file_order]

    def __len__(self) -> int:
        return len(self._left)

    def go_on(self, seconds: float) -> None:
        """Rearrange for about so many seconds. What memory is too short for stays as it is, for good."""
        stop = time.perf_counter() + seconds
        while self._left and time.perf_counter() < stop:
            linear = self._left[-1]
            if host_memory_available() < linear.qweight.nbytes + _MARGIN:
                self._left.clear()
                return
            linear.use_panels()
            self._left.pop()

    def finish(self) -> None:
        """All that is left, now."""
        self.go_on(float("inf"))
