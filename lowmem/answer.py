"""One answer as it comes: the tokens of a sequence, and from them text with its figures."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from lowmem.config import SamplingParams
from lowmem.generate.engine import Engine
from lowmem.generate.scoring import PromptScores, ScoredToken
from lowmem.generate.sequence import FinishReason, Token
from lowmem.grammars import GrammarConstraint, MatchedText
from lowmem.loading.loader import LoadedModel
from lowmem.plan.device import trim_memory
from lowmem.prompts import Prompt
from lowmem.text.stream import StopStrings, TextStream, token_text


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


@dataclass(frozen=True)
class Request:
    """What an answer is asked for."""

    prompt: Prompt
    params: SamplingParams
    start: float
    """When the caller asked, by time.perf_counter()."""
    ends: Collection[int] = ()
    """Ids that end the answer and are not part of its text."""
    scored: bool = False
    """The prompt's own log-probabilities come first, and that of the token that ends the turn comes too."""
    answered: bool = True
    """False: the prompt is read, and scored if that is asked for."""


class Answer:
    """An answer that an engine computes, beside others or alone.

    Each time that `Engine.advance` has run, `ready` gives the pieces that there are. `close` must follow.
    Raises InvalidRequestError as `Engine.start` does.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        engine: Engine,
        request: Request,
        constraint: GrammarConstraint | None = None,
    ) -> None:
        """constraint: of the grammar that the answer must match."""
        self._tokenizer, self._engine, self._request = loaded.tokenizer, engine, request
        params = request.params
        scores = PromptScores(params.logprobs or 0) if request.scored else None
        self.sequence = engine.start(request.prompt.ids, params, scores=scores, constraint=constraint)
        """Its tokens and counters."""
        self._text: TextStream | MatchedText = TextStream(self._tokenizer, params.shown)
        if constraint is not None:
            self._text = constraint.text_stream()
        self._stops = StopStrings(params.stop)
        self._waiting: list[tuple[int, TokenLogprob]] = []  # each with the place in the text where it begins
        self._decoded = self._released = 0  # characters decoded from tokens, and given to the caller
        self._count, self._first = 0, 0.0

    def ready(self) -> Iterator[Response]:
        """The pieces for the tokens that are there; none follows one that has a finish_reason.

        Raises what ended the sequence, such as LowmemError when the model's output is not finite.
        """
        scores = self.sequence.scores
        while scores is not None and scores.tokens:
            yield self._response("", None, tuple(map(self._named, scores.tokens.popleft())))
        if not self._request.answered and self.sequence.error is None:
            if not self.sequence.reads:
                self._first = time.perf_counter()
                yield replace(self._response("", "length", ()), new_tokens=0)
            return
        while (token := self.sequence.take()) is not None:
            response = self._push(token)
            if response is not None:
                yield response
                if response.finish_reason:
                    return

    def close(self) -> None:
        """End the answer and free its slot."""
        self._engine.end(self.sequence)
        trim_memory()  # malloc keeps freed pages; how many varies between runs

    def _push(self, token: Token) -> Response | None:
        """The piece of text that a token completes, if any."""
        self._count += 1
        self._first = self._first or time.perf_counter()
        reason = token.finish_reason
        ends = token.id in self._request.ends
        if token.logprob is not None and (self._request.scored or not ends):
            self._waiting.append((self._decoded, self._named(token)))
        piece = "" if ends else self._text.push(token.id)
        reason = "stop" if ends else reason
        if reason:
            piece += self._text.finish()
        self._decoded += len(piece)
        piece = self._stops.push(piece)
        if reason:
            piece += self._stops.finish()
        if self._stops.found:
            reason = "stop"
        self._released += len(piece)
        if not piece and not reason:
            return None
        whole = reason and not self._stops.found
        edge = math.inf if whole else self._released
        begun = [entry for at, entry in self._waiting if at < edge]
        del self._waiting[: len(begun)]
        return self._response(piece, reason, tuple(begun))

    def _response(
        self, text: str, reason: FinishReason | None, logprobs: tuple[TokenLogprob, ...]
    ) -> Response:
        prompt, sequence, now = self._request.prompt, self.sequence, time.perf_counter()
        return Response(
            text=text,
            finish_reason=reason,
            prompt_tokens=len(prompt.ids),
            cached_tokens=sequence.cached_tokens,
            new_tokens=self._count,
            ttft_seconds=self._first - self._request.start if self._first else 0.0,
            tokens_per_second=(self._count - 1) / (now - self._first) if self._count > 1 else 0.0,
            dropped_turns=prompt.dropped_turns,
            cut_tokens=prompt.cut_tokens,
            drafted_tokens=sequence.drafted_tokens,
            accepted_tokens=sequence.accepted_tokens,
            logprobs=logprobs if self._request.params.logprobs is not None else None,
            stop_text=self._stops.text,
        )

    def _named(self, token: Token | ScoredToken) -> TokenLogprob:
        """A token's log-probabilities with the texts of the tokens."""
        top = tuple((token_text(self._tokenizer, other), value) for other, value in token.top)
        return TokenLogprob(token_text(self._tokenizer, token.id), token.logprob, top)


def join(responses: Iterator[Response]) -> Response:
    """The pieces of one answer as a whole: joined texts and log-probabilities, the figures of the last."""
    pieces = list(responses)
    logprobs = [entry for piece in pieces for entry in piece.logprobs or ()]
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        logprobs=tuple(logprobs) if pieces[-1].logprobs is not None else None,
    )
