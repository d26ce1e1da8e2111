"""Text in, a stream of text out: dialogue template, tokens, engine, and text again with its figures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lowmem.checkpoint.files.reading import one_line
from lowmem.config import DEFAULT_CONTEXT, SamplingParams, check_sampling
from lowmem.errors import InvalidRequestError
from lowmem.generate.compiled import default_decode
from lowmem.generate.engine import Engine, FinishReason, Progress, Token, context_length
from lowmem.loading.loader import LoadedModel
from lowmem.models.dialogue import (
    ROLES,
    Message,
    encode_plain,
    fim_tokens,
    first_turn,
    share_room,
    split_turns,
)
from lowmem.models.template import apply_template
from lowmem.plan.device import trim_memory
from lowmem.text.stream import StopStrings, TextStream, token_text
from lowmem.text.tokenizing import encode

_CARD = SamplingParams()  # the settings of StarChat Alpha's card
_PROBE = Message("user", "x")  # stands for a last message where the tokens of one turn are counted


class TokenLogprob(NamedTuple):
    """A token of an answer: its text, its log-probability (nats), and the likeliest tokens with theirs."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Response:
    """A piece of an answer, or a whole one, with the figures up to its end.

    text: the new piece from `Session.stream`, the whole answer from `Session.complete`. finish_reason:
    None while there is more to come; "stop" (a stop token or a stop string, neither of which is text),
    "length" (max_new_tokens) or "context" (no room left). prompt_tokens: what the model was given, of which
    cached_tokens were in the KV cache already. new_tokens: all that were generated, the one that ends the
    turn included. ttft_seconds: from the request to the first token. tokens_per_second: of the tokens after
    the first; 0 where there is none. dropped_turns: turns at the start of the messages that were left out to
    fit the context. cut_tokens: tokens at the far ends of a prefix and a suffix that were. drafted_tokens,
    accepted_tokens: of speculation. logprobs: those of the tokens that begin in this text, if asked for.
    """

    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    ttft_seconds: float
    tokens_per_second: float
    dropped_turns: int = 0
    cut_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class _Request:
    """What the engine is to continue, and what became of the text on the way to it."""

    ids: list[int]
    dropped_turns: int = 0
    cut_tokens: int = 0


class Session:
    """Answers prompts with a loaded model, one at a time.

    One engine serves the session's whole life, so that the next turn of a chat computes only what is new.
    """

    def __init__(self, loaded: LoadedModel, *, context: int | None = None, speculate: bool = True) -> None:
        """`context`: tokens that prompt and answer share; the planned ones unless given, else the model's
        positions up to DEFAULT_CONTEXT. Raises InvalidRequestError for more than the model has.
        """
        self.loaded = loaded
        if context is None:
            context = loaded.context
        if context is None:
            context = min(context_length(loaded.model), DEFAULT_CONTEXT)
        if context < 1:
            raise InvalidRequestError(
                f"a context of {context} tokens is asked for", "Use --context with a positive number"
            )
        self.context = context
        self.engine = Engine(loaded.model, context=context, stop_ids=loaded.stop_ids, speculate=speculate)
        if loaded.device.type == "cuda" and not loaded.cpu_layers:
            self.engine.decode, _ = default_decode(loaded.model, self.engine.cache)
        self._counted: dict[tuple[Message, ...], tuple[int, int]] = {}  # of the last dialogue's past turns

    def encode(
        self, prompt: str | Sequence[Message], *, system: str | None = None, raw: bool = False
    ) -> list[int]:
        """The token ids that the model is given; see `encode_prompt`."""
        return encode_prompt(self.loaded, prompt, system=system, raw=raw)

    def count(self, prompt: str | Sequence[Message], system: str | None = None, *, raw: bool = False) -> int:
        """Tokens of a whole prompt, with nothing dropped to fit the context; raises as `encode` does."""
        return len(self.encode(prompt, system=system, raw=raw))

    def stream(
        self,
        prompt: str | Sequence[Message],
        params: SamplingParams = _CARD,
        *,
        system: str | None = None,
        raw: bool = False,
        on_prefill: Progress | None = None,
    ) -> Iterator[Response]:
        """Answer piece by piece; the last response has a finish_reason. Closing the iterator ends it all.

        Where messages and room for an answer (max_new_tokens, at most a quarter of the context) do not fit
        the context, whole turns at the start are left out; the system text and the last turn stay.
        on_prefill(done, all): tokens of the prompt that have been read.
        The request is checked at once: InvalidRequestError comes from here, not from the first next().
        """
        start = time.perf_counter()
        check_sampling(params)
        ids = self.encode(prompt, system=system, raw=raw)
        request = _Request(ids)
        if not isinstance(prompt, str) and len(ids) + self._room(params) > self.context:
            request = self._drop_turns(_messages(prompt, system), params)
        return self._start(request, params, start, on_prefill)

    def complete(
        self,
        prompt: str | Sequence[Message],
        params: SamplingParams = _CARD,
        *,
        system: str | None = None,
        raw: bool = False,
        on_prefill: Progress | None = None,
    ) -> Response:
        """The whole answer at once; as `stream`."""
        return join(self.stream(prompt, params, system=system, raw=raw, on_prefill=on_prefill))

    def continue_ids(
        self,
        ids: Sequence[int],
        params: SamplingParams = _CARD,
        *,
        on_prefill: Progress | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> Iterator[Response]:
        """Continue token ids as they are, piece by piece; nothing is left out to fit the context.

        on_token() is called after each token, also where no text comes of it yet; as on_prefill, it may raise
        to end the answer. Raises InvalidRequestError at once, also for ids that the context has no room for.
        """
        start = time.perf_counter()
        return self._start(_Request(list(ids)), params, start, on_prefill, on_token=on_token)

    def fill_in(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams = _CARD,
        *,
        on_prefill: Progress | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> Iterator[Response]:
        """Write what belongs between two texts, piece by piece, with the model's own tokens for it.

        The answer ends at any special token. What does not fit beside the room for an answer is cut at the
        far ends: three quarters of the context go to the prefix, a quarter to the suffix, and what one does
        not need to the other. on_token: see `continue_ids`. Raises InvalidRequestError at once, also for a
        model without such tokens.
        """
        start = time.perf_counter()
        check_sampling(params)
        tokenizer = self.loaded.tokenizer
        markers = fim_tokens(tokenizer)
        if markers is None:
            raise InvalidRequestError(
                "this model has no fill-in-the-middle tokens",
                "Use a model trained for it (StarCoder's family has them), or ask in words with lowmem run",
            )
        if not prefix and not suffix:
            raise InvalidRequestError(
                "there is no text before or after the hole", "Give at least one of the two"
            )
        room = self.context - self._room(params) - len(markers)
        if room < 1:
            raise InvalidRequestError(
                f"a context of {self.context} tokens has no room for a text with a hole",
                "Use a larger --context",
            )
        before, after = encode_plain(tokenizer, prefix), encode_plain(tokenizer, suffix)
        kept_before, kept_after = share_room(len(before), len(after), room)
        request = _Request(
            [
                markers[0],
                *before[len(before) - kept_before :],
                markers[2],
                *after[:kept_after],
                markers[1],
            ],
            cut_tokens=len(before) + len(after) - kept_before - kept_after,
        )
        specials = {
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        }  # none is part of a middle; some models end with a file separator
        return self._start(request, params, start, on_prefill, specials.union(markers), on_token)

    def _room(self, params: SamplingParams) -> int:
        """Tokens of the context that are kept free for the answer."""
        return min(params.max_new_tokens, self.context // 4)

    def _drop_turns(self, messages: list[Message], params: SamplingParams) -> _Request:
        """The messages with as many turns left out as `first_turn` says; see `stream`."""
        head = [message for message in messages[:1] if message.role == "system"]
        turns = split_turns(messages[len(head) :])
        room = self._room(params)
        probe = len(_encode_messages(self.loaded, [_PROBE]))
        system = len(_encode_messages(self.loaded, [*head, _PROBE])) - probe
        self._counted = {turn: self._counted.get(turn) or self._count_turn(turn) for turn in turns[:-1]}
        wholes, questions = [], []
        for turn in turns[:-1]:
            whole, question = self._counted[turn]
            wholes.append(whole)
            questions.append(question)
        questions.append(len(_encode_messages(self.loaded, list(turns[-1]))) if turns else 0)
        first = first_turn(wholes, questions, self.context - room - system)
        while True:
            ids = _encode_messages(
                self.loaded, [*head, *(message for turn in turns[first:] for message in turn)]
            )
            # A chat template may make more of a dialogue than of its turns; then one more goes.
            if len(ids) + room <= self.context or first >= len(turns) - 1:
                break
            first += 1
        if len(ids) > self.context:
            raise InvalidRequestError(
                f"the system text and the last message have {len(ids)} tokens, "
                f"the context has room for {self.context}",
                "Shorten them, or use a larger --context if the model has the positions",
            )
        return _Request(ids, dropped_turns=first)

    def _count_turn(self, turn: tuple[Message, ...]) -> tuple[int, int]:
        """(tokens that a turn adds to the messages behind it, tokens of a prompt with its question alone).

        Both as if there were no system text; exact for our own dialogue, where turns only add up.
        """
        probe = len(_encode_messages(self.loaded, [_PROBE]))
        whole = len(_encode_messages(self.loaded, [*turn, _PROBE])) - probe
        return whole, len(_encode_messages(self.loaded, list(turn[:1])))

    def _start(
        self,
        request: _Request,
        params: SamplingParams,
        start: float,
        on_prefill: Progress | None,
        ends: Collection[int] = (),
        on_token: Callable[[], None] | None = None,
    ) -> Iterator[Response]:
        tokens = self.engine.generate(request.ids, params, on_prefill)
        # Special tokens are no text, so a stop string that spells one is looked for among the ids.
        added = self.loaded.tokenizer.added_tokens_decoder
        spelled = {token for token, entry in added.items() if entry.content in params.stop}
        return self._responses(tokens, request, params, start, spelled.union(ends), on_token)

    def _responses(
        self,
        tokens: Iterator[Token],
        request: _Request,
        params: SamplingParams,
        start: float,
        ends: set[int],
        on_token: Callable[[], None] | None = None,
    ) -> Generator[Response, None, None]:
        """Tokens → responses. `ends`: ids that end this answer beside the engine's stop ids."""
        text, stops = TextStream(self.loaded.tokenizer), StopStrings(params.stop)
        waiting: list[tuple[int, TokenLogprob]] = []  # each with the place in the text where it begins
        decoded = released = 0  # characters of text: that came from tokens, and that were given out
        first = 0.0
        try:
            for count, token in enumerate(tokens, 1):
                now = time.perf_counter()
                first = first or now
                if on_token is not None:
                    on_token()
                reason = token.finish_reason
                piece = ""
                if reason == "stop" or token.id in ends:
                    reason = "stop"
                else:
                    if token.logprob is not None:
                        waiting.append((decoded, self._logprob(token, token.logprob)))
                    piece = text.push(token.id)
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
                yield Response(
                    text=piece,
                    finish_reason=reason,
                    prompt_tokens=len(request.ids),
                    cached_tokens=self.engine.cached_tokens,
                    new_tokens=count,
                    ttft_seconds=first - start,
                    tokens_per_second=(count - 1) / (now - first) if count > 1 else 0.0,
                    dropped_turns=request.dropped_turns,
                    cut_tokens=request.cut_tokens,
                    drafted_tokens=self.engine.drafted,
                    accepted_tokens=self.engine.accepted,
                    logprobs=tuple(begun) if params.logprobs is not None else None,
                )
                if reason:
                    return
        finally:
            # Not left to the garbage collector: the engine is to be free for the next request.
            if isinstance(tokens, Generator):
                tokens.close()
            trim_memory()  # what an answer freed stays with malloc, more of it in some hours than in others

    def _logprob(self, token: Token, logprob: float) -> TokenLogprob:
        tokenizer = self.loaded.tokenizer
        top = tuple((token_text(tokenizer, other), value) for other, value in token.top)
        return TokenLogprob(token_text(tokenizer, token.id), logprob, top)


def encode_prompt(
    loaded: LoadedModel, prompt: str | Sequence[Message], *, system: str | None = None, raw: bool = False
) -> list[int]:
    """The token ids that the model is given.

    prompt: one question, or the messages so far. The dialogue format of the model's tokens is applied, or
    else the tokenizer's own chat template, or else none; what a message spells is text and never a marker.
    raw: no template in any case; the text is continued.
    Raises InvalidRequestError where a system text or several messages have no template to go into.
    """
    tokenizer = loaded.tokenizer
    if raw or (loaded.dialogue is None and not tokenizer.chat_template):
        if not isinstance(prompt, str) or system is not None:
            reason = "--raw applies none" if raw else "this model has none"
            raise InvalidRequestError(
                f"messages need a dialogue template, and {reason}", "Give a prompt alone"
            )
        return encode(tokenizer, prompt)
    return _encode_messages(loaded, _messages(prompt, system))


def _encode_messages(loaded: LoadedModel, messages: list[Message]) -> list[int]:
    tokenizer, dialogue = loaded.tokenizer, loaded.dialogue
    if dialogue is not None:
        # The model writes the newline before an answer itself: an answer given back has it already.
        given = [
            replace(turn, content=turn.content.removeprefix("\n")) if turn.role == "assistant" else turn
            for turn in messages
        ]
        return list(dialogue.encode(tokenizer, given, add_generation_prompt=True))
    for message in messages:
        if message.role not in ROLES:  # a template may paste it into a marker
            raise InvalidRequestError(f"{message.role!r} is not a role", f"Use one of {', '.join(ROLES)}")
    try:
        return apply_template(
            tokenizer,
            [{"role": message.role, "content": message.content} for message in messages],
            add_generation_prompt=True,
            sanitize_control_tokens=True,
        )
    except InvalidRequestError:  # the tokenizer's
        raise
    except Exception as error:  # the template is the checkpoint's, and raises what it likes
        raise InvalidRequestError(
            f"the model's chat template refuses the messages: {one_line(error)}",
            "Leave --system out, or the template with --raw",
        ) from error


def join(responses: Iterator[Response]) -> Response:
    """The pieces of one answer as a whole: their texts and log-probabilities, the figures of the last."""
    pieces = list(responses)
    logprobs = [entry for piece in pieces for entry in piece.logprobs or ()]
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        logprobs=tuple(logprobs) if pieces[-1].logprobs is not None else None,
    )


def _messages(prompt: str | Sequence[Message], system: str | None) -> list[Message]:
    messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    return messages if system is None else [Message("system", system), *messages]
