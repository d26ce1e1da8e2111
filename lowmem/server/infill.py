"""llama.cpp's /infill, as its plug-ins for editors use it: the request, and how its answers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lowmem.prompts import Snippet
from lowmem.server.answers import Choice, event
from lowmem.server.api_errors import ApiError
from lowmem.server.lines import LineLimits
from lowmem.server.protocol import MOST_CHOICES, Finite, SamplingFields, Text
from lowmem.server.variants import Number, Whole

if TYPE_CHECKING:
    from lowmem.config import SamplingParams
    from lowmem.session import Response, TokenLogprob

MOST_SNIPPETS = 1024
_MOST_FIELDS = 256
_MOST_MS = 1 << 31
Milliseconds = Annotated[float, Field(ge=-1, le=_MOST_MS), Finite, Number]


class Extra(BaseModel):
    """A piece of another file."""

    model_config = ConfigDict(strict=True, extra="allow")
    text: Text
    filename: Text | None = None


class InfillRequest(SamplingFields):
    """The body of POST /infill.

    The model fills in the text between `input_prefix` with `prompt` behind it, and `input_suffix`. Their far
    ends are cut if they exceed the context.
    """

    input_prefix: Text | None = None
    input_suffix: Text | None = None
    prompt: Text | None = None
    """The line of the cursor, up to it."""
    input_extra: Annotated[list[Extra], Field(max_length=MOST_SNIPPETS)] | None = None
    """Context from other files, the most useful last. Half of the context is for it."""
    n_cmpl: Annotated[int, Field(ge=1, le=MOST_CHOICES), Whole] | None = None
    """llama.cpp's name of `n`: several answers come as a list."""
    n_indent: Annotated[int, Field(ge=0, lt=1 << 16), Whole] | None = None
    """The answer ends before a line, after its first, with fewer whitespace characters at its start."""
    t_max_predict_ms: Milliseconds | None = None
    """The answer ends at the first line end after this time; 0 and -1 are no limit."""
    t_max_prompt_ms: Milliseconds | None = None
    """Without effect, as in llama.cpp."""
    samplers: Text | Annotated[list[Text], Field(max_length=_MOST_FIELDS)] | None = None
    """Without effect: the samplers run in their own order, each with its field."""
    response_fields: Annotated[list[Text], Field(max_length=_MOST_FIELDS)] | None = None
    """Fields of the response to send; `timings/prompt_n` is one inside of another."""

    @property
    def answers(self) -> int:
        """Number of answers."""
        return self.n_cmpl or self.n or 1

    @property
    def prefix(self) -> str:
        """All text before the hole."""
        return (self.input_prefix or "") + (self.prompt or "")

    @property
    def snippets(self) -> tuple[Snippet, ...]:
        """Context from other files."""
        return tuple(Snippet(extra.filename or "", extra.text) for extra in self.input_extra or ())

    @property
    def limits(self) -> LineLimits:
        """What ends the answer at a line end."""
        return LineLimits(self.n_indent or 0, max(0.0, (self.t_max_predict_ms or 0.0) / 1000))


class InfillWriter:
    """Writes answers as llama.cpp does."""

    def __init__(self, model: str, request: InfillRequest, params: SamplingParams, context: int) -> None:
        """params: as they are used."""
        self._model, self._fields = model, request.response_fields
        self._settings = {
            "n_ctx": context,
            "n_predict": -1 if request.n_predict is None else params.max_new_tokens,
            "n_indent": request.n_indent or 0,
            "t_max_predict_ms": request.t_max_predict_ms or 0,
            "stop": list(params.stop),
            "seed": params.seed,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
        }
        if request.n_predict == 0:
            self._settings["n_predict"] = 0

    def opened(self, choice: Choice) -> bytes:
        return b""

    def text(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        last = choice.last
        return event(
            {
                "index": choice.index,
                "content": text,
                "tokens": [],
                "stop": False,
                "tokens_predicted": last.new_tokens if last else 0,
                "tokens_evaluated": last.prompt_tokens if last else 0,
            }
        )

    def closed(self, choice: Choice) -> bytes:
        return event(self._object(choice, ""))

    def ended(self, choices: Sequence[Choice], figures: dict[str, Any]) -> bytes:
        return b""

    def failed(self, error: ApiError) -> bytes:
        return event(error.body())

    def whole(self, choices: Sequence[Choice], figures: dict[str, Any]) -> object:
        found = [self._chosen(self._object(choice, "".join(choice.pieces))) for choice in choices]
        return found[0] if len(found) == 1 else found

    def _chosen(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The fields that the request asks for; those inside of others move to the top."""
        if not self._fields:
            return answer
        return {path: value for path in self._fields for value in _at(answer, path.split("/"))}

    def _object(self, choice: Choice, text: str) -> dict[str, Any]:
        last = choice.last
        return {
            "index": choice.index,
            "content": text,
            "tokens": [],
            "stop": True,
            "model": self._model,
            "tokens_predicted": last.new_tokens if last else 0,
            "tokens_evaluated": last.prompt_tokens if last else 0,
            "tokens_cached": last.cached_tokens if last else 0,
            "generation_settings": self._settings,
            "truncated": last is not None and (last.cut_tokens > 0 or last.finish_reason == "context"),
            "stop_type": _stop_type(last),
            "stopping_word": last.stop_text if last else "",
            "timings": timings(last),
        }


def timings(last: Response | None) -> dict[str, float]:
    """llama.cpp's `timings`. The time of the prompt ends with the first token."""
    if last is None:
        return {}
    read = last.prompt_tokens - last.cached_tokens
    prompt = last.ttft_seconds
    seconds = (last.new_tokens - 1) / last.tokens_per_second if last.tokens_per_second > 0 else 0.0
    return {
        "cache_n": last.cached_tokens,
        "prompt_n": read,
        "prompt_ms": 1000 * prompt,
        "prompt_per_token_ms": 1000 * prompt / max(1, read),
        "prompt_per_second": read / prompt if prompt > 0 else 0.0,
        "predicted_n": last.new_tokens,
        "predicted_ms": 1000 * seconds,
        "predicted_per_token_ms": 1000 * seconds / max(1, last.new_tokens - 1),
        "predicted_per_second": last.tokens_per_second,
    }


def _stop_type(last: Response | None) -> str:
    if last is None or last.finish_reason != "stop":
        return "limit"
    return "word" if last.stop_text else "eos"


def _at(answer: Mapping[str, Any], path: Sequence[str]) -> list[Any]:
    """The value at a path, alone in a list, or nothing."""
    value: Any = answer
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return []
        value = value[name]
    return [value]
