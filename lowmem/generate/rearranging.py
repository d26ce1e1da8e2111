"""Packed weights into the order in which memory is read fastest, while nobody waits and between tokens.

A model answers as soon as its files are mapped, in GPTQ's own order, whose rows lie pages apart: read at
two thirds of the memory's pace. In the tiled layout they are read at all of it (csrc/linear/tiled.c), but
to copy them all first would hold the first token back by longer than it takes itself. So it is done while
somebody types or no request has come, and where an answer is wanted before, every token is followed by some
of that work, for as long as the token took, until all is done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from torch import nn

from lowmem.kernels.quant_linear import QuantLinear
from lowmem.plan.device import host_memory_available, is_out_of_memory

_MARGIN = 256 << 20
"""Bytes of the host's memory that are left alone."""


class Rearranging:
    """The packed linears of `model` that are still in their files' order."""

    def __init__(self, model: nn.Module) -> None:
        self._left = [m for m in model.modules() if isinstance(m, QuantLinear) and m.in_file_order]

    def __len__(self) -> int:
        return len(self._left)

    def one(self) -> None:
        """The next linear. What memory is too short for stays as it is, for good, as does what fails."""
        if not self._left:
            return
        linear = self._left[-1]
        if host_memory_available() < linear.qweight.nbytes + _MARGIN:
            self._left.clear()
            return
        try:
            linear.use_tiled_layout()
        except Exception as error:
            self._left.clear()
            if not is_out_of_memory(error):
                raise
        else:
            self._left.pop()

    def go_on(self, seconds: float) -> None:
        """Linear after linear for about so many seconds."""
        stop = time.perf_counter() + seconds
        while self._left and time.perf_counter() < stop:
            self.one()

    def finish(self) -> None:
        """All that is left, now."""
        self.go_on(float("inf"))

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Linear after linear in a thread, as long as the caller does something else: nothing with the model.

        The end waits for the linear that has been begun, and raises what the thread raised.
        """
        if not self._left:
            yield
            return
        ended = Event()

        def work() -> None:
            while self._left and not ended.is_set():
                self.one()

        with ThreadPoolExecutor(1, "rearranging") as thread:
            done = thread.submit(work)
            try:
                yield
            finally:
                ended.set()
        done.result()
