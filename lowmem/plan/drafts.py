"""A draft model beside the planned one: the memory that it needs, and which one to suggest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.errors import SourceError
from lowmem.kernels.registry import KernelSupport
from lowmem.plan.candidates import Candidate, find_candidates
from lowmem.plan.memory import ON_THE_FLY, Need, need_on_device
from lowmem.plan.shape import ModelShape

WORTH = 8
"""How many times as many weights as its draft a model should have: a step of the draft must cost little."""
_WORKSPACE = 256 << 20
"""An allowance for a known draft's activations, whose shapes are not at hand."""


@dataclass(frozen=True)
class Draft:
    """A small model that drafts for the planned one."""

    name: str
    """As the user gave it."""
    candidate: Candidate
    need: Need
    """On the device of the planned model's first layers, for one sequence."""


@dataclass(frozen=True)
class KnownDraft:
    """A small published model, and the models whose vocabulary begins like its own."""

    repository: str
    parameters: int
    kv_bytes: int
    """Bytes of keys and values for a token, in 16 bits."""
    model_types: tuple[str, ...]
    vocab: tuple[int, int]
    """The fewest and the most rows of the token embedding of the models that it can draft for."""


# From the configs and model cards on huggingface.co.
KNOWN = (
    KnownDraft("bigcode/tiny_starcoder_py", 164_000_000, 5_120, ("gpt_bigcode",), (49_152, 49_280)),
    KnownDraft("HuggingFaceTB/SmolLM2-135M-Instruct", 135_000_000, 23_040, ("llama",), (49_152, 49_152)),
    KnownDraft("Qwen/Qwen2.5-0.5B-Instruct", 494_000_000, 12_288, ("qwen2",), (151_936, 152_064)),
    KnownDraft("Qwen/Qwen3-0.6B", 596_000_000, 114_688, ("qwen3",), (151_936, 151_936)),
    KnownDraft("meta-llama/Llama-3.2-1B-Instruct", 1_236_000_000, 32_768, ("llama",), (128_256, 128_256)),
)


def find_draft(name: str, *, cuda: bool, dtype: str | None) -> Candidate:
    """The version of a draft model that is used: the best one on this machine of at most 16 bits.

    name: a folder, a weight file, a hub id or a name from `lowmem list`. Raises SourceError if there is none.
    """
    found = find_candidates(name, cuda=cuda, dtype=dtype)
    usable = [c for c in found if c.bits <= 16 and c.form.method not in ON_THE_FLY] or found
    if usable[0].shape.experts:
        raise SourceError(f"{name} is a mixture of experts: it is no draft model", "Use a small, plain model")
    return usable[0]


def draft_of(name: str, candidate: Candidate, context: int, *, cuda: bool, support: KernelSupport) -> Draft:
    """The draft with the memory that it takes at a context of the large model."""
    tokens = min(context, candidate.shape.positions or context)
    need = need_on_device(candidate.shape, candidate.form, tokens, cuda=cuda, support=support)
    return Draft(name, candidate, need)


def suggestion(shape: ModelShape, context: int, room: int, known: Sequence[KnownDraft] = KNOWN) -> str:
    """A sentence on a published draft model for this model; "" if none is known that fits.

    room: free bytes beside the planned version.
    """
    weights = sum(tensor.numel for tensor in shape.tensors)
    for draft in known:
        need = 2 * draft.parameters + draft.kv_bytes * context + _WORKSPACE
        alike = shape.model_type in draft.model_types and draft.vocab[0] <= shape.vocab <= draft.vocab[1]
        if alike and need <= room and weights >= WORTH * draft.parameters:
            return f" A draft model may make it faster, and fits beside it: --draft {draft.repository}."
    return ""
