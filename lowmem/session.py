"""Text in, a stream of text out: prompt, engine, and text again with its figures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from lowmem.answer import Answer, Request, Response, TokenLogprob, join
from lowmem.cards.find import is_card
from lowmem.config import DEFAULT_CONTEXT, SamplingParams, check_sampling
from lowmem.errors import InvalidRequestError
from lowmem.generate.engine import Engine, Progress
from lowmem.grammars import Grammars
from lowmem.loading.loader import LoadedModel
from lowmem.models.dialogue import Message, fim_tokens
from lowmem.models.positions import context_length
from lowmem.models.vocabulary import stand_in
from lowmem.prompts import Prompt, PromptFitter, Snippet, as_messages, encode_prompt, opened

__all__ = ["Response", "Session", "TokenLogprob", "join"]

_DEFAULT = SamplingParams()  # the settings of StarChat Alpha's model card


class Session:
    """Answers prompts with a loaded model.

    One engine serves the whole session, so the next turn of a chat computes only what is new.

    slots: answers at once, at most; with one, an answer ends when the next begins. context: the tokens that
    prompt and answer share. Defaults to the planned context, or else to the model's positions up to
    DEFAULT_CONTEXT. speculate: see `Engine`. Raises InvalidRequestError for a context longer than the model's
    positions.
    """

    def __init__(
        self, loaded: LoadedModel, *, context: int | None = None, slots: int = 1, speculate: bool = True
    ) -> None:
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
        self.engine = Engine(
            loaded.model,
            context=context,
            slots=slots,
            stop_ids=loaded.stop_ids,
            speculate=speculate,
        )
        if loaded.draft is not None and speculate:
            self.engine.use_draft(loaded.draft.model, stand_in(loaded.draft.tokenizer))
        if is_card(loaded.device) and not loaded.cpu_layers:
            self.engine.use_graphs()
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
        return self._responses(self._start(Request(found, params, start)), on_prefill)

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

    def continue_ids(self, ids: Sequence[int], params: SamplingParams = _DEFAULT) -> Iterator[Response]:
        """Continue token ids as they are, piece by piece; nothing is left out to fit the context.

        Raises InvalidRequestError from this call, also for ids that exceed the context.
        """
        return self._responses(self.begin(ids, params), None)

    def complete_each(
        self, requests: Iterable[tuple[Sequence[int], SamplingParams]]
    ) -> Iterator[tuple[int, Response]]:
        """Answer many requests, as many at once as there are slots.

        requests: (token ids, settings), as of `continue_ids`; one is taken whenever a slot is free. Yields
        (the request's number, its whole answer) in the order in which answers end. Raises as `begin` does,
        and what ended an answer; then the others end too.
        """
        waiting, running = enumerate(requests), dict[int, tuple[Answer, list[Response]]]()
        try:
            while True:
                while self.engine.free and (entry := next(waiting, None)) is not None:
                    running[entry[0]] = self.begin(*entry[1]), []
                if not running:
                    return
                self.engine.advance()
                for number, (answer, pieces) in list(running.items()):
                    pieces += answer.ready()
                    if pieces and pieces[-1].finish_reason:
                        del running[number]
                        answer.close()
                        yield number, join(iter(pieces))
        finally:
            for answer, _ in running.values():
                answer.close()

    def begin(
        self,
        ids: Sequence[int],
        params: SamplingParams = _DEFAULT,
        *,
        scored: bool = False,
        answered: bool = True,
    ) -> Answer:
        """Begin to continue token ids, beside other answers: `engine.advance` then computes all of them.

        scored: the log-probabilities of the prompt come first. answered: False asks for those alone. Raises
        as `continue_ids` does.
        """
        start = time.perf_counter()
        return self._start(Request(Prompt(list(ids)), params, start, scored=scored, answered=answered))

    def fill_in(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams = _DEFAULT,
        *,
        snippets: Sequence[Snippet] | None = None,
        on_prefill: Progress | None = None,
    ) -> Iterator[Response]:
        """Generate the text between two texts, piece by piece, with the model's fill-in-the-middle tokens.

        The answer ends at any special token. If the texts and room for an answer exceed the context, they are
        cut at the far ends: the prefix gets three quarters of the context, the suffix a quarter, and each
        what the other leaves. snippets: see `PromptFitter.fit_hole`; with a list, even an empty one, both
        texts may be empty. Raises InvalidRequestError from this call, also for a model without these tokens.
        """
        return self._responses(self.begin_hole(prefix, suffix, params, snippets=snippets), on_prefill)

    def begin_hole(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams = _DEFAULT,
        *,
        snippets: Sequence[Snippet] | None = None,
        answered: bool = True,
    ) -> Answer:
        """Begin to fill in the text between two texts, beside other answers; see `fill_in` and `begin`.

        answered: False only reads the prompt into the KV cache.
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
        return self._start(Request(prompt, params, start, ends, answered=answered))

    def _room(self, params: SamplingParams) -> int:
        """Tokens of the context that are kept free for the answer."""
        return min(params.max_new_tokens, self.context // 4)

    def _start(self, request: Request) -> Answer:
        grammar, tokenizer = request.params.grammar, self.loaded.tokenizer
        constraint = None if grammar is None else self.grammars.constraint(grammar, tokenizer)
        # Special tokens add no text, so a stop string that spells one is looked for among the ids.
        added = tokenizer.added_tokens_decoder
        spelled = {token for token, entry in added.items() if entry.content in request.params.stop}
        ends = spelled.union(request.ends, self.engine.stop_ids)
        return Answer(self.loaded, self.engine, replace(request, ends=ends), constraint)

    def _responses(self, answer: Answer, on_prefill: Progress | None) -> Iterator[Response]:
        """The pieces of an answer, computed as they are asked for."""
        sequence, told = answer.sequence, -1
        try:
            while True:
                for response in answer.ready():
                    yield response
                    if response.finish_reason:
                        return
                self.engine.advance()
                if on_prefill is not None and sequence.slot is not None and sequence.read != told:
                    told = sequence.read
                    on_prefill(told, len(sequence.prompt))
        finally:
            answer.close()
