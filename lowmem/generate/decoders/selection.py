"""Which decoder runs a model's steps, and why not a faster one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lowmem.checkpoint.files.reading import one_line
from lowmem.generate.cache.contract import KVCache
from lowmem.generate.decoders.contract import Decoder, DecoderRefused, Feed, StepOutput
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.decoders.graph import GraphDecoder
from lowmem.generate.decoders.native import NativeDecoder


class SelectedDecoder(Decoder):
    """Everything runs on `fast` while there is one, but for steps of too many rows.

    What raises there is repeated on `eager`, which then runs everything.

    graphs: try CUDA graphs, which need a model that is on one card as a whole. On a CPU launching a kernel
    costs nothing, and fixed shapes make attention read rows that are not filled.
    """

    def __init__(self, model: Any, cache: KVCache, *, graphs: bool = False) -> None:
        self.eager = EagerDecoder(model)
        self.fast: Decoder | None = None
        self.why_eager = ""
        """Why steps are eager; "" while they are not."""
        try:
            if graphs:
                self.fast = GraphDecoder(self.eager, cache)
            else:
                self.fast = NativeDecoder(self.eager, cache.capacity)
        except DecoderRefused as refused:
            self.why_eager = refused.reason

    def prefill(self, feeds: Sequence[Feed]) -> tuple[torch.Tensor, ...]:
        """See `Decoder.prefill`."""
        if self.fast is not None:
            try:
                return self.fast.prefill(feeds)
            except Exception as error:
                self._give_up(error)
        return self.eager.prefill(feeds)

    def step(self, feeds: Sequence[Feed]) -> StepOutput:
        """See `Decoder.step`."""
        if self.fast is not None and all(len(feed.ids) <= self.fast.max_rows for feed in feeds):
            try:
                return self.fast.step(feeds)
            except Exception as error:
                self._give_up(error)
        return self.eager.step(feeds)

    def _give_up(self, error: Exception) -> None:
        """Decode eagerly from now on, whatever a kernel, a compiler or a captured graph has raised."""
        self.fast, self.why_eager = None, one_line(error)
