"""Token ids in, token ids out: prefill, then decode, for several sequences at once. Knows nothing of text.

`Engine.advance` is one piece of work: a part of one prompt, or a step of all sequences that wait for one.
Each sequence gets one token of a step or, where its text repeats itself, a draft of several.
`Engine.generate` is a generator for one request: its first next() runs the prefill and gives the first token
(TTFT).
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable, Collection, Iterator
from typing import Any

from lowmem.config import PREFILL_CHUNK, SamplingParams, check_sampling
from lowmem.errors import InvalidRequestError
from lowmem.generate.cache.contract import KVCache
from lowmem.generate.cache.dense import DenseKVCache, reused_layers
from lowmem.generate.constraint import Constraint
from lowmem.generate.decoders.contract import Decoder
from lowmem.generate.decoders.selection import SelectedDecoder
from lowmem.generate.draft_model import DraftModel
from lowmem.generate.drafting import Drafting
from lowmem.generate.onednn_cache import limit_primitive_caches
from lowmem.generate.prefix_store import PrefixStore
from lowmem.generate.repacking import Repacking
from lowmem.generate.sampling import Sampler
from lowmem.generate.scoring import SCORED_ROWS, PromptScores
from lowmem.generate.sequence import Sequence, Token
from lowmem.generate.slots import Slots
from lowmem.models.embedding import token_table
from lowmem.models.positions import context_length

Progress = Callable[[int, int], None]


READ_SECONDS = 1.0
"""How long the others wait for a part of a prompt, if it has more than LEAST_READ tokens."""
LEAST_READ = 16
"""Fewer tokens in a part take much longer each: half of them take almost as long."""


class Engine:
    """Answers token ids with a transformers causal LM, and keeps its KV cache.

    A request computes only what differs from what the cache holds. However a request ends (normally, by a
    closed iterator, by an exception anywhere in a forward), the next one starts from rows known to be right.
    What a sequence gets does not depend on the others, as far as the decoder says so.

    context: the tokens that prompt and answer share. slots: sequences at once, at most. speculate: draft
    tokens from the text so far where that is measured to be faster; no token changes. chunk: tokens of a
    prompt in one forward. Raises InvalidRequestError for a context longer than the model's positions.
    """

    def __init__(
        self,
        model: Any,
        *,
        context: int,
        slots: int = 1,
        stop_ids: Collection[int] = (),
        speculate: bool = True,
        chunk: int = PREFILL_CHUNK,
    ) -> None:
        self._positions = context_length(model)
        if context > self._positions:
            raise InvalidRequestError(
                f"the context of {context} tokens exceeds the model's {self._positions} positions",
                f"Use --context {self._positions} or less",
            )
        limit_primitive_caches()
        table = token_table(model)
        self._vocabulary, self._device = table.vocabulary, table.device
        self.model = model
        self.context = context
        self.stop_ids = frozenset(stop_ids)
        self.speculate = speculate
        self.chunk = chunk
        config = model.config.get_text_config()
        layers = int(config.num_hidden_layers)
        self.cache: KVCache = DenseKVCache(layers, context, slots, reused=reused_layers(config))
        decoder = SelectedDecoder(model, self.cache)
        self.decoder: Decoder = decoder
        self._slots = Slots(self.cache, decoder.eager.scaling)
        self.sequence: Sequence | None = None
        """The latest request, with its counters."""
        self.repacking = Repacking(model)
        """Moves weights into the tiled layout; goes on between tokens until all are moved."""
        self._active: list[Sequence] = []  # in the order in which they started
        self._turns = 0  # parts of prompts that were read
        self._read_last = False
        self._read_rate = 0.0  # tokens/s, of the latest part
        self._step_seconds = 0.0  # of the latest step
        self.drafting = Drafting()
        """Drafts for the steps, of a draft model too if there is one."""

    def use_graphs(self) -> None:
        """Decode with graphs of the card from now on, for a model that is on one card as a whole."""
        self.decoder = SelectedDecoder(self.model, self.cache, graphs=True)
        if self.drafting.model is not None:
            self.drafting.model.use_graphs()

    def use_draft(self, model: Any, stand_in: int = 0) -> DraftModel:
        """Let a small model draft, where the text itself gives nothing; see `DraftModel`."""
        self.drafting.model = DraftModel(
            model,
            context=self.context,
            slots=len(self.cache.slots),
            vocabulary=self._vocabulary,
            stand_in=stand_in,
        )
        return self.drafting.model

    def start(
        self,
        prompt: abc.Sequence[int],
        params: SamplingParams,
        *,
        scores: PromptScores | None = None,
        constraint: Constraint | None = None,
    ) -> Sequence:
        """Begin to continue `prompt` (token ids); `advance` then computes, and `end` must follow.

        If no slot is free, the sequence that started first fails. scores: receives the log-probabilities of
        the prompt's own tokens. constraint: which tokens may be chosen; `params.grammar` is not read. Raises
        InvalidRequestError for an empty prompt, an id outside of the
        vocabulary, a prompt longer than the context, or invalid sampling settings.
        """
        check_sampling(params)
        self.check_prompt(prompt)
        ids = list(prompt)
        sequence = Sequence(
            ids,
            params,
            Sampler(params, ids, self._vocabulary, self._device, constraint),
            self.stop_ids,
            drafts=self.speculate,
            scores=scores,
        )
        while not self.free:
            oldest = self._active[0]
            oldest.fail(RuntimeError("another request has been started on this engine"))
            self.end(oldest)
        sequence.proposed.rate = self.drafting.rate
        self._active.append(sequence)
        self.sequence = sequence
        return sequence

    def advance(self) -> None:
        """Read a part of one prompt, or decode a step of all sequences that wait for a token.

        Prompts take turns, and so do prompts and steps. An error of one sequence is kept in its `error`.
        """
        reading = [sequence for sequence in self._active if sequence.reads]
        waiting = [sequence for sequence in self._active if sequence.waits]
        self._read_last = bool(reading) and not (waiting and self._read_last)
        if self._read_last:
            self._read(reading)
        elif waiting:
            self._step(waiting)

    def end(self, sequence: Sequence) -> None:
        """Free the sequence's slot; the rows stay for prompts that begin like it."""
        self._slots.release(sequence)
        if sequence in self._active:
            self._active.remove(sequence)
        sequence.release()

    @property
    def free(self) -> int:
        """How many more sequences can start now."""
        return len(self.cache.slots) - len(self._active)

    @property
    def store(self) -> PrefixStore | None:
        """Keeps the rows of earlier prompts that the next one overwrites; None: they are lost."""
        return self._slots.store

    @store.setter
    def store(self, store: PrefixStore | None) -> None:
        self._slots.store = store

    def generate(
        self, prompt: abc.Sequence[int], params: SamplingParams, on_prefill: Progress | None = None
    ) -> Iterator[Token]:
        """Continue `prompt` (token ids) until something ends it; nothing is computed before the first next().

        on_prefill(done, total): called after each chunk with the prompt's tokens that are in the cache, those
        that were there before included. Raises as `start` does, from this call. The iterator raises
        LowmemError when the model's output is not finite, and RuntimeError when its slot was needed for
        another request.
        """
        return self._tokens(self.start(prompt, params), on_prefill)

    def _tokens(self, sequence: Sequence, on_prefill: Progress | None) -> Iterator[Token]:
        try:
            while True:
                token = sequence.take()
                if token is not None:
                    yield token
                    if token.finish_reason:
                        return
                    continue
                read = sequence.read if sequence.slot is not None else -1
                self.advance()
                if on_prefill is not None and sequence.slot is not None and sequence.read != read:
                    on_prefill(sequence.read, len(sequence.prompt))
        finally:
            self.end(sequence)

    def _read(self, reading: list[Sequence]) -> None:
        """Read a part of the prompt that has waited longest, of those that can go on."""
        for sequence in sorted(reading, key=lambda one: one.turn):
            try:
                if sequence.slot is None and not self._slots.take(sequence, reading):
                    continue
                self._turns += 1
                sequence.turn = self._turns
                started = time.perf_counter()
                feed = sequence.part(self._part_rows(sequence))
                (logits,) = self.decoder.prefill([feed])
                sequence.has_read(feed, logits)
                self._read_rate = len(feed.ids) / max(time.perf_counter() - started, 1e-9)
            except Exception as error:
                sequence.fail(error)
            return

    def _part_rows(self, sequence: Sequence) -> int:
        """How many tokens of a prompt to read at once."""
        most = min(self.chunk, SCORED_ROWS) if sequence.scores is not None else self.chunk
        if len(self.cache.slots) == 1:
            return most
        return min(most, max(LEAST_READ, int(self._read_rate * READ_SECONDS) // LEAST_READ * LEAST_READ))

    def _step(self, waiting: list[Sequence]) -> None:
        """One step of these sequences, each with its draft."""
        if self.repacking:
            self.repacking.run(self._step_seconds)
        feeds = self.drafting.feeds(waiting)
        started = time.perf_counter()
        try:
            output = self.decoder.step(feeds)
        except Exception as error:
            for sequence in waiting:
                sequence.fail(error)
            return
        for sequence, logits in zip(waiting, output.logits, strict=True):
            try:
                sequence.choose(logits, output.rounding)  # waits for the device
            except Exception as error:
                sequence.fail(error)
        self._step_seconds = time.perf_counter() - started
        self.drafting.took(len(waiting), self._step_seconds, timed=output.timed)

    def reset(self) -> None:
        """Empty the cache and the prefix store; the cache's memory stays."""
        for sequence in list(self._active):
            self.end(sequence)
        self.cache.reset()
        if self.store is not None:
            self.store.clear()

    def check_prompt(self, prompt: abc.Sequence[int]) -> None:
        """Raise InvalidRequestError for a prompt that `generate` would refuse."""
        if not prompt:
            raise InvalidRequestError("the prompt is empty", "Give at least one token")
        if len(prompt) > self._positions:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens; the model has positions for {self._positions}",
                "Shorten the prompt",
            )
        if len(prompt) > self.context:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens; the context is {self.context}",
                f"Shorten the prompt, or use --context {len(prompt)} or more, up to {self._positions}",
            )
        if not all(0 <= token < self._vocabulary for token in prompt):
            raise InvalidRequestError(
                f"the prompt has a token id outside of the model's vocabulary of {self._vocabulary}",
                "Use the tokenizer of the model's checkpoint",
            )
