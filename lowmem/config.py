"""The settings of conversion and generation, one frozen dataclass each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowmem.errors import InvalidRequestError, RecipeError

BITS = (8, 7, 6, 5, 4, 3, 2)
"""Bits of a quantized weight that can be made and read, widest first."""
GROUP_SIZES = (128, 64, 32)
"""Input columns that share a scale: where nobody names a size, the first that divides the inputs."""
DEFAULT_CONTEXT = 8192
"""Tokens of context where none is requested: StarChat's positions. The KV cache is allocated for the whole
context, and some models have more than 100,000 positions."""
PREFILL_CHUNK = 512
"""Tokens of a prompt in one forward pass. Bounds the workspace at any prompt length."""
SLICE_WEIGHTS = 1 << 22
"""Weights that are unpacked at a time, to keep temporaries small: 16 MiB as 32-bit numbers."""
SLICE_BYTES = 32 << 20
"""Bytes of a stored tensor in host memory at a time while a model is loaded."""
QUANTIZED_SLICE_BYTES = 8 << 20
"""The same where bitsandbytes quantizes the slice, which takes up to nine times its size."""
MAX_LOGPROBS = 20


TRAINED_BITS = 6
"""The most bits at which tuning trains integers: with more, rounding costs less than 16-bit arithmetic."""


@dataclass(frozen=True)
class Effort:
    """How much time a conversion spends on its quality."""

    tune_steps: int
    """See QuantConfig.tune_steps; up to TRAINED_BITS bits."""
    rows: int
    """Rows of calibration text."""
    hours: int
    """About the time that StarChat Alpha takes on a CPU with 2 cores (docs/convert.md, Effort)."""

    def steps(self, bits: int) -> int:
        """Steps of tuning a model of that many bits: none above TRAINED_BITS."""
        return self.tune_steps if bits <= TRAINED_BITS else 0


EFFORTS = {"fast": Effort(0, 128, 4), "default": Effort(80, 128, 7), "best": Effort(256, 384, 19)}
"""By the names of `lowmem convert --effort`."""


@dataclass(frozen=True)
class QuantConfig:
    """How the linears are quantized. Fields shared with other GPTQ tools have their names.

    Raises RecipeError for a value out of range.
    """

    bits: int = 4
    """Bits per weight, 8 to 2."""
    group_size: int = 0
    """Input columns that share a scale; -1 is one group per row. 0 chooses the largest of 128, 64 and 32
    that divides the inputs of every linear."""
    sym: bool = True
    """The zero-point is the middle of the range; otherwise each group has its own."""
    desc_act: bool = True
    """Act-order: quantize the columns with the largest Hessian diagonal first. Groups stay static
    (column // group_size), so inference needs no permutation."""
    damp_percent: float = 0.01
    """Fraction of the mean of diag H that is added to the diagonal."""
    true_sequential: bool = True
    """Each linear of a layer sees the outputs of the linears that are already quantized."""
    correction: float = 0.5
    """Share, 0 to 1, of the error of earlier linears that a linear compensates. 0 also saves the hidden
    states of the unquantized model. Needs true_sequential: otherwise all would compensate the same error."""
    passes: int = 2
    """Passes over the integers and the scale of each group after the grid search. 0 is GPTQ as published,
    which chooses the scale from the weights alone."""
    tune_steps: int = -1
    """Steps of tuning a layer's integers, scales, biases and norms together after GPTQ. -1 takes those of the
    effort "default" up to TRAINED_BITS bits, and none above."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise RecipeError(f"{self.bits} bits is not supported", "Use 8, 7, 6, 5, 4, 3 or 2")
        if self.group_size not in (-1, 0) and (self.group_size < 32 or self.group_size % 32):
            raise RecipeError(
                f"group size {self.group_size} cannot be packed", "Use -1, or a multiple of 32 such as 128"
            )
        if not 0 < self.damp_percent < 1:
            raise RecipeError(f"damp percent {self.damp_percent} is not between 0 and 1", "Use 0.01")
        if not 0 <= self.correction <= 1:
            raise RecipeError(f"correction {self.correction} is not between 0 and 1", "Use 0.5")
        if not 0 <= self.passes <= 100:
            raise RecipeError(f"passes {self.passes} is not between 0 and 100", "Use 2")
        if self.tune_steps == -1:
            object.__setattr__(self, "tune_steps", EFFORTS["default"].steps(self.bits))
        if not 0 <= self.tune_steps <= 100_000:
            raise RecipeError(
                f"tune steps {self.tune_steps} is not between 0 and 100000",
                "Leave it out, or use 0 for no tuning",
            )

    @property
    def corrects(self) -> bool:
        """Whether linears compensate the error of earlier ones."""
        return self.correction > 0 and self.true_sequential

    @property
    def follows_unquantized(self) -> bool:
        """Whether the conversion also runs the unquantized model."""
        return self.corrects or self.tune_steps > 0

    @property
    def maxq(self) -> int:
        """The largest stored integer."""
        return (1 << self.bits) - 1


GrammarKind = Literal["json_schema", "regex", "choice", "lark", "gbnf"]


@dataclass(frozen=True)
class Grammar:
    """What the text of an answer must match as a whole.

    The class methods make one. Its errors appear where it is first used: see `lowmem.grammars`.
    """

    kind: GrammarKind
    text: str
    """A JSON Schema, a regular expression, a JSON array of texts to choose from, or a grammar in Lark's or
    llama.cpp's (GBNF) syntax."""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """JSON that is valid under a schema, given as an object or as JSON. `{}` allows any JSON."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A match of a regular expression in the syntax of Rust's regex; it has no look-around."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of some texts."""
        return cls("choice", json.dumps(list(texts)))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A text that a grammar derives from `start`, in llguidance's dialect of Lark's syntax."""
        return cls("lark", text)

    @classmethod
    def gbnf(cls, text: str) -> Grammar:
        """A text that a grammar derives from `root`, in llama.cpp's syntax. One in Lark's is taken too."""
        return cls("gbnf", text)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and what ends an answer. Defaults: those of StarChat Alpha's model card."""

    max_new_tokens: int = 256
    """The answer ends after this many tokens."""
    temperature: float = 0.2
    """0 is greedy."""
    top_k: int = 50
    """Sample among the k most likely tokens; 0 turns the filter off."""
    top_p: float = 0.95
    """Sample among the most likely tokens with this total probability; 1 turns the filter off."""
    min_p: float = 0.0
    """Drop tokens with less than this share of the highest probability; 0 turns the filter off."""
    repetition_penalty: float = 1.0
    """Divide positive logits of earlier tokens by this, and multiply negative ones; 1 turns it off."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that the answer has already; 0 turns it off."""
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit for each time that the answer has it; 0 turns it off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what to add to its logit); each id once."""
    seed: int | None = None
    """The same seed gives the same tokens; None differs between runs."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer. They are not part of it."""
    logprobs: int | None = None
    """Report the log-probability of each token, and those of this many of the most likely ones."""
    grammar: Grammar | None = None
    """What the answer must match. Only tokens that can lead to a match are chosen."""
    shown: tuple[int, ...] = ()
    """Special tokens whose text is part of the answer's; that of the others is left out."""


def check_sampling(params: SamplingParams) -> None:
    """Raises InvalidRequestError for a setting that is out of range."""
    if params.max_new_tokens < 1:
        raise InvalidRequestError(f"max_new_tokens is {params.max_new_tokens}", "Use at least 1")
    if not 0 <= params.temperature < math.inf:
        raise InvalidRequestError(
            f"temperature is {params.temperature}", "Use 0 for greedy, or a positive number such as 0.2"
        )
    if params.top_k < 0:
        raise InvalidRequestError(f"top_k is {params.top_k}", "Use 0 to turn it off, or a positive number")
    if not 0 < params.top_p <= 1:
        raise InvalidRequestError(f"top_p is {params.top_p}", "Use a number above 0; 1 turns it off")
    if not 0 <= params.min_p <= 1:
        raise InvalidRequestError(f"min_p is {params.min_p}", "Use a number up to 1; 0 turns it off")
    if not 0 < params.repetition_penalty < math.inf:
        raise InvalidRequestError(
            f"repetition_penalty is {params.repetition_penalty}", "Use a number such as 1.1; 1 turns it off"
        )
    added = (params.presence_penalty, params.frequency_penalty, *(bias for _, bias in params.logit_bias))
    if not all(math.isfinite(value) for value in added):
        raise InvalidRequestError("a penalty or a logit bias is not finite", "Use numbers such as 0.5")
    if isinstance(params.stop, str) or not all(isinstance(text, str) and text for text in params.stop):
        raise InvalidRequestError("a stop text is empty or not a string", "Use non-empty strings")
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        raise InvalidRequestError(f"logprobs is {params.logprobs}", f"Use a number from 0 to {MAX_LOGPROBS}")
