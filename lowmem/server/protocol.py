"""Request schemas: OpenAI's fields with their limits. Does not import torch.

Fields that OpenAI's API does not define, or that do not change an answer (`user`, `metadata`), are ignored
like in other local servers, because editors send fields of their own. Fields that would change the answer and
are not supported are refused by name; see `refuse_unsupported`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lowmem.server.api_errors import invalid

MOST_MESSAGES = 4096
MOST_PROMPTS = 64
MOST_CHOICES = 16
MOST_ANSWERS = 64
"""Most answers of a request: prompts times choices."""
MOST_STOPS = 16
LONGEST_STOP = 256
MOST_TOP_LOGPROBS = 20
_MOST_TOKENS = 1 << 31
_SEEDS = 1 << 63

# A lone surrogate, from a text that was cut in two, cannot be encoded in UTF-8: it becomes U+FFFD.
_HALVES = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def _whole(text: str) -> str:
    return text if text.isascii() else text.translate(_HALVES)


Text = Annotated[str, AfterValidator(_whole)]
StopText = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP), AfterValidator(_whole)]
Finite = Field(allow_inf_nan=False)


class _Strict(BaseModel):
    """A model without type conversion that accepts and ignores unknown fields."""

    model_config = ConfigDict(strict=True, extra="allow")


class ContentPart(_Strict):
    """A part of a message. Only text is supported; `reading` refuses other types."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"required": ["type", "text"]})
    type: Annotated[Text, Field(json_schema_extra={"enum": ["text"]})]
    text: Text | None = None


class ChatMessage(_Strict):
    """One message. `developer` is a synonym of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(max_length=MOST_MESSAGES)]


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    """Send a last chunk with the usage."""


class SamplingFields(_Strict):
    """Fields of both request types.

    Defaults are those of StarChat Alpha's model card: temperature 0.2, top_k 50, top_p 0.95. With several
    answers, each uses the next seed.
    """

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-_SEEDS, lt=_SEEDS)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), Finite] | None = None
    top_p: Annotated[float, Field(gt=0, le=1), Finite] | None = None
    top_k: Annotated[int, Field(ge=0, lt=_MOST_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1), Finite] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100), Finite] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=_MOST_TOKENS)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether to send a last chunk with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=_MOST_TOKENS)]], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions.

    With `suffix`, the model fills in the text between `prompt` and `suffix`; their far ends are cut if they
    exceed the context. `echo` puts the prompt before the answer.
    """

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    suffix: Text | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None


_NONE: tuple[object, ...] = (None,)
# Unsupported fields that would change the answer, each with the values that change nothing. `tools` and
# `functions` are ignored: a model may always answer in words, and Continue sends them with every request.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "audio": _NONE,
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "grammar": (None, ""),
    "guided_json": _NONE,
    "json_schema": _NONE,
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": _NONE,
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "web_search_options": _NONE,
}


def refuse_unsupported(request: BaseModel) -> None:
    """Raise ApiError for the first field that asks for something unsupported."""
    for name, value in (request.model_extra or {}).items():
        harmless = UNSUPPORTED.get(name)
        if harmless is not None and not any(_same(value, other) for other in harmless):
            raise invalid(
                f"{name} is not supported by this server. Leave it out", name, "unsupported_parameter"
            )


def _same(value: Any, other: object) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
