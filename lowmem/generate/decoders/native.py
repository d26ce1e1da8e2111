"""A decode step of transformers' GPTBigCode on the CPU in one call of our C library (csrc/step/step.c).

An eager step makes hundreds of calls from Python between its kernels, and torch's attention takes five times
as long at 8192 tokens. Here the threads run all layers on their own: linears packed or bfloat16, embeddings
and head bfloat16 or float16, keys and values in the slot's buffers, everything between in float32. A row's
logits, keys and values do not depend on the rows beside it, so a draft leaves what one-row steps leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowmem.generate.cache.contract import Slot
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
from lowmem.generate.decoders.native_model import MAX_ROWS, BoundModel, NativeModel, why_not

# Relative, in the 2-norm of the logits. Eager steps round to bfloat16 after every operation, native ones
# hardly ever: with random weights in 40 layers the two differ by 0.05, with trained ones in 8 by 0.006. A
# wrong step differs by about 1.
_TOLERANCE = 0.2


class NativeDecoder(Decoder):
    """Runs decode steps in C.

    The first step of each slot is checked against the eager decoder's logits. Raises DecoderRefused if the
    model is not supported or the logits differ.
    """

    max_rows = MAX_ROWS

    def __init__(self, eager: EagerDecoder) -> None:
        if refusal := why_not(eager.model):
            raise DecoderRefused(refusal)
        self.eager = eager
        self._weights: NativeModel | None = None
        self._bound: dict[int, BoundModel] = {}  # by the slot's index

    def prefill(self, feeds: Sequence[Feed]) -> tuple[torch.Tensor, ...]:
        """See `Decoder.prefill`."""
        return self.eager.prefill(feeds)

    def step(self, feeds: Sequence[Feed]) -> StepOutput:
        """See `Decoder.step`. Also raises ValueError for more than MAX_ROWS ids.

        Raises DecoderRefused if the slot is not supported or the logits of its first step differ.
        """
        known = len(self._bound)
        rewind(feeds)
        with torch.inference_mode():
            logits = tuple([self._step(feed.slot, feed.ids) for feed in feeds])
        commit(feeds)
        return StepOutput(logits, timed=known == len(self._bound))

    def _step(self, slot: Slot, ids: Sequence[int]) -> torch.Tensor:
        bound = self._bound.get(slot.index)
        if bound is not None:
            return bound.step(ids)
        with refusing():
            return self._first_step(slot, ids)

    def _first_step(self, slot: Slot, ids: Sequence[int]) -> torch.Tensor:
        length = slot.length
        expected = self.eager.append(slot, ids, keep=len(ids))
        slot.cut(length)
        if self._weights is None:
            self._weights = NativeModel(self.eager.model)
        bound = self._weights.bind(slot)
        logits = bound.step(ids)
        error = float(((logits - expected).norm(dim=1) / expected.float().norm(dim=1)).amax())
        if not error <= _TOLERANCE:  # true for NaN
            raise DecoderRefused(
                f"the native step's logits differ from the eager ones by {error:.2g} of their norm"
            )
        self._bound[slot.index] = bound
        return logits
