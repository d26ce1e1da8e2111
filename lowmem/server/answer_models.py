"""The answers' shapes, for the OpenAPI description; `answers` writes them without these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorObject(BaseModel):
    """What went wrong. param: the field at fault. code: what a program can tell it by."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is an error."""

    error: ErrorObject


class ModelCard(BaseModel):
    """A served model. max_model_len: tokens that prompt and answer share."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All names of the served model."""

    object: Literal["list"]
    data: list[ModelCard]


class PromptDetails(BaseModel):
    """cached_tokens: of the prompt, those that were in the KV cache already."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TokenChance(BaseModel):
    """A token and its log-probability. bytes: of its text; null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(TokenChance):
    """A token of an answer, and the likeliest in its place."""

    top_logprobs: list[TokenChance]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChosenToken]
    refusal: None


class AssistantMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


FinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions where nothing is streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens; text_offset: where in the answer each begins."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the texts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """The answer of /v1/completions where nothing is streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Health(BaseModel):
    """ok, or shutting down."""

    status: Literal["ok", "shutting down"]


class Memory(BaseModel):
    """Bytes of this process: resident, and on a card; now, and at most so far."""

    host: int
    host_peak: int
    card: int
    card_peak: int


class Status(BaseModel):
    """What the page shows beside a chat.

    label: of the form, as "4-bit g128". plan: what was chosen, and why. device, kernel: what computes.
    context: tokens that prompt and answer share. weight_bytes, need_bytes: of the weights; of all that was
    planned on the device, 0 where nothing was. tokens_per_second: of the answer that is being written, or
    else of the last. queue: requests that wait.
    """

    model: str
    label: str
    plan: str
    device: str
    kernel: str
    context: int
    weight_bytes: int
    need_bytes: int
    tokens_per_second: float
    busy: bool
    queue: int
    memory: Memory


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request's fault"},
    "5XX": {"model": ErrorAnswer, "description": "The server's fault, or it is busy"},
}


def streamed(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The answers of a route that streams where `stream` is true."""
    events = {
        "schema": {
            "type": "object",
            "description": "Of each event; its data is a chunk of the answer in JSON, and of the last [DONE]",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        }
    }
    return {
        200: {"model": model, "content": {"text/event-stream": events}, "description": "The answer"},
        **ERRORS,
    }
