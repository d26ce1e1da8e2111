"""Decode steps with fixed shapes, captured once and replayed as graphs of a card.

An eager step of a model of 40 layers launches some 700 kernels one by one; a graph launches them as one. It
is captured from the eager step itself, so it needs no compiler, works with any kernel that does not wait for
the host, and keeps what transformers does in eager mode only: its compiled attention expands a multi-query
cache to all heads, 200 MB a layer for StarChat Alpha at 8192 tokens. torch.compile's backends can be chosen
instead.

With fixed shapes attention also reads rows that are not filled yet. So there is one graph for each window of
a slot, 512 tokens and each power of two above, made when the sequence first reaches it. Each is compared with
the eager step before it is used. `batch_graphs` has the graphs of several sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lowmem.generate.cache.contract import FixedView, KVCache, Slot
from lowmem.generate.decoders.batch_graphs import BatchGraphs
from lowmem.generate.decoders.capture import (
    CARD_GRAPH,
    Capture,
    CardGraphs,
    Graphs,
    difference,
    window_of,
)
from lowmem.generate.decoders.contract import (
    Decoder,
    DecoderRefused,
    Feed,
    StepOutput,
    commit,
    refusing,
    rewind,
)
from lowmem.generate.decoders.eager import ROUNDING, EagerDecoder

_DUMMY_TOKENS = 8


@dataclass(frozen=True)
class _Window:
    """A step over the first rows of one slot."""

    view: FixedView
    pointers: list[tuple[int, int]]
    """The slot's buffers when the step was captured."""
    run: Callable[[], torch.Tensor]
    """Decodes the id in the decoder's input; returns logits [1, vocab] of its own memory."""


class GraphDecoder(Decoder):
    """Decodes one token of each sequence by replaying graphs of the eager step.

    Several sequences are one graph where `batches` takes them, else one after the other.

    cache: its contents are kept. backend: CARD_GRAPH, or a backend of torch.compile. Raises DecoderRefused
    if the first slot's step cannot be captured or differs from the eager one.
    """

    max_rows = 1

    def __init__(
        self,
        eager: EagerDecoder,
        cache: KVCache,
        *,
        backend: str = CARD_GRAPH,
        graphs: Graphs | None = None,
    ) -> None:
        self.eager = eager
        if eager.scaling:
            raise DecoderRefused("the rotary embedding depends on the length of the sequence")
        self._windows: dict[tuple[int, int], _Window] = {}  # by slot and size
        if graphs is None and backend == CARD_GRAPH:
            graphs = CardGraphs(eager.device)
        self._capture = Capture(graphs, backend)
        self.batches = BatchGraphs(eager, cache, self._capture)
        self._input = torch.zeros((1, 1), dtype=torch.long, device=eager.device)
        slot = cache.slots[0]
        if slot.length == slot.capacity:
            raise DecoderRefused("the KV cache is full")
        try:
            with torch.inference_mode(), refusing():
                self._try_out(slot)
        finally:
            slot.rewind()

    def prefill(self, feeds: Sequence[Feed]) -> tuple[torch.Tensor, ...]:
        """See `Decoder.prefill`."""
        return self.eager.prefill(feeds)

    def step(self, feeds: Sequence[Feed]) -> StepOutput:
        """See `Decoder.step`. Raises DecoderRefused, and ValueError for several ids of a feed."""
        made = self._capture.made
        rewind(feeds)
        with torch.inference_mode():
            together = self.batches.step(feeds)
            logits = together or tuple([self._step(feed.slot, feed.ids) for feed in feeds])
        commit(feeds)
        rounding = ROUNDING.get(logits[0].dtype, 0.0) if together else 0.0
        return StepOutput(logits, rounding, timed=made == self._capture.made)

    def _step(self, slot: Slot, ids: Sequence[int]) -> torch.Tensor:
        if len(ids) != 1:
            raise ValueError(f"a graph decodes one token of a sequence, not {len(ids)}")
        with refusing():
            logits = self._run(self._window(slot, ids[0]), slot, ids[0])
        slot.advance(1)
        return logits

    def _run(self, window: _Window, slot: Slot, token: int) -> torch.Tensor:
        self._input.fill_(token)
        window.view.seek(slot.length)
        return window.run()

    def _try_out(self, slot: Slot) -> None:
        """Check two steps behind some tokens, so that attention has rows to read and the position moves."""
        room = slot.capacity - slot.length
        tokens = [number % self.eager.vocabulary for number in range(1, _DUMMY_TOKENS + 3)]
        if slot.length == 0 and room > 2:
            self.eager.append(slot, tokens[: min(_DUMMY_TOKENS, room - 2)], keep=1)
        for token in tokens[: -1 - min(2, slot.capacity - slot.length) : -1]:
            self._check(self._window(slot, token), slot, token)
            self.eager.append(slot, [token], keep=1)

    def _window(self, slot: Slot, token: int) -> _Window:
        """The step for the slot's length. The first of each window is made, and checked with `token`."""
        key = slot.index, window_of(slot.length, slot.capacity)
        window = self._windows.get(key)
        if window is None:
            if slot.length == 0:  # the slot may have no buffers yet
                self.eager.append(slot, [token], keep=1)
                slot.cut(0)
            view = slot.fixed_view(key[1])
            view.seek(slot.length)
            window = _Window(view, slot.pointers(), self._capture(self._forward(view)))
            self._check(window, slot, token)
            self._windows[key] = window
        if window.pointers != slot.pointers():
            raise DecoderRefused("the KV cache has new buffers")
        return window

    def _forward(self, view: FixedView) -> Callable[[], torch.Tensor]:
        return lambda: self.eager.forward(self._input, view)[:, -1]

    def _check(self, window: _Window, slot: Slot, token: int) -> None:
        """Compare with the eager step in the same state. Raises DecoderRefused; the slot keeps its length."""
        expected = self.eager.ahead(slot, [token])
        problem = difference(self._run(window, slot, token), expected)
        if problem:
            raise DecoderRefused(problem)
