"""Copy packed weights into the tiled layout while idle and between tokens.

A model answers as soon as its files are mapped, in GPTQ's own layout, where consecutive rows are pages apart:
kernels read it at two thirds of the memory bandwidth. The tiled layout (csrc/linear/tiled.c) is read at full
bandwidth, but copying everything first would delay the first token by more than that token takes. So linears
are repacked while a user types or no request is running, and after each token of an answer, for as long as
the token took, until all are done.
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

_MARGIN = 256 << 20  # bytes of host memory to leave free


class Repacking:
    """The packed linears of `model` that are still in their file's layout; false when none is left."""

    def __init__(self, model: nn.Module) -> None:
        self._left = [m for m in model.modules() if isinstance(m, QuantLinear) and m.in_file_order]

    def __len__(self) -> int:
        return len(self._left)

    def run_one(self) -> None:
        """Repack the next linear, some hundredths of a second.

        If memory is short or an attempt fails, this and all other linears stay as they are for good.
        """
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

    def run(self, seconds: float) -> None:
        """Repack linears for about `seconds`."""
        stop = time.perf_counter() + seconds
        while self._left and time.perf_counter() < stop:
            self.run_one()

    def finish(self) -> None:
        """Repack all remaining linears now."""
        self.run(float("inf"))

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Repack in a thread while the block runs, which must not use the model: it waits for a user, say.

        The end waits for the linear in progress, and raises what the thread raised.
        """
        if not self._left:
            yield
            return
        ended = Event()

        def work() -> None:
            while self._left and not ended.is_set():
                self.run_one()

        with ThreadPoolExecutor(1, "repacking") as thread:
            done = thread.submit(work)
            try:
                yield
            finally:
                ended.set()
        done.result()
