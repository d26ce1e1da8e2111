"""The settings of both journeys, one frozen dataclass a concept."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.errors import RecipeError

BITS = (8, 4, 3, 2)
DEFAULT_CONTEXT = 8192
"""Tokens of context where nobody asked for any: StarChat's positions. The KV cache is made for the whole
context, and some models have positions for a hundred thousand tokens."""
PREFILL_CHUNK = 512
"""Tokens of a prompt that go through the model at once: what bounds the workspace at any prompt length."""


SLICE_BYTES = 32 << 20
"""Of a stored tensor that passes through host memory at a time while a model is loaded."""
QUANTIZED_SLICE_BYTES = 8 << 20
"""The same where bitsandbytes quantizes the slice, and makes up to nine times as much of it."""


@dataclass(frozen=True)
class QuantConfig:
    """How the linears are quantized (the fields that GPTQ readers know by the same names).

    bits: 8, 4, 3 or 2 bits a weight.
    group_size: input columns that share a scale; -1 is one group for the whole row, and 0 leaves the
        choice to the converter: the largest of 128, 64 and 32 that divides every linear's inputs.
    sym: the zero-point is the middle of the range; otherwise each group has its own.
    desc_act: act-order, the columns with the largest Hessian diagonal first. Groups stay static
        (column // group_size), so that inference needs no permutation.
    damp_percent: a fraction of the mean of diag H added to the diagonal.
    true_sequential: linears inside a layer see the outputs of the already quantized ones.
    correction: the share, 0..1, of what earlier linears did wrong that a linear is asked to make up for; 0
        leaves the inputs' errors as they are, and saves a second stream of hidden states. Without
        true_sequential nothing is corrected: linears that do not see each other would all do the same work.
    passes: over the integers and the scale of each group, once it is chosen by what GPTQ leaves of the whole
        group; 0 is GPTQ as published, each group's scale chosen by its weights one by one.
    tune_steps: of tuning each layer's scales, biases and norms together, once its integers are chosen.
    """

    bits: int = 4
    group_size: int = 0
    sym: bool = True
    desc_act: bool = True
    damp_percent: float = 0.01
    true_sequential: bool = True
    correction: float = 0.5
    passes: int = 2
    tune_steps: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise RecipeError(f"{self.bits} bits is not a width that can be stored", "Use 8, 4, 3 or 2")
        if self.group_size not in (-1, 0) and (self.group_size < 32 or self.group_size % 32):
            raise RecipeError(
                f"group size {self.group_size} cannot be packed", "Use -1, or a multiple of 32 such as 128"
            )
        if not 0 < self.damp_percent < 1:
            raise RecipeError(f"damp percent {self.damp_percent} is not between 0 and 1", "Use 0.01, say")
        if not 0 <= self.correction <= 1:
            raise RecipeError(f"correction {self.correction} is not between 0 and 1", "Use 0.5, say")
        if not 0 <= self.passes <= 100:
            raise RecipeError(f"{self.passes} passes over the groups are not 0 to 100", "Use 2")
        if not 0 <= self.tune_steps <= 100_000:
            raise RecipeError(
                f"{self.tune_steps} steps of tuning are not 0 to 100000", "Use 32, or 0 for none"
            )

    @property
    def corrects(self) -> bool:
        """Whether linears make up for earlier ones."""
        return self.correction > 0 and self.true_sequential

    @property
    def follows_unquantized(self) -> bool:
        """Whether the conversion runs the unquantized model beside the one that it makes."""
        return self.corrects or self.tune_steps > 0

    @property
    def maxq(self) -> int:
        """The largest stored integer."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and what ends an answer; the defaults are those of StarChat Alpha's card.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 turn their filters off.
    min_p: a token needs at least this share of the most likely token's probability. repetition_penalty:
    logits of tokens that are there already are divided (if positive, else multiplied) by it. seed: the same
    seed gives the same tokens; None differs from run to run. stop: texts that end an answer and are not part
    of it. logprobs: give each token's log-probability and those of so many of the likeliest; None gives none.
    """

    max_new_tokens: int = 256
    temperature: float = 0.2
    top_k: int = 50
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
