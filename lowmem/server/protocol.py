"""Request schemas: OpenAI's fields with their limits. Does not import torch.

Numbers are taken in the variants that clients send (`variants`). What other fields mean is in `fields`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lowmem.server.variants import (
    EmptyIsUnset,
    EmptyTextIsUnset,
    Flag,
    FlagIsCount,
    MinusOneIsNoLimit,
    MinusOneIsUnset,
    NothingIsUnset,
    Number,
    Whole,
)

MOST_MESSAGES = 4096
MOST_PROMPTS = 64
MOST_CHOICES = 16
MOST_ANSWERS = 64
"""Most answers of a request: prompts times choices."""
MOST_STOPS = 16
LONGEST_STOP = 256
MOST_TOP_LOGPROBS = 20
MOST_BIASES = 1024
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
    """A part of a message. Only text is supported; `turns` refuses other types."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"required": ["type", "text"]})
    type: Annotated[Text, Field(json_schema_extra={"enum": ["text"]})]
    text: Text | None = None
    refusal: Text | None = None
    """The text of a part of type "refusal"."""


class FunctionCall(_Strict):
    """A function that an assistant called."""

    name: Text
    arguments: Text | dict[str, Any] | None = None
    """JSON, as a text or as an object."""


class ToolCall(_Strict):
    """A tool that an assistant called."""

    id: Text | None = None
    function: FunctionCall


class ChatMessage(_Strict):
    """One message. `developer` is a synonym of `system`, and `function` an older name of `tool`.

    An assistant's message may have no content; those of others need one.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[ContentPart | Text], Field(max_length=MOST_MESSAGES)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_MESSAGES)] | None = None
    function_call: FunctionCall | None = None
    """An older form of `tool_calls`."""
    tool_call_id: Text | None = None
    """The call that a tool's message answers."""
    name: Text | None = None
    """The name of a tool, or of a speaker; templates may use it."""
    reasoning_content: Text | None = None
    """The reasoning before an assistant's answer; templates may use it."""


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: Flag | None = None
    """Send a last chunk with the usage."""


Bias = Annotated[float, Field(ge=-100, le=100), Finite, Number]
Stops = Annotated[list[StopText], Field(max_length=MOST_STOPS)]
Biases = Annotated[dict[str, Bias], Field(max_length=MOST_BIASES)]
Limit = Annotated[int, Field(ge=0, lt=_MOST_TOKENS), Whole, MinusOneIsNoLimit]


class SamplingFields(_Strict):
    """Fields of both request types.

    Defaults are those of StarChat Alpha's model card: temperature 0.2, top_k 50, top_p 0.95. With several
    answers, each uses the next seed.
    """

    model: Text | None = None
    """Without one, the served model."""
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), Whole] | None = None
    seed: Annotated[Annotated[int, Field(ge=-_SEEDS, lt=_SEEDS), Whole] | None, MinusOneIsUnset] = None
    """-1 draws one."""
    stop: Annotated[StopText | Stops | None, EmptyTextIsUnset] = None
    temperature: Annotated[float, Field(ge=0, le=2), Finite, Number] | None = None
    top_p: Annotated[float, Field(ge=0, le=1), Finite, Number] | None = None
    """0 leaves the most likely token alone."""
    top_k: Annotated[int, Field(ge=-1, lt=_MOST_TOKENS), Whole] | None = None
    """0 and -1 turn it off."""
    min_p: Annotated[float, Field(ge=0, le=1), Finite, Number] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100), Finite, Number] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2), Finite, Number] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2), Finite, Number] | None = None
    logit_bias: Annotated[Biases | None, EmptyIsUnset] = None
    """What to add to the logits of tokens, by their ids."""
    max_tokens: Limit | None = None
    """-1 is no limit but the context."""
    n_predict: Limit | None = None
    """llama.cpp's name of `max_tokens`."""
    response_format: Annotated[dict[str, Any] | None, NothingIsUnset] = None
    """`{"type": "json_object"}`, or `{"type": "json_schema", "json_schema": {"schema": {…}}}`."""
    structured_outputs: Annotated[dict[str, Any] | None, NothingIsUnset] = None
    """vLLM's: one of `json`, `regex`, `choice`, `grammar` and `json_object`."""
    guided_json: Annotated[dict[str, Any] | Text | None, NothingIsUnset] = None
    guided_regex: Annotated[Text | None, NothingIsUnset] = None
    guided_choice: Annotated[list[Text] | None, NothingIsUnset] = None
    guided_grammar: Annotated[Text | None, NothingIsUnset] = None
    """In Lark's syntax or in GBNF."""
    json_schema: Annotated[dict[str, Any] | Text | None, NothingIsUnset] = None
    """llama.cpp's."""
    grammar: Annotated[Text | None, NothingIsUnset] = None
    """llama.cpp's: GBNF, or Lark's syntax."""

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
    max_completion_tokens: Limit | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS), Whole] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MOST_MESSAGES)] | None = None
    """Given to a chat template that shows tools; other models see them if a call is forced."""
    tool_choice: Annotated[Text | dict[str, Any] | None, NothingIsUnset] = None
    """"auto", "none", "required" or `{"type": "function", "function": {"name": "…"}}`."""
    parallel_tool_calls: Flag | None = None
    """false: at most one call in an answer."""
    functions: Annotated[list[dict[str, Any]], Field(max_length=MOST_MESSAGES)] | None = None
    """An older form of `tools`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments of the model's chat template."""


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=_MOST_TOKENS)]], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions.

    With `suffix`, the model fills in the text between `prompt` and `suffix`; their far ends are cut if they
    exceed the context. `echo` puts the prompt before the answer, and its log-probabilities before the
    answer's.
    """

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    suffix: Text | None = None
    echo: Flag | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES), Whole] | None = None
    logprobs: Annotated[Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS), Whole] | None, FlagIsCount] = None
