"""A small model that drafts for a large one (Leviathan et al. 2023, "Fast Inference from Transformers via
Speculative Decoding"). It proposes tokens; the large model chooses every one of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from lowmem.config import PREFILL_CHUNK
from lowmem.generate.cache.dense import DenseKVCache, reused_layers
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.decoders.selection import SelectedDecoder
from lowmem.generate.prefix_store import common_prefix
from lowmem.generate.repacking import Repacking
from lowmem.models.embedding import token_table
from lowmem.models.positions import context_length

STEP_ROWS = 4
"""Tokens that a draft's first step may bring along: the last one, and those chosen since the latest draft."""


@dataclass(frozen=True)
class Ask:
    """A draft that is wanted."""

    slot: int
    """Of the sequence, in the large model's cache."""
    ids: list[int]
    """The sequence's tokens so far."""
    length: int
    """Tokens to draft."""
    guess: Callable[[torch.Tensor, int], int]
    """(the draft's logits [vocab], how many tokens ahead) → the token that the large model would choose, if
    these logits were its own."""


class DraftModel:
    """Drafts for the sequences of one engine; keeps keys and values of its own for each slot.

    model: a transformers causal LM whose vocabulary begins like the large model's. context, slots: those of
    the engine. vocabulary: tokens of the large model. stand_in: the id that the draft reads in place of those
    that its own vocabulary lacks.
    """

    def __init__(self, model: Any, *, context: int, slots: int, vocabulary: int, stand_in: int = 0) -> None:
        config = model.config.get_text_config()
        capacity = min(context, context_length(model))
        self.cache = DenseKVCache(
            int(config.num_hidden_layers), capacity, slots, reused=reused_layers(config)
        )
        table = token_table(model)
        self._model = model
        self.decoder = SelectedDecoder(model, self.cache)
        Repacking(model).finish()
        self._own, self._stand_in = table.vocabulary, stand_in
        self._shared = min(vocabulary, table.vocabulary)
        self._held: list[list[int]] = [[] for _ in self.cache.slots]  # the ids of each slot's rows
        self._step_seconds: deque[float] = deque(maxlen=9)
        self._read_rate = 0.0  # seconds for a token

    def use_graphs(self) -> None:
        """Decode with graphs of the card from now on."""
        self.decoder = SelectedDecoder(self._model, self.cache, graphs=True)

    @property
    def step_seconds(self) -> float:
        """Of a token of all drafts; 0 before one was measured."""
        return median(self._step_seconds) if self._step_seconds else 0.0

    def reading_seconds(self, asks: Sequence[Ask]) -> float:
        """How long the draft model needs to catch up with the sequences; 0 before it was measured."""
        return self._read_rate * sum(max(0, self._behind(ask) - STEP_ROWS) for ask in asks)

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """A draft for each ask: of its length, or [] while the draft model has yet to read the sequence.

        Reads PREFILL_CHUNK tokens of a sequence at most, so that the time of a call is bounded.
        """
        drafts: list[list[int]] = [[] for _ in asks]
        ready = [index for index, ask in enumerate(asks) if self._read(ask)]
        for ahead in range(max((asks[index].length for index in ready), default=0)):
            started = time.perf_counter()
            going = [index for index in ready if asks[index].length > ahead]
            feeds = [self._feed(asks[index], drafts[index]) for index in going]
            logits = self.decoder.step(feeds).logits
            for index, feed, rows in zip(going, feeds, logits, strict=True):
                ask = asks[index]
                self._held[ask.slot] += [*ask.ids, *drafts[index]][-len(feed.ids) :]
                with torch.inference_mode():
                    drafts[index].append(ask.guess(rows[-1, : self._shared], ahead))
            self._step_seconds.append(time.perf_counter() - started)
        return drafts

    def _behind(self, ask: Ask) -> int:
        """Tokens of the sequence that the draft has yet to read."""
        held, ids = self._held[ask.slot], ask.ids
        same = min(len(held), len(ids) - 1)
        while same and held[same - 1] != ids[same - 1]:  # usually only the end differs
            same -= 1
        if held[:same] != ids[:same]:
            same = common_prefix(held, ids)
        return len(ids) - same

    def _read(self, ask: Ask) -> bool:
        """Keep the rows that are the sequence's own, and read what is missing; whether a step can follow."""
        if len(ask.ids) + ask.length > self.cache.capacity:
            return False
        slot, left = self.cache.slots[ask.slot], self._behind(ask)
        known = len(ask.ids) - left
        slot.cut(known)
        del self._held[ask.slot][known:]
        if left <= STEP_ROWS:
            return True
        started = time.perf_counter()
        part = ask.ids[known : known + min(left - 1, PREFILL_CHUNK)]
        self.decoder.prefill([Feed(slot, self._mapped(part), len(ask.ids))])
        self._held[ask.slot] += part
        self._read_rate = (time.perf_counter() - started) / len(part)
        return left - len(part) <= STEP_ROWS

    def _feed(self, ask: Ask, draft: list[int]) -> Feed:
        """The tokens that the draft model has not read: the last ones of the sequence, or of the draft."""
        slot = self.cache.slots[ask.slot]
        return Feed(slot, self._mapped(draft[-1:] or ask.ids[len(slot.tokens) :]))

    def _mapped(self, ids: Sequence[int]) -> list[int]:
        return [token if token < self._own else self._stand_in for token in ids]
