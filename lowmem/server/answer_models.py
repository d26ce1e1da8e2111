"""Response schemas for the OpenAPI description. `answers` builds the responses without them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorObject(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str | None
    """A machine-readable name of the error."""


class ErrorAnswer(BaseModel):
    """The body of every error response."""

    error: ErrorObject


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Tokens of prompt and answer together."""


class ModelList(BaseModel):
    """All names of the served model."""

    object: Literal["list"]
    data: list[ModelCard]


class PromptDetails(BaseModel):
    """Details of the prompt's tokens."""

    cached_tokens: int
    """Tokens that were already in the KV cache."""


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TokenChance(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8 bytes of the token; null if it is a part of a character."""


class ChosenToken(TokenChance):
    """A token of an answer, and the most likely tokens at its position."""

    top_logprobs: list[TokenChance]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChosenToken]
    refusal: None


class CalledFunction(BaseModel):
    """A function that the model calls."""

    name: str
    arguments: str
    """JSON."""


class AnswerCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The message of an answer."""

    role: Literal["assistant"]
    content: str | None
    """null if the answer consists of calls."""
    refusal: None
    tool_calls: list[AnswerCall] = []
    """Absent without calls."""


FinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    """One answer to a chat request."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The response of /v1/chat/completions without streaming."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null for the first token of an echoed prompt, which nothing precedes; so in `top_logprobs`."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Position of each token in the answer, in characters."""


class CompletionChoice(BaseModel):
    """One answer to a completion request."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """The response of /v1/completions without streaming."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Infilled(BaseModel):
    """A response of /infill: all of its fields, or those that `response_fields` names."""

    content: str | None = None
    stop: bool | None = None
    stop_type: Literal["eos", "word", "limit"] | None = None
    stopping_word: str | None = None
    tokens_predicted: int | None = None
    tokens_evaluated: int | None = None
    """Tokens of the prompt."""
    tokens_cached: int | None = None
    """Tokens of the prompt that were already in the KV cache."""
    truncated: bool | None = None
    """The texts or the answer were cut to fit the context."""
    timings: dict[str, float] | None = None


class Piece(BaseModel):
    """A token in llama.cpp's form."""

    id: int
    piece: str | list[int]
    """Its text, or its bytes if they are a part of a character."""


class Tokens(BaseModel):
    """The response of /tokenize to `content`."""

    tokens: list[int] | list[Piece]


class TokenCount(BaseModel):
    """The response of /tokenize to `prompt` or `messages`."""

    count: int
    max_model_len: int
    """Tokens of prompt and answer together."""
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """The response of /detokenize: the text under llama.cpp's name and vLLM's."""

    content: str
    prompt: str


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    """JSON."""
    status: Literal["in_progress", "completed", "incomplete"]


class ModelResponse(BaseModel):
    """The response of /v1/responses without streaming."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    """The reason of an incomplete answer: max_output_tokens."""
    model: str
    output: list[OutputMessage | OutputCall]
    metadata: dict[str, Any]
    usage: dict[str, Any]


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok", "shutting down"]


class Memory(BaseModel):
    """Memory of this process, in bytes."""

    host: int
    """Resident now."""
    host_peak: int
    card: int
    """Allocated on the card now."""
    card_peak: int


class Status(BaseModel):
    """The state that the chat page shows."""

    model: str
    label: str
    """The version that runs, such as "4-bit g128"."""
    plan: str
    """Why this version was chosen."""
    device: str
    kernel: str
    context: int
    """Tokens of prompt and answer together."""
    weight_bytes: int
    need_bytes: int
    """Bytes planned on the device; 0 without a plan."""
    tokens_per_second: float
    """Of the current answer, or else of the last one."""
    busy: bool
    running: int
    """Answers that are being generated."""
    slots: int
    """Answers at once, at most."""
    queue: int
    """Waiting requests."""
    memory: Memory


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is at fault"},
    "5XX": {"model": ErrorAnswer, "description": "The server is at fault, or busy"},
}


def streamed(model: Any) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that streams if `stream` is true."""
    events = {
        "schema": {
            "type": "object",
            "description": "One event. Its data is a chunk of the answer in JSON; the last event is [DONE]",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        }
    }
    return {
        200: {"model": model, "content": {"text/event-stream": events}, "description": "The answer"},
        **ERRORS,
    }
