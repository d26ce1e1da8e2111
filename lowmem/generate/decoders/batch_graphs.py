"""Decode steps of several sequences as one graph: the weights are read once for all of them.

A graph's inputs have fixed addresses, so its sequences are the cache's first 2, 4, 8 … slots, whether each is
in the step or not. There is one for each of these numbers and each window, made when it is first needed and
compared with the eager step of every sequence in it.

A product of several rows may round differently from that of one row, and a card's libraries choose kernels by
the number of rows. So a sequence's logits differ in their last bits from those that it has alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lowmem.generate.cache.contract import BatchView, KVCache
from lowmem.generate.decoders.capture import Capture, difference, window_of
from lowmem.generate.decoders.contract import DecoderRefused, Feed, refusing, rewind
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.transfer import send

_SPARSE = 4
"""A batch has at most this many rows for each of its sequences: more cost more than they save."""


@dataclass(frozen=True)
class _Batch:
    """A step over the first rows of the first slots."""

    view: BatchView
    pointers: list[tuple[int, int]]
    """The first slot's buffers when the step was captured."""
    ids: torch.Tensor
    """What the step reads, [slots, 1]."""
    run: Callable[[], torch.Tensor]
    """Decodes `ids`; returns logits [slots, vocab] of its own memory."""


class BatchGraphs:
    """The graphs of several sequences, of one model and cache."""

    def __init__(self, eager: EagerDecoder, cache: KVCache, capture: Capture) -> None:
        self._eager, self._cache, self._capture = eager, cache, capture
        self._batches: dict[tuple[int, int], _Batch] = {}  # by slots and size
        self.why_not = ""
        """Why sequences are decoded one after the other; "" if they need not be."""
        parameters = inspect.signature(eager.model.forward).parameters
        if not {"position_ids", "attention_mask"} <= set(parameters):
            self.why_not = "the model takes no positions"
        config = eager.model.config.get_text_config()
        limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        # A mask given as a whole takes the place of those that hide what is out of a layer's window.
        self._longest = min([limit for limit in limits if limit], default=self._cache.capacity)

    def step(self, feeds: Sequence[Feed]) -> tuple[torch.Tensor, ...]:
        """The logits [1, vocab] after each feed's one id; () where one feed after the other is better.

        The slots are advanced, not committed.
        """
        if self.why_not or len(feeds) < 2 or any(len(feed.ids) != 1 for feed in feeds):
            return ()
        count, size = self._slots(feeds), window_of(max(f.slot.length for f in feeds), self._cache.capacity)
        if count > _SPARSE * len(feeds) or size > self._longest:
            return ()
        try:
            with refusing():
                logits = self._run(self._batch(feeds, count, size), feeds)
        except DecoderRefused as refused:
            self.why_not = refused.reason
            rewind(feeds)
            return ()
        for feed in feeds:
            feed.slot.advance(1)
        return logits

    def _slots(self, feeds: Sequence[Feed]) -> int:
        """The first 2, 4, 8 … slots, or all, that the feeds are in."""
        count = 2
        while count <= max(feed.slot.index for feed in feeds):
            count *= 2
        return min(count, len(self._cache.slots))

    def _batch(self, feeds: Sequence[Feed], count: int, size: int) -> _Batch:
        batch = self._batches.get((count, size))
        if batch is None:
            view = self._cache.batch_view(count, size)
            ids = torch.zeros((count, 1), dtype=torch.long, device=self._eager.device)
            self._fill(view, ids, feeds)
            run = self._capture(self._forward(view, ids))
            batch = _Batch(view, self._cache.slots[0].pointers(), ids, run)
            self._check(batch, feeds)
            self._batches[count, size] = batch
        if batch.pointers != self._cache.slots[0].pointers():
            raise DecoderRefused("the KV cache has new buffers")
        return batch

    def _forward(self, view: BatchView, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            logits = self._eager.forward(
                ids, view, attention_mask=view.mask(), position_ids=view.position_ids()
            )
            return logits[:, -1]

        return forward

    def _fill(self, view: BatchView, ids: torch.Tensor, feeds: Sequence[Feed]) -> None:
        """Set the inputs of the next run."""
        view.seek({feed.slot.index: feed.slot.length for feed in feeds})
        fed = {feed.slot.index: feed.ids[0] for feed in feeds}
        ids.copy_(send([fed.get(index, 0) for index in range(len(ids))], ids.device)[:, None])

    def _run(self, batch: _Batch, feeds: Sequence[Feed]) -> tuple[torch.Tensor, ...]:
        self._fill(batch.view, batch.ids, feeds)
        logits = batch.run()
        return tuple([logits[feed.slot.index : feed.slot.index + 1] for feed in feeds])

    def _check(self, batch: _Batch, feeds: Sequence[Feed]) -> None:
        """Compare with eager steps in the same state. Raises DecoderRefused; the slots keep their lengths."""
        expected = [self._eager.ahead(feed.slot, feed.ids) for feed in feeds]
        for got, right in zip(self._run(batch, feeds), expected, strict=True):
            if problem := difference(got, right):
                raise DecoderRefused(problem)
