"""transformers' own forward, one sequence after the other: takes every model and is the others' oracle."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from lowmem.config import PREFILL_CHUNK
from lowmem.generate.attention import use_row_attention
from lowmem.generate.cache.contract import Slot
from lowmem.generate.decoders.contract import Decoder, Feed, StepOutput, rewind
from lowmem.generate.grouped_attention import use_grouped_attention
from lowmem.generate.position_scaling import PositionScaling
from lowmem.generate.transfer import send
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.models.embedding import token_table

# A product of several rows may round differently from a product of one row. The gap between the two largest
# logits moved by at most this share of the largest logit, rounded up: 1.4 eps in bfloat16, 10 eps in float32
# (600 rows of tiny-starchat).
ROUNDING = {
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
}


class EagerDecoder(Decoder):
    """Decodes with `model`, a transformers causal LM in eval mode.

    On a CPU the model's attention becomes `attention.row_attention`, on a card
    `grouped_attention.grouped_attention`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        table = token_table(model)
        self.device, self.vocabulary = table.device, table.vocabulary
        # The logits of a whole prompt with a large vocabulary can outweigh the model's activations.
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        # A CPU's 16-bit product of one row is another kernel than that of several rows, which gives each row
        # the same bits however many there are. One-row steps therefore run as two rows and drop the second,
        # so that they leave the keys and values that a draft's rows leave. This is not needed in float32,
        # where the difference is near 1e-6, nor where all linears before the head are our own kernels'.
        rowwise = self.device.type == "cpu" and use_row_attention(model)
        self._pairs = rowwise and table.activations is not torch.float32 and not _row_invariant(model)
        if self.device.type != "cpu":
            use_grouped_attention(model)
        self.scaling = PositionScaling(model)

    def prefill(self, feeds: Sequence[Feed]) -> tuple[torch.Tensor, ...]:
        """See `Decoder.prefill`."""
        rewind(feeds)
        lengths = [feed.length or feed.slot.length + len(feed.ids) for feed in feeds]
        logits = []
        with torch.inference_mode():
            for feed, length in zip(feeds, lengths, strict=True):
                with self.scaling.rotated_for(length):
                    logits.append(self.append(feed.slot, feed.ids, feed.keep))
        for feed, length in zip(feeds, lengths, strict=True):
            feed.slot.commit(feed.ids, [self.scaling.scale(length)] * len(feed.ids))
        return tuple(logits)

    def step(self, feeds: Sequence[Feed]) -> StepOutput:
        """See `Decoder.step`."""
        rewind(feeds)
        with torch.inference_mode():
            steps = [self._scaled_step(feed.slot, feed.ids) for feed in feeds]
        for feed, (_, scales) in zip(feeds, steps, strict=True):
            feed.slot.commit(feed.ids, scales)
        logits = tuple([logits for logits, _ in steps])
        return StepOutput(logits, ROUNDING.get(logits[0].dtype, 0.0))

    def append(self, slot: Slot, ids: Sequence[int], keep: int) -> torch.Tensor:
        """One forward without rewinding or committing; returns the last `keep` logits [keep, vocab]."""
        return self.forward(send(ids, self.device)[None], slot.view, keep)[0]

    def ahead(self, slot: Slot, ids: Sequence[int]) -> torch.Tensor:
        """The logits [len(ids), vocab] that `append` would give; the slot keeps its length."""
        length = slot.length
        logits = self.append(slot, ids, keep=len(ids))
        slot.cut(length)
        return logits

    def forward(self, ids: torch.Tensor, view: Cache, keep: int = 1, **given: torch.Tensor) -> torch.Tensor:
        """The model's last logits [sequences, keep, vocab] for ids [sequences, n]; `view` gets their rows.

        given: further arguments of the model.
        """
        options = {"logits_to_keep": keep} if self._keeps_logits else {}
        output = self.model(input_ids=ids, past_key_values=view, use_cache=True, **options, **given)
        logits: torch.Tensor = output.logits[:, -keep:]
        return logits

    def _step(self, slot: Slot, ids: Sequence[int]) -> torch.Tensor:
        if not self._pairs or len(ids) != 1 or slot.length + 2 > slot.capacity:
            return self.append(slot, ids, keep=len(ids))
        length = slot.length
        logits = self.append(slot, [ids[0], ids[0]], keep=2)
        slot.cut(length + 1)
        return logits[:1]

    def _scaled_step(self, slot: Slot, ids: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """The logits after every id, and the scales of the rows that hold the ids afterwards."""
        if not self.scaling:
            return self._step(slot, ids), []
        start, scaling = len(slot.tokens), self.scaling
        scales = [scaling.scale(start + row + 1) for row in range(len(ids))]
        # The second row of a pair has the next position.
        if scaling.scale(start + len(ids) + 1) == scales[0] and not self._recomputes(slot.scales, scales[0]):
            with scaling.rotated_for(start + len(ids) + 1):
                return self._step(slot, ids), scales
        rows = []
        for row, scale in enumerate(scales):
            if self._recomputes([*slot.scales, *scales[:row]], scale):
                self._recompute(slot, ids[:row], scale)
                scales[:row] = [scale] * row
            with scaling.rotated_for(start + row + 1):
                rows.append(self.append(slot, ids[row : row + 1], keep=1))
        return torch.cat(rows), scales

    def _recomputes(self, scales: Sequence[int], scale: int) -> bool:
        """Whether the model computes rows of these scales anew for a token of `scale`."""
        return self.scaling.recomputes and any(found != scale for found in scales)

    def _recompute(self, slot: Slot, ids: Sequence[int], scale: int) -> None:
        """Compute the slot's rows, and those of `ids` behind them, at the scale of the next token."""
        tokens = list(slot.tokens)
        whole = [*tokens, *ids]
        slot.cut(0)
        with self.scaling.rotated_for(len(whole) + 1):
            for start in range(0, len(whole), PREFILL_CHUNK):
                self.append(slot, whole[start : start + PREFILL_CHUNK], keep=1)
        slot.commit(tokens, [scale] * len(tokens))


def _row_invariant(model: nn.Module) -> bool:
    """Whether a row's bits do not depend on the other rows in any linear before the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | QuantLinear) and m is not head]
    return bool(linears) and all(isinstance(m, QuantLinear) and m.row_invariant for m in linears)
