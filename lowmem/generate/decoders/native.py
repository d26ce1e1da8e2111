"""Forwards of GPTBigCode, Llama and relatives on the CPU in one call of our C library (csrc/step/step.c).

An eager step makes hundreds of calls from Python between its kernels, and torch's attention takes five times
as long at 8192 tokens. Here the threads run all layers on their own, for all sequences at once: linears
packed or bfloat16, embeddings and head bfloat16 or float16, keys and values in the slots' buffers, everything
between in float32. A row's logits, keys and values do not depend on the rows beside it. So a sequence gets
the same bits alone and beside others, from a step, a draft or a prompt in chunks of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import torch

from lowmem.generate.decoders.contract import (
    Decoder,
    DecoderRefused,
    Feed,
    StepOutput,
    commit,
    refusing,
    rewind,
)
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.decoders.native_families import why_not
from lowmem.generate.decoders.native_model import NativeModel
from lowmem.generate.decoders.native_weights import MAX_ROWS

# Relative, in the 2-norm of the logits. Eager steps round to bfloat16 after every operation, native ones
# hardly ever: with random weights in 40 layers the two differ by 0.05, with trained ones in 8 by 0.006. A
# wrong step differs by about 1, and so do the eager logits of a few tokens from those in float32: SmolLM2's
# second token amplifies their rounding to 1.4. So half of the tokens must agree.
_TOLERANCE = 0.2
_COMPARED = 16  # ids whose logits are compared: the first of a prompt, repeated where it is shorter


class NativeDecoder(Decoder):
    """Runs prefills and steps in C.

    A prefill of a model with dense linears is eager: torch multiplies many rows faster by 16-bit weights.

    The first forward is checked against the eager decoder's logits. Raises DecoderRefused if the model is not
    supported or the logits differ.
    """

    max_rows = MAX_ROWS

    def __init__(self, eager: EagerDecoder, capacity: int) -> None:
        """capacity: tokens of the KV cache's slots."""
        if refusal := why_not(eager.model, capacity):
            raise DecoderRefused(refusal)
        self.eager = eager
        self._model: NativeModel | None = None  # once it is known to be right

    def prefill(self, feeds: Sequence[Feed]) -> tuple[torch.Tensor, ...]:
        """See `Decoder.prefill`. Raises DecoderRefused as `step` does."""
        rewind(feeds)
        with torch.inference_mode():
            if not self._checked(feeds[0]).packed:
                return self.eager.prefill(feeds)
            logits = [self._prefill(feed) for feed in feeds]
        commit(feeds)
        return tuple(logits)

    def step(self, feeds: Sequence[Feed]) -> StepOutput:
        """See `Decoder.step`. Also raises ValueError for more than MAX_ROWS ids in all.

        Raises DecoderRefused if a slot is not supported or the logits of the first forward differ.
        """
        known = self._model is not None
        rewind(feeds)
        with torch.inference_mode():
            rows = [len(feed.ids) for feed in feeds]
            logits = self._checked(feeds[0]).forward(feeds, rows).split(rows)
        commit(feeds)
        return StepOutput(logits, timed=known)

    def _prefill(self, feed: Feed) -> torch.Tensor:
        """The logits [feed.keep, vocab], MAX_ROWS rows at a time."""
        model, logits = self._checked(feed), []
        for start in range(0, len(feed.ids), MAX_ROWS):
            part = Feed(feed.slot, feed.ids[start : start + MAX_ROWS])
            wanted = max(0, start + len(part.ids) - max(start, len(feed.ids) - feed.keep))
            logits.append(model.forward([part], [wanted]))
        return torch.cat(logits)

    def _checked(self, feed: Feed) -> NativeModel:
        """The native model; the first time, its logits behind the feed's first ids are compared."""
        if self._model is None:
            with refusing():
                room = min(_COMPARED, feed.slot.capacity - feed.slot.length)
                self._model = self._compared(Feed(feed.slot, [*islice(cycle(feed.ids), room)]))
        return self._model

    def _compared(self, feed: Feed) -> NativeModel:
        slot, rows = feed.slot, len(feed.ids)
        length = slot.length
        expected = self.eager.ahead(slot, feed.ids)
        model = NativeModel(self.eager.model, slot.capacity)
        logits = model.forward([feed], [rows])
        slot.cut(length)
        error = float(((logits - expected).norm(dim=1) / expected.float().norm(dim=1)).median())
        if not error <= _TOLERANCE:  # true for NaN
            raise DecoderRefused(
                f"the native step's logits differ from the eager ones by {error:.2g} of their norm"
            )
        return model
