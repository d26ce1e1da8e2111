"""Token ids in, token ids out: prefill, then decode. Knows nothing of text.

`Engine.generate` is a generator: its first next() runs the prefill and gives the first token (TTFT), each
further one decodes: one token in a step or, where the text repeats itself, a draft of several.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from lowmem.config import PREFILL_CHUNK, SamplingParams, check_sampling
from lowmem.errors import InvalidRequestError
from lowmem.generate.cache.contract import KVCache, Slot
from lowmem.generate.cache.dense import DenseKVCache, reused_layers
from lowmem.generate.constraint import Constraint
from lowmem.generate.decoders.contract import Decoder, Feed, StepOutput
from lowmem.generate.decoders.selection import SelectedDecoder
from lowmem.generate.lookup import Pace
from lowmem.generate.onednn_cache import limit_primitive_caches
from lowmem.generate.position_scaling import rows_at_scale
from lowmem.generate.prefix_store import MIN_TOKENS, PrefixStore, common_prefix
from lowmem.generate.repacking import Repacking
from lowmem.generate.sampling import Sampler
from lowmem.generate.sequence import Sequence, Token
from lowmem.models.embedding import token_table
from lowmem.models.positions import longest_sequence

Progress = Callable[[int, int], None]


class Engine:
    """Answers token ids with a transformers causal LM, one request at a time, and keeps its KV cache.

    A request computes only what differs from what the cache holds. However a request ends (normally, by a
    closed iterator, by an exception anywhere in a forward), the next one starts from rows known to be right.

    context: the tokens that prompt and answer share. speculate: draft tokens from the text so far where that
    is measured to be faster; no token changes. chunk: tokens of a prompt in one forward. graphs: decode with
    CUDA graphs, for a model that is on one card as a whole. Raises InvalidRequestError for a context longer
    than the model's positions.
    """

    def __init__(
        self,
        model: Any,
        *,
        context: int,
        stop_ids: Collection[int] = (),
        speculate: bool = True,
        chunk: int = PREFILL_CHUNK,
        graphs: bool = False,
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
        self.cache: KVCache = DenseKVCache(layers, context, reused=reused_layers(config))
        decoder = SelectedDecoder(model, self.cache, graphs=graphs)
        self.decoder: Decoder = decoder
        self._scaling = decoder.eager.scaling
        self.store: PrefixStore | None = None
        """Keeps the rows of earlier prompts that the next one overwrites; None: they are lost."""
        self.sequence: Sequence | None = None
        """The latest request, with its counters."""
        self.repacking = Repacking(model)
        """Moves weights into the tiled layout; goes on between tokens until all are moved."""
        self._pace = Pace()

    def generate(
        self,
        prompt: abc.Sequence[int],
        params: SamplingParams,
        on_prefill: Progress | None = None,
        constraint: Constraint | None = None,
    ) -> Iterator[Token]:
        """Continue `prompt` (token ids) until something ends it; nothing is computed before the first next().

        on_prefill(done, total): called after each chunk with the prompt's tokens that are in the cache, those
        that were there before included. constraint: which tokens may be chosen; `params.grammar` is not read.
        Raises InvalidRequestError, from this call, for an empty prompt, an
        id outside of the vocabulary, a prompt longer than the context, or invalid sampling settings. The
        iterator raises LowmemError when the model's output is not finite, and RuntimeError when another
        request has been started since.
        """
        check_sampling(params)
        self.check_prompt(prompt)
        ids = list(prompt)
        self.sequence = Sequence(
            ids,
            params,
            self.cache.slots[0],
            Sampler(params, ids, self._vocabulary, self._device, constraint),
            self.stop_ids,
            drafts=self.speculate,
        )
        return self._tokens(self.sequence, on_prefill)

    def reset(self) -> None:
        """Empty the cache and the prefix store; the cache's memory stays."""
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

    def _tokens(self, sequence: Sequence, on_prefill: Progress | None) -> Iterator[Token]:
        try:
            output = StepOutput((self._prefill(sequence, on_prefill),), timed=False)
            rows, started, seconds = 1, 0.0, 0.0
            while True:
                tokens = sequence.choose(output)
                token = next(tokens, None)  # waits for the device
                if started:
                    seconds = time.perf_counter() - started
                    if output.timed:
                        self._pace.took(rows, seconds)
                while token is not None:
                    yield token
                    if token.finish_reason:
                        return
                    self._check_latest(sequence)
                    token = next(tokens, None)
                feed = sequence.next_feed(self._pace)
                if self.repacking:
                    self.repacking.run(seconds)
                rows, started = len(feed.ids), time.perf_counter()
                output = self.decoder.step([feed])
        finally:
            sequence.release()

    def _prefill(self, sequence: Sequence, on_prefill: Progress | None) -> torch.Tensor:
        """Bring the slot to the prompt, a chunk at a time; returns the logits [1, vocab] after its end."""
        self._check_latest(sequence)
        prompt, slot = sequence.prompt, sequence.slot
        # The last token is always fed: its logits are not kept.
        common = common_prefix(slot.tokens, prompt[:-1])
        common = min(common, rows_at_scale(slot.scales, self._scaling.scale(len(prompt))))
        if self.store is not None:
            common = self._exchange(self.store, slot, prompt, common)
        slot.cut(common)
        sequence.cached_tokens = done = common
        while True:
            part = prompt[done : done + self.chunk]
            (logits,) = self.decoder.prefill([Feed(slot, part, len(prompt))])
            done += len(part)
            if on_prefill is not None:
                on_prefill(done, len(prompt))
                self._check_latest(sequence)
            if done == len(prompt):
                return logits

    def _exchange(self, store: PrefixStore, slot: Slot, prompt: list[int], common: int) -> int:
        """Save the rows that are about to be cut, and restore those of the prompt if the store has more.

        Returns the number of the prompt's tokens that the slot then holds.
        """
        if len(slot.tokens) - common >= MIN_TOKENS and slot.length >= len(slot.tokens):
            store.save(slot.tokens, slot)
        kept, scale = prompt[:-1], self._scaling.scale(len(prompt))
        if store.longest(kept, scale) < common + MIN_TOKENS:
            return common
        return store.restore(kept, slot, scale)

    def _check_latest(self, sequence: Sequence) -> None:
        if sequence is not self.sequence:
            raise RuntimeError("another request has been started on this engine")


def context_length(model: Any) -> int:
    """The number of positions that prompt and answer share; 2^31 - 1 for a model without a limit."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "rope_parameters")
    return longest_sequence({name: getattr(config, name, None) for name in names}) or 2**31 - 1
