"""Token ids in, token ids out: prefill, then decode. Knows nothing of text.

`Engine.generate` is a generator: its first next() is the prefill and gives the first token (the TTFT), each
further one decodes, one token in a forward or, where the text repeats itself, a draft of several at once.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lowmem.config import PREFILL_CHUNK, SamplingParams, check_sampling
from lowmem.errors import InvalidRequestError
from lowmem.generate.attention import use_row_attention
from lowmem.generate.cache import KVCache
from lowmem.generate.lookup import Lookup, Pace
from lowmem.generate.native_step import MOST_ROWS, NativeStep, StepRefused, checked_step, why_not
from lowmem.generate.prefix_store import LEAST_TOKENS, PrefixStore, common_prefix
from lowmem.generate.primitives import keep_few
from lowmem.generate.rearranging import Rearranging
from lowmem.generate.sampling import Choice, Sampler
from lowmem.kernels.quant_linear import QuantLinear

FinishReason = Literal["stop", "length", "context"]
Progress = Callable[[int, int], None]

# A product of several rows may round differently from that of one row. By so much, as a share of the largest
# logit, the gap of the two best logits was seen to move at most, and rounded up: 1.4 eps in bfloat16, 10 eps
# in float32 (600 rows of tiny-starchat). A drafted position that is not clear by more gets its own step.
_ROUNDING = {
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
}


@dataclass(frozen=True)
class Token:
    """One generated token; the last one carries why it is the last.

    finish_reason: "stop" (the id is a stop id), "length" (max_new_tokens reached), "context" (the context is
    full), None while there is more to come. logprob and top (id and log-probability of the likeliest, best
    first): of the model's own distribution, where `SamplingParams.logprobs` asks for them.
    """

    id: int
    finish_reason: FinishReason | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Engine:
    """Answers token ids with a transformers causal LM, one request at a time, and keeps its KV cache.

    A request computes only what differs from what the cache holds. Whatever ends a request (its end, a closed
    iterator, an exception anywhere in a forward) the next one starts from what is known to be right.

    context: the tokens that prompt and answer share. speculate: draft tokens from the text so far where that
    is measured to be faster; the tokens are those that come without. chunk: tokens of a prompt in a forward.
    On a CPU the model's attention becomes `attention.row_attention`, and its decode steps those of
    `native_step` where they are made for it. Raises InvalidRequestError for a context that the model has no
    positions for.
    """

    def __init__(
        self,
        model: Any,
        *,
        context: int,
        stop_ids: Collection[int] = (),
        speculate: bool = True,
        chunk: int = PREFILL_CHUNK,
    ) -> None:
        self._positions = context_length(model)
        if context > self._positions:
            raise InvalidRequestError(
                f"a context of {context} tokens, and the model has {self._positions} positions",
                f"Use --context {self._positions} or less",
            )
        keep_few()
        table = model.get_input_embeddings().weight
        self.model = model
        self.context = context
        self.stop_ids = frozenset(stop_ids)
        self.speculate = speculate
        self.chunk = chunk
        self.decode: Callable[[torch.Tensor], torch.Tensor] | None = None
        """Takes ids [1, 1] to logits [1, vocab] and the cache one on; None: the model, or a native step."""
        self.eager_because = why_not(model)
        """Why decode steps are not native; "" while they are, or have not been tried yet."""
        self.cache = KVCache(int(model.config.get_text_config().num_hidden_layers), context)
        self.store: PrefixStore | None = None
        """Where sequences are kept that the next ones would overwrite; None: nowhere."""
        self.cached_tokens = 0
        """Tokens of the last prompt that the cache held already."""
        self.drafted = 0
        """Tokens of the last answer that were drafted, and of those `accepted` the ones that were right."""
        self.accepted = 0
        self._vocabulary, self._device = int(table.shape[0]), table.device
        # The logits of a whole prompt with a large vocabulary can outweigh the model's activations.
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        # What the cache holds for sure: a forward's tokens join after it has ended, and leave before the
        # cache is cut, so that an interrupt in between leaves the cache with too much, never with another.
        self._held: list[int] = []
        # A CPU's 16-bit product of one row is another kernel than that of several rows, which gives each row
        # the same bits however many there are. Steps of two rows, one of them for nothing, leave the very
        # keys and values that a draft's rows do. (Not so in float32, where what is left is near 1e-6, nor
        # where all linears before the head are our own kernels'.)
        rowwise = self._device.type == "cpu" and use_row_attention(model)
        self._pairs = rowwise and table.dtype is not torch.float32 and not _row_invariant(model)
        self._step: NativeStep | None = None  # made and checked at the first decode step
        self._timed = True  # the last forward took what a forward takes
        self._rearranging = Rearranging(model)  # goes on between tokens until it is done
        self._clean = True  # no step of `decode` was interrupted
        self._pace = Pace()
        self._request = 0

    def generate(
        self, prompt: Sequence[int], params: SamplingParams, on_prefill: Progress | None = None
    ) -> Iterator[Token]:
        """Continue `prompt` (token ids) until something ends it; nothing is computed before the first next().

        on_prefill(done, total): called with the prompt's tokens that are in the cache, after each chunk; what
        was there before counts. Raises InvalidRequestError, from this call, for an empty prompt, an id out of
        the vocabulary, a prompt longer than the context, or sampling settings that mean nothing. The
        iterator raises LowmemError when the model's output is not finite, and RuntimeError when another
        request has been started since.
        """
        check_sampling(params)
        self._check(prompt)
        self._request += 1
        return self._tokens(self._request, list(prompt), params, on_prefill)

    def settle(self) -> None:
        """Have all weights in the order that is read fastest now, as they are after some tokens anyway."""
        self._rearranging.finish()

    @property
    def unsettled(self) -> bool:
        """Whether `settle`, or a little of it by `settle_one`, has something to do."""
        return bool(self._rearranging)

    def settle_one(self) -> None:
        """`settle` for one linear, some hundredths of a second: for who has nothing else to do."""
        self._rearranging.one()

    def meanwhile(self) -> AbstractContextManager[None]:
        """`settle` in a thread, for as long as the caller waits for something else inside: a prompt, say.

        No other call of this engine may be under way, or be made inside.
        """
        return self._rearranging.meanwhile()

    def reset(self) -> None:
        """Forget what the cache holds; its memory stays."""
        self._held.clear()
        self._settle()
        if self.store is not None:
            self.store.clear()

    def _check(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise InvalidRequestError("the prompt is empty", "Give at least one token")
        if len(prompt) > self._positions:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens, the model has positions for {self._positions}",
                "Shorten the prompt",
            )
        if len(prompt) > self.context:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens, the context is {self.context}",
                f"Shorten the prompt, or give --context {len(prompt)} or more, up to {self._positions}",
            )
        if not all(0 <= token < self._vocabulary for token in prompt):
            raise InvalidRequestError(
                f"the prompt has a token id outside of the model's vocabulary of {self._vocabulary}",
                "The tokenizer and the model are not of the same checkpoint",
            )

    def _tokens(
        self, request: int, prompt: list[int], params: SamplingParams, on_prefill: Progress | None
    ) -> Iterator[Token]:
        self._stay(request)
        self.drafted = self.accepted = 0
        self._pace.new_answer()
        sampler = Sampler(params, prompt, self._vocabulary, self._device)
        lookup = Lookup(prompt) if self.speculate else None
        logits = self._prefill(request, prompt, on_prefill)  # [1, vocab]
        draft: list[int] = []  # what was fed behind the last chosen token: logits has 1 + len(draft) rows
        guess: int | None = None  # what a draft would have begun with, had one been made
        count, last, started, spent = 0, -1, 0.0, 0.0
        while True:
            # A native step's rows are those of one-row steps.
            noise = _ROUNDING.get(logits.dtype, 0.0) if draft and self._step is None else 0.0
            choice: Choice | None = None
            for row in range(len(draft) + 1):
                # Not around the yield: what runs between two tokens is the caller's.
                with torch.inference_mode():
                    choice = sampler.choose_clear(logits[row], noise)
                if row == 0 and count:  # the choice has waited for the device
                    spent = time.perf_counter() - started
                    if self._timed:
                        self._pace.took(len(draft) + 1, spent)
                if row < len(draft):
                    guess = draft[row]
                right = choice is not None and choice.id == guess
                if guess is not None:
                    self._pace.saw(right)
                    self.accepted += right and row < len(draft)
                guess = None
                if choice is None:
                    break
                last, count = choice.id, count + 1
                reason = self._reason(last, count, len(prompt), params)
                yield Token(last, reason, choice.logprob, choice.top)
                if reason:
                    return
                self._stay(request)
                if lookup is not None:
                    lookup.append(last)
                if not right:
                    break
            length = len(prompt) + count  # tokens there are; all but the last are to be in the cache
            self._keep(length - 1)
            draft = []
            if lookup is not None and choice is not None:
                # No use in a draft beyond the last token that may come.
                found = lookup.draft(min(params.max_new_tokens - count, self.context + 1 - length) - 1)
                draft = found[: self._pace.length(len(found))]
                guess = found[0] if found else None
            self.drafted += len(draft)
            if self._rearranging:
                self._rearranging.go_on(spent)
            started = time.perf_counter()
            logits = self._forward([last, *draft], decode=True)
            self._held += [last, *draft]

    def _reason(self, token: int, count: int, prompt: int, params: SamplingParams) -> FinishReason | None:
        if token in self.stop_ids:
            return "stop"
        if count == params.max_new_tokens:
            return "length"
        if prompt + count > self.context:  # the token just chosen has no position to be read at
            return "context"
        return None

    def _prefill(self, request: int, prompt: list[int], on_prefill: Progress | None) -> torch.Tensor:
        """Bring the cache to the prompt, a chunk at a time; the logits [1, vocab] after its last token."""
        # The last token is always fed: its logits are not kept.
        common = common_prefix(self._held, prompt[:-1])
        if self.store is not None:
            common = self._exchange(self.store, prompt[:-1], common)
        self._keep(common)
        self.cached_tokens = done = common
        while True:
            part = prompt[done : done + self.chunk]
            logits = self._forward(part, decode=False)
            self._held += part
            done += len(part)
            if on_prefill is not None:
                on_prefill(done, len(prompt))
                self._stay(request)
            if done == len(prompt):
                return logits

    def _exchange(self, store: PrefixStore, prompt: list[int], common: int) -> int:
        """Keep the rows that are about to be cut, and take back more of the prompt than is held, if there is
        more; the tokens of it that are held then."""
        if len(self._held) - common >= LEAST_TOKENS and self.cache.length >= len(self._held):
            store.save(self._held, self.cache)
        if store.longest(prompt) < common + LEAST_TOKENS:
            return common
        self._held.clear()
        self._settle()
        common = store.restore(prompt, self.cache)
        self._held += prompt[:common]
        return common

    def _forward(self, ids: list[int], *, decode: bool) -> torch.Tensor:
        """Feed ids behind what the cache holds; the logits [rows, vocab] after each, or a prefill's last."""
        rows = len(ids) if decode else 1
        self._timed = True
        with torch.inference_mode():
            if decode and self.decode is None and not self.eager_because and rows <= MOST_ROWS:
                native = self._natively(ids)
                if native is not None:
                    return native
            fed = torch.tensor([ids], device=self._device)
            if len(ids) == 1 and self.decode is not None:
                if not self._clean:
                    self._settle()
                self._clean = False
                try:
                    decoded = self.decode(fed)
                    self._clean = True
                    return decoded
                except Exception:  # whatever a compiler or a captured graph raises: the model itself goes on
                    self.decode = None
            self._settle()
            if paired := decode and self._pairs and len(ids) == 1 and len(self._held) + 2 <= self.context:
                fed, rows = fed.expand(1, 2), 2
            keep = {"logits_to_keep": rows} if self._keeps else {}
            output = self.model(input_ids=fed, past_key_values=self.cache, use_cache=True, **keep)
            logits: torch.Tensor = output.logits[0, -rows:]
            if paired:
                self.cache.cut(len(self._held) + 1)
                return logits[:1]
            return logits

    def _natively(self, ids: list[int]) -> torch.Tensor | None:
        """The logits [rows, vocab] of a native step; None, from then on, when there can be none.

        The first is checked against the model itself, in whose place it then stands.
        """
        self._settle()
        try:
            if self._step is not None:
                return self._step.step(ids)
            self._timed = False
            self._step, logits = checked_step(self.model, self.cache, ids)
            return logits
        except (StepRefused, ValueError) as error:
            self._step, self.eager_because = None, str(error)
            return None

    def _keep(self, length: int) -> None:
        """Cut to the first `length` tokens that are held."""
        if length < len(self._held):
            del self._held[length:]
        if self.cache.length != length:
            self._settle()

    @torch.inference_mode()
    def _settle(self) -> None:
        """Make the cache what `_held` says, all layers alike, and ready for the model itself."""
        self.cache.cut(len(self._held))
        if self.cache.fixed:
            self.cache.set_fixed(False)
        self._clean = True

    def _stay(self, request: int) -> None:
        if request != self._request:
            raise RuntimeError("another request has been started on this engine")


def context_length(model: Any) -> int:
    """The number of positions that prompt and answer share; a model without a limit has 2^31 - 1."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else 2**31 - 1


def _row_invariant(model: nn.Module) -> bool:
    """Whether each row is the same to the last bit in all linears before the head, whatever comes with it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | QuantLinear) and m is not head]
    return bool(linears) and all(isinstance(m, QuantLinear) and m.row_invariant for m in linears)
