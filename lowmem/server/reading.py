"""Turns a request into work for the model: messages into token ids, fields into sampling parameters."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lowmem.config import Grammar, SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.grammars import Grammars
from lowmem.loading.loader import LoadedModel
from lowmem.models.dialogue import fim_tokens
from lowmem.models.embedding import token_table
from lowmem.prompts import encode_prompt, opened
from lowmem.server.api_errors import ApiError, invalid, invalid_request, short, too_long
from lowmem.server.calls import CallParser
from lowmem.server.fields import CHAT, TEXT, check_others
from lowmem.server.formats import requested_grammar
from lowmem.server.infill import InfillRequest
from lowmem.server.protocol import MOST_ANSWERS, ChatRequest, CompletionRequest, SamplingFields
from lowmem.server.responses import ResponsesRequest, as_asked, as_chat
from lowmem.server.tokens import DetokenizeRequest, TokenizeRequest, detokenized, tokenized
from lowmem.server.tools import ToolUse, tools_of
from lowmem.server.turns import encode_turns
from lowmem.server.worker import Continuation, Hole, Work
from lowmem.text.tokenizing import decode, encode

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
CARD = SamplingParams()
"""Defaults of fields that a request leaves out."""
TOKENIZE = "/tokenize"
COMPLETION_TOKENS = 16
"""Default max_tokens of /v1/completions, as in OpenAI's API."""
MOST_LOGPROBS = 200_000
"""Most log-probabilities in all answers of one request: they are kept until the answer is sent."""


@dataclass(frozen=True)
class Asked:
    """The work that a request asks for."""

    works: tuple[Work, ...]
    """One item per answer, ordered by prompt, then by choice."""
    echoes: tuple[str, ...]
    """The text to put before each answer."""
    answer_starts: bool = False
    """The dialogue template puts a line end before an answer, which must be dropped."""
    parser: Callable[[], CallParser | None] = lambda: None
    """Makes what finds calls of tools in an answer."""


class Reader:
    """Reads requests in its own thread with its own tokenizer, since threads cannot share a tokenizer."""

    def __init__(
        self, loaded: LoadedModel, context: int, grammars: Grammars, ignored: Collection[str] = ()
    ) -> None:
        """grammars: those of the session that answers. ignored: request fields to pass over, besides those
        that change no answer."""
        self.context, self._grammars = context, grammars
        self._ignored = frozenset(ignored)
        self._vocabulary = token_table(loaded.model).vocabulary
        self._loaded = replace(loaded, tokenizer=copy.deepcopy(loaded.tokenizer))
        self._thread = ThreadPoolExecutor(1, "reader")

    async def chat(self, request: ChatRequest) -> Asked:
        """Read a chat request. Raises ApiError for one that cannot be served."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._chat, request)

    async def completion(self, request: CompletionRequest) -> Asked:
        """Read a completion request. Raises ApiError for one that cannot be served."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._completion, request)

    async def response(self, request: ResponsesRequest) -> Asked:
        """Read a request of /v1/responses. Raises ApiError for one that cannot be served."""
        chat = as_chat(request, self._ignored)
        try:
            return await self.chat(chat)
        except ApiError as error:
            raise as_asked(error, request) from error

    async def infill(self, request: InfillRequest) -> Asked:
        """Read a request to fill a gap. Raises ApiError for one that cannot be served."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._infill, request)

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """The response of /tokenize. Raises ApiError for a request that cannot be served."""
        check_others(request.model_extra or {}, TOKENIZE, self._ignored)
        given = "messages" if request.messages else "prompt" if request.content is None else "content"
        return await self._tokens(partial(tokenized, self._loaded, self.context, request), given)

    async def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """The response of /detokenize. Raises ApiError for a request that cannot be served."""
        check_others(request.model_extra or {}, TOKENIZE, self._ignored)
        return await self._tokens(
            partial(detokenized, self._loaded, self._vocabulary, request.tokens), "tokens"
        )

    async def _tokens(self, work: Callable[[], dict[str, Any]], param: str) -> dict[str, Any]:
        """Run in the thread that owns the tokenizer. param: the field that holds the text."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except InvalidRequestError as error:
            raise invalid_request(error, param) from error

    def _chat(self, request: ChatRequest) -> Asked:
        self._check_fields(request, CHAT)
        if request.top_logprobs and not request.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        limit = self._limit(request, self.context)
        if limit == 0:
            raise invalid("max_tokens is 0. Ask for at least one token", "max_tokens")
        use = tools_of(self._loaded, request)
        params = self._with_tools(self._params(request, limit, logprobs), use)
        ids = encode_turns(self._loaded, request, use.described)
        if params.grammar is not None:
            ids = opened(self._loaded, ids)
        if use.opening:
            ids = [*ids, *encode(self._loaded.tokenizer, use.opening, add_special_tokens=False)]
        works = self._choices(ids, params, request.n or 1, "messages")
        starts = self._loaded.dialogue is not None and params.grammar is None
        return Asked(works, ("",) * len(works), answer_starts=starts, parser=use.parser)

    def _with_tools(self, params: SamplingParams, use: ToolUse) -> SamplingParams:
        """The parameters for an answer that may call tools, or must."""
        if use.forced and params.grammar is not None:
            raise invalid("tool_choice cannot be combined with a format of the answer", "tool_choice")
        if (grammar := use.grammar) is not None:
            self._check_grammar(grammar, "tools")
            return replace(params, grammar=grammar)
        if use.format is None:
            return params
        added = self._loaded.tokenizer.added_tokens_decoder
        shown = [token for token, entry in added.items() if entry.content in use.format.markers]
        return replace(params, shown=tuple(shown), stop=(*params.stop, *use.stops))

    def _check_grammar(self, grammar: Grammar, param: str) -> None:
        try:
            self._grammars.check(grammar, self._loaded.tokenizer)
        except InvalidRequestError as error:
            raise invalid_request(error, param) from error

    def _completion(self, request: CompletionRequest) -> Asked:
        self._check_fields(request, TEXT)
        choices = request.n or 1
        if request.best_of is not None and request.best_of != choices:
            raise invalid("best_of must equal n. Leave it out", "best_of")
        limit = self._limit(request, COMPLETION_TOKENS)
        if limit == 0 and not request.echo:
            raise invalid("max_tokens is 0. Ask for at least one token, or for echo: true", "max_tokens")
        if request.suffix and request.echo and request.logprobs is not None:
            raise invalid("echo with logprobs cannot be combined with suffix. Leave one of them out", "echo")
        params = self._params(request, max(1, limit), request.logprobs)
        echoes_scored = bool(request.echo) and request.logprobs is not None
        prompts = _prompts(request)
        if len(prompts) * choices > MOST_ANSWERS:
            raise invalid(
                f"{len(prompts)} prompts with {choices} answers each exceed {MOST_ANSWERS} answers",
                "n",
            )
        works: list[Work] = []
        echoes: list[str] = []
        for prompt in prompts:
            if request.suffix:
                works += self._holes(prompt, request.suffix, params, choices)
            else:
                ids = self._ids(prompt) if isinstance(prompt, str) else list(prompt)
                for work in self._choices(ids, params, choices, "prompt"):
                    works.append(replace(work, scored=echoes_scored, answered=limit > 0))
            echoes += [self._echo(prompt) if request.echo else ""] * choices
        _check_logprobs(works)
        return Asked(tuple(works), tuple(echoes))

    def _infill(self, request: InfillRequest) -> Asked:
        self._check_fields(request, TEXT)  # the rest of its fields are those of /v1/completions
        if fim_tokens(self._loaded.tokenizer) is None:
            raise invalid("this model has no fill-in-the-middle tokens. Use /v1/completions", "input_prefix")
        limit = self._limit(request, self.context)
        hole = Hole(
            request.prefix,
            request.input_suffix or "",
            self._params(request, max(1, limit), None),
            request.snippets,
            request.limits,
            answered=limit > 0,
        )
        works = tuple(replace(hole, params=each) for each in _seeded(hole.params, request.answers))
        return Asked(works, ("",) * len(works))

    def _ids(self, prompt: str) -> list[int]:
        try:
            return encode_prompt(self._loaded, prompt, raw=True)
        except InvalidRequestError as error:
            raise invalid_request(error, "prompt") from error

    def _holes(
        self, prompt: str | Sequence[int], suffix: str, params: SamplingParams, choices: int
    ) -> list[Hole]:
        if not isinstance(prompt, str):
            raise invalid("suffix needs a text prompt, not token ids", "suffix")
        if fim_tokens(self._loaded.tokenizer) is None:
            raise invalid("suffix needs fill-in-the-middle tokens, which this model lacks", "suffix")
        return [Hole(prompt, suffix, each) for each in _seeded(params, choices)]

    def _choices(
        self, ids: list[int], params: SamplingParams, choices: int, param: str
    ) -> tuple[Continuation, ...]:
        if not ids:
            raise invalid("the prompt is empty. Send at least one token", param)
        if max(ids) >= self._vocabulary:
            raise invalid(f"token ids must be below {self._vocabulary}, the size of the vocabulary", param)
        if len(ids) > self.context:
            raise too_long(len(ids), self.context, param)
        works = tuple(Continuation(tuple(ids), each) for each in _seeded(params, choices))
        _check_logprobs(works)
        return works

    def _echo(self, prompt: str | Sequence[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return decode(self._loaded.tokenizer, prompt, skip_special_tokens=False)

    def _check_fields(self, request: SamplingFields, route: str) -> None:
        """Raise ApiError for fields that are unsupported or cannot be combined."""
        check_others(request.model_extra or {}, route, self._ignored)
        if request.include_usage and not request.stream:
            raise invalid("stream_options needs stream: true", "stream_options")

    def _limit(self, request: SamplingFields, usual: int) -> int:
        """Most tokens of an answer; `usual` without a limit in the request."""
        newer = request.max_completion_tokens if isinstance(request, ChatRequest) else None
        given = (newer, request.max_tokens, request.n_predict)
        return min(next((limit for limit in given if limit is not None), usual), self.context)

    def _biases(self, given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
        """The logit bias by token id. Raises ApiError for a key that is not an id of the vocabulary."""
        found: dict[int, float] = {}
        for name, bias in given.items():
            if not (name.isascii() and name.isdecimal() and int(name[:20]) < self._vocabulary):
                raise invalid(
                    f"logit_bias has {short(name)!r}. Give token ids below {self._vocabulary}", "logit_bias"
                )
            found[int(name)] = bias
        return tuple(found.items())

    def _params(self, request: SamplingFields, limit: int, logprobs: int | None) -> SamplingParams:
        given: dict[str, Any] = {
            name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None
        }
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if given.get("top_p") == 0:
            given |= {"top_p": 1.0, "top_k": 1}
        given["logit_bias"] = self._biases(request.logit_bias or {})
        seed = None if request.seed is None else request.seed % (1 << 64)
        if (asked := requested_grammar(request)) is not None:
            self._check_grammar(*asked)
            given["grammar"] = asked[0]
        return replace(CARD, **given, max_new_tokens=limit, seed=seed, stop=request.stops, logprobs=logprobs)


def _prompts(request: CompletionRequest) -> list[str | Sequence[int]]:
    """The prompts of a request, from any of the four accepted types."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [entry for entry in prompt if not isinstance(entry, int)]


def _seeded(params: SamplingParams, choices: int) -> list[SamplingParams]:
    """The parameters of each answer; with a seed, each answer uses the next one."""
    if params.seed is None:
        return [params] * choices
    return [replace(params, seed=(params.seed + number) % (1 << 64)) for number in range(choices)]


def _check_logprobs(works: Sequence[Work]) -> None:
    entries = 0
    for work in works:
        if work.params.logprobs is not None:
            prompt = len(work.ids) if isinstance(work, Continuation) and work.scored else 0
            entries += (prompt + work.params.max_new_tokens) * (1 + work.params.logprobs)
    if entries > MOST_LOGPROBS:
        raise invalid(
            f"{entries} log-probabilities exceed the limit of {MOST_LOGPROBS}. Ask for fewer tokens, answers "
            "or top_logprobs",
            "logprobs",
        )
