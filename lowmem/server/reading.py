"""Turns a request into work for the model: messages into token ids, fields into sampling parameters."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.loading.loader import LoadedModel
from lowmem.models.dialogue import Message, fim_tokens
from lowmem.prompts import encode_prompt
from lowmem.server.api_errors import invalid, invalid_request, short, too_long
from lowmem.server.protocol import (
    MOST_ANSWERS,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    refuse_unsupported,
)
from lowmem.server.worker import Continuation, Hole, Work
from lowmem.text.tokenizing import decode

CARD = SamplingParams()
"""Defaults of fields that a request leaves out."""
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


class Reader:
    """Reads requests in its own thread with its own tokenizer, since threads cannot share a tokenizer."""

    def __init__(self, loaded: LoadedModel, context: int) -> None:
        self.context = context
        self._vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
        self._loaded = replace(loaded, tokenizer=copy.deepcopy(loaded.tokenizer))
        self._thread = ThreadPoolExecutor(1, "reader")

    async def chat(self, request: ChatRequest) -> Asked:
        """Read a chat request. Raises ApiError for one that cannot be served."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._chat, request)

    async def completion(self, request: CompletionRequest) -> Asked:
        """Read a completion request. Raises ApiError for one that cannot be served."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._completion, request)

    def _chat(self, request: ChatRequest) -> Asked:
        check_fields(request)
        if request.top_logprobs is not None and not request.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        limit = request.max_completion_tokens or request.max_tokens or self.context
        params = self._params(request, min(limit, self.context), logprobs)
        messages = read_messages(request.messages)
        try:
            if self._loaded.dialogue is None and not self._loaded.tokenizer.chat_template:
                ids = encode_prompt(self._loaded, _only_question(messages), raw=True)
            else:
                ids = encode_prompt(self._loaded, messages)
        except InvalidRequestError as error:
            raise invalid_request(error, "messages") from error
        works = self._choices(ids, params, request.n or 1, "messages")
        return Asked(works, ("",) * len(works), answer_starts=self._loaded.dialogue is not None)

    def _completion(self, request: CompletionRequest) -> Asked:
        check_fields(request)
        choices = request.n or 1
        if request.best_of is not None and request.best_of != choices:
            raise invalid("best_of must equal n. Leave it out", "best_of")
        if request.echo and request.logprobs is not None:
            raise invalid("echo cannot be combined with logprobs. Leave one of them out", "echo")
        limit = min(request.max_tokens or COMPLETION_TOKENS, self.context)
        params = self._params(request, limit, request.logprobs)
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
                works += self._choices(ids, params, choices, "prompt")
            echoes += [self._echo(prompt) if request.echo else ""] * choices
        _check_logprobs(works)
        return Asked(tuple(works), tuple(echoes))

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

    def _params(self, request: SamplingFields, limit: int, logprobs: int | None) -> SamplingParams:
        given = {
            name: getattr(request, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if getattr(request, name) is not None
        }
        seed = None if request.seed is None else request.seed % (1 << 64)
        return replace(CARD, **given, max_new_tokens=limit, seed=seed, stop=request.stops, logprobs=logprobs)


def check_fields(request: SamplingFields) -> None:
    """Raise ApiError for fields that are unsupported or cannot be combined."""
    refuse_unsupported(request)
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options needs stream: true", "stream_options")


def read_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """The messages as dialogue turns, leading system texts joined. Raises ApiError for non-text parts."""
    read: list[Message] = []
    for at, message in enumerate(messages):
        text = _content(message, at)
        role = "system" if message.role == "developer" else message.role
        if role == "system" and len(read) == 1 and read[0].role == "system":
            read[0] = Message("system", f"{read[0].content}\n\n{text}")
        elif role == "system" and read:
            raise invalid(
                f"messages[{at}] is a system message after others. Put it first",
                f"messages[{at}].role",
            )
        else:
            read.append(Message(role, text))
    return read


def _content(message: ChatMessage, at: int) -> str:
    if isinstance(message.content, str):
        return message.content
    for number, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise invalid(
                f"a content part of type {short(part.type)!r} is not supported. Send text",
                f"messages[{at}].content[{number}]",
                "unsupported_content",
            )
    return "".join(part.text or "" for part in message.content)


def _only_question(messages: Sequence[Message]) -> str:
    """The text of the only user message, for a model without a chat template."""
    if [message.role for message in messages] != ["user"]:
        raise invalid(
            "this model has no chat template. Send a single user message, or use /v1/completions",
            "messages",
        )
    return messages[0].content


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
    entries = sum(
        work.params.max_new_tokens * (1 + work.params.logprobs)
        for work in works
        if work.params.logprobs is not None
    )
    if entries > MOST_LOGPROBS:
        raise invalid(
            f"{entries} log-probabilities exceed the limit of {MOST_LOGPROBS}. Ask for fewer tokens, answers "
            "or top_logprobs",
            "logprobs",
        )
