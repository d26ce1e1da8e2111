"""Text in, a stream of text out: prompt, engine, and text again with its figures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lowmem.cards.find import is_card
from lowmem.config import DEFAULT_CONTEXT, SamplingParams, check_sampling
from lowmem.errors import InvalidRequestError
from lowmem.generate.engine import Engine, Progress, context_length
from lowmem.generate.sequence import FinishReason, Token
from lowmem.grammars import GrammarConstraint, Grammars, MatchedText
from lowmem.loading.loader import LoadedModel
from lowmem.models.dialogue import Message, fim_tokens
from lowmem.plan.device import trim_memory
from lowmem.prompts import Prompt, PromptFitter, Snippet, as_messages, encode_prompt, opened
from lowmem.text.stream import StopStrings, TextStream, token_text

_DEFAULT = SamplingParams()  # the settings of StarChat Alpha's model card


class TokenLogprob(NamedTuple):
    """A token of an answer, or of a prompt that is scored."""

    text: str
    logprob: float | None
    """In nats; None for the first token of a prompt, which nothing precedes."""
    top: tuple[tuple[str, float], ...]
    """The most likely tokens with their log-probabilities, best first."""


@dataclass(frozen=True)
class Response:
    """A piece of an answer, or a whole answer, with the figures up to its end."""

    text: str
    """The new piece from `Session.stream`, the whole answer from `Session.complete`."""
    finish_reason: FinishReason | None
    """None if more follows; "stop" (a stop token or a stop string, neither of which is in the text),
    "length" (max_new_tokens) or "context" (no room left)."""
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were in the KV cache already."""
    new_tokens: int
    """All generated tokens, the one that ends the turn included."""
    ttft_seconds: float
    """From the request to the first token."""
    tokens_per_second: float
    """Decode rate, without the first token; 0 for a single token."""
    dropped_turns: int = 0
    """Turns at the start of the messages that were left out to fit the context."""
    cut_tokens: int = 0
    """Tokens at the far ends of a prefix and a suffix that were left out to fit the context."""
    drafted_tokens: int = 0
    """Tokens that speculation drafted."""
    accepted_tokens: int = 0
    """Drafted tokens that were right."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """The tokens that begin in this text, if `SamplingParams.logprobs` is set."""
    stop_text: str = ""
    """The stop string that ended the answer; empty if something else did."""


class Session:
    """Answers prompts with a loaded model, one at a time.

    One engine serves the whole session, so the next turn of a chat computes only what is new.

    context: the tokens that prompt and answer share. Defaults to the planned context, or else to the model's
    positions up to DEFAULT_CONTEXT. speculate: see `Engine`. Raises InvalidRequestError for a context longer
    than the model's positions.
    """

    def __init__(self, loaded: LoadedModel, *, context: int | None = None, speculate: bool = True) -> None:
        self.loaded = loaded
        if context is None:
            context = loaded.context
        if context is None:
            context = min(context_length(loaded.model), DEFAULT_CONTEXT)
        if context < 1:
            raise InvalidRequestError(
                f"a context of {context} tokens is too short", "Use --context with a positive number"
            )
        self.context = context
        on_one_card = is_card(loaded.device) and not loaded.cpu_layers
        self.engine = Engine(
            loaded.model,
            context=context,
            stop_ids=loaded.stop_ids,
            speculate=speculate,
            graphs=on_one_card,
        )
        self.grammars = Grammars(loaded)
        """Of `SamplingParams.grammar`."""
        self._fitter = PromptFitter(loaded, context)

    def encode(
        self, prompt: str | Sequence[Message], *, system: str | None = None, raw: bool = False
    ) -> list[int]:
        """The prompt's token ids; see `encode_prompt`."""
        return encode_prompt(self.loaded, prompt, system=system, raw=raw)

    def count(self, prompt: str | Sequence[Message], system: str | None = None, *, raw: bool = False) -> int:
        """Tokens of a whole prompt, with nothing dropped to fit the context; raises as `encode` does."""
        return len(self.encode(prompt, system=system, raw=raw))

    def stream(
        self,
        prompt: str | Sequence[Message],
        params: SamplingParams = _DEFAULT,
        *,
        system: str | None = None,
        raw: bool = False,
        on_prefill: Progress | None = None,
    ) -> Iterator[Response]:
        """Answer piece by piece; the last response has a finish_reason. Closing the iterator ends the answer.

        If the messages and room for an answer (max_new_tokens, at most a quarter of the context) exceed the
        context, whole turns at the start are left out; the system text and the last turn stay.
        on_prefill(done, total): called as tokens of the prompt are read. Raises InvalidRequestError from this
        call, not from the first next().
        """
        start = time.perf_counter()
        check_sampling(params)
        found = Prompt(self.encode(prompt, system=system, raw=raw))
        if not isinstance(prompt, str) and len(found.ids) + self._room(params) > self.context:
            found = self._fitter.fit_messages(as_messages(prompt, system), self._room(params))
        if params.grammar is not None and not raw and len(found.ids) < self.context:
            found = replace(found, ids=opened(self.loaded, found.ids))
        return self._start(_Request(found, params, start), on_prefill)

    def complete(
        self,
        prompt: str | Sequence[Message],
        params: SamplingParams = _DEFAULT,
        *,
        system: str | None = None,
        raw: bool = False,
        on_prefill: Progress | None = None,
    ) -> Response:
        """The whole answer at once; see `stream`."""
        return join(self.stream(prompt, params, system=system, raw=raw, on_prefill=on_prefill))

    def continue_ids(
        self,
        ids: Sequence[int],
        params: SamplingParams = _DEFAULT,
        *,
        on_prefill: Progress | None = None,
        on_token: Callable[[], None] | None = None,
        end_logprob: bool = False,
    ) -> Generator[Response, None, None]:
        """Continue token ids as they are, piece by piece; nothing is left out to fit the context.

        on_token() is called after each token, even if it adds no text yet; like on_prefill, it may raise to
        end the answer. end_logprob: report the log-probability of the token that ends the turn too. Raises
        InvalidRequestError from this call, also for ids that exceed the context.
        """
        start = time.perf_counter()
        request = _Request(Prompt(list(ids)), params, start, on_token=on_token, end_logprob=end_logprob)
        return self._start(request, on_prefill)

    def fill_in(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams = _DEFAULT,
        *,
        snippets: Sequence[Snippet] | None = None,
        on_prefill: Progress | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> Generator[Response, None, None]:
        """Generate the text between two texts, piece by piece, with the model's fill-in-the-middle tokens.

        The answer ends at any special token. If the texts and room for an answer exceed the context, they are
        cut at the far ends: the prefix gets three quarters of the context, the suffix a quarter, and each
        what the other leaves. snippets: see `PromptFitter.fit_hole`; with a list, even an empty one, both
        texts may be empty. on_token: see `continue_ids`. Raises InvalidRequestError from this call, also for
        a model without these tokens.
        """
        start = time.perf_counter()
        check_sampling(params)
        if not prefix and not suffix and snippets is None:
            raise InvalidRequestError("prefix and suffix are both empty", "Give at least one of the two")
        prompt = self._fitter.fit_hole(prefix, suffix, self._room(params), snippets or ())
        tokenizer = self.loaded.tokenizer
        # No special token is part of a middle; some models end with a file separator.
        specials = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        ends = specials.union(fim_tokens(tokenizer) or ())
        return self._start(_Request(prompt, params, start, ends, on_token), on_prefill)

    def _room(self, params: SamplingParams) -> int:
        """Tokens of the context that are kept free for the answer."""
        return min(params.max_new_tokens, self.context // 4)

    def _start(self, request: _Request, on_prefill: Progress | None) -> Generator[Response, None, None]:
        grammar, tokenizer = request.params.grammar, self.loaded.tokenizer
        constraint = None if grammar is None else self.grammars.constraint(grammar, tokenizer)
        tokens = self.engine.generate(request.prompt.ids, request.params, on_prefill, constraint)
        # Special tokens add no text, so a stop string that spells one is looked for among the ids.
        added = tokenizer.added_tokens_decoder
        spelled = {token for token, entry in added.items() if entry.content in request.params.stop}
        ends = spelled.union(request.ends, self.engine.stop_ids)
        return self._responses(tokens, replace(request, ends=ends, constraint=constraint))

    def _responses(self, tokens: Iterator[Token], request: _Request) -> Generator[Response, None, None]:
        prompt, params = request.prompt, request.params
        text: TextStream | MatchedText = TextStream(self.loaded.tokenizer, params.shown)
        if request.constraint is not None:
            text = request.constraint.text_stream()
        stops = StopStrings(params.stop)
        waiting: list[tuple[int, TokenLogprob]] = []  # each with the place in the text where it begins
        decoded = released = 0  # characters decoded from tokens, and given to the caller
        first = 0.0
        try:
            for count, token in enumerate(tokens, 1):
                now = time.perf_counter()
                first = first or now
                if request.on_token is not None:
                    request.on_token()
                reason = token.finish_reason
                ends = token.id in request.ends
                if token.logprob is not None and (request.end_logprob or not ends):
                    waiting.append((decoded, self._logprob(token, token.logprob)))
                piece = "" if ends else text.push(token.id)
                reason = "stop" if ends else reason
                if reason:
                    piece += text.finish()
                decoded += len(piece)
                piece = stops.push(piece)
                if reason:
                    piece += stops.finish()
                if stops.found:
                    reason = "stop"
                released += len(piece)
                if not piece and not reason:
                    continue
                whole = reason and not stops.found
                begun = [entry for at, entry in waiting if at < (math.inf if whole else released)]
                del waiting[: len(begun)]
                sequence = self.engine.sequence
                assert sequence is not None
                yield Response(
                    text=piece,
                    finish_reason=reason,
                    prompt_tokens=len(prompt.ids),
                    cached_tokens=sequence.cached_tokens,
                    new_tokens=count,
                    ttft_seconds=first - request.start,
                    tokens_per_second=(count - 1) / (now - first) if count > 1 else 0.0,
                    dropped_turns=prompt.dropped_turns,
                    cut_tokens=prompt.cut_tokens,
                    drafted_tokens=sequence.drafted_tokens,
                    accepted_tokens=sequence.accepted_tokens,
                    logprobs=tuple(begun) if params.logprobs is not None else None,
                    stop_text=stops.text,
                )
                if reason:
                    return
        finally:
            # Not left to the garbage collector: the next request needs the engine.
            if isinstance(tokens, Generator):
                tokens.close()
            trim_memory()  # malloc keeps freed pages; how many varies between runs

    def _logprob(self, token: Token, logprob: float) -> TokenLogprob:
        tokenizer = self.loaded.tokenizer
        top = tuple((token_text(tokenizer, other), value) for other, value in token.top)
        return TokenLogprob(token_text(tokenizer, token.id), logprob, top)


@dataclass(frozen=True)
class _Request:
    """An answer to be streamed."""

    prompt: Prompt
    params: SamplingParams
    start: float
    """When the caller asked, by time.perf_counter()."""
    ends: Collection[int] = ()
    """Ids that end the answer and are not part of its text."""
    on_token: Callable[[], None] | None = None
    end_logprob: bool = False
    """Whether the token that ends the turn has a log-probability too."""
    constraint: GrammarConstraint | None = None
    """Of the grammar that the answer must match."""


def join(responses: Iterator[Response]) -> Response:
    """The pieces of one answer as a whole: joined texts and log-probabilities, the figures of the last."""
    pieces = list(responses)
    logprobs = [entry for piece in pieces for entry in piece.logprobs or ()]
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        logprobs=tuple(logprobs) if pieces[-1].logprobs is not None else None,
    )
