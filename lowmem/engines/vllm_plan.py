"""Which version of a model vLLM should serve on N cards, or in N processes on a CPU. Pure.

Linears, embeddings and the head are divided among the ranks; everything else, and the keys and values of a
model with fewer KV heads than ranks, is on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.readers import READERS
from lowmem.engines.installed import Vllm
from lowmem.errors import InvalidRequestError, MemoryBudgetError, RecipeError, SourceError
from lowmem.plan.candidates import Candidate
from lowmem.plan.memory import ITEMSIZE, Form, head_tables, kv_cache_bytes, weights_bytes
from lowmem.plan.shape import ModelShape
from lowmem.text.units import format_bytes

OWN_ON_CARD = 2 << 30
"""An allowance for vLLM on each card: CUDA context, activations, workspaces of its kernels. Not measured."""
OWN_ON_HOST = 750 << 20
"""Memory of each rank's process on a CPU beside its model (measured with vLLM 0.32.0: 700 MiB)."""
SHARED_ON_HOST = 1900 << 20
"""Memory of vLLM's server and scheduler and of lowmem itself (measured: 620, 590 and 570 MiB)."""
BLOCK = 128
"""Tokens of a block of vLLM's KV cache on a CPU: each sequence's last one is rarely full."""
HUMMING_BITS = (2, 3)
"""Widths that only vLLM's Humming kernels take, on NVIDIA's cards."""
MOST_RANKS = 64


@dataclass(frozen=True)
class Room:
    """Where the ranks run."""

    ranks: int
    bytes: int
    """Free for each rank: of the fullest card, or its share of the host's memory."""
    on_cards: bool
    sequences: int | None = None
    """Answers at once for which the KV cache has room; None: for one, and vLLM takes what is left."""

    @property
    def words(self) -> str:
        """As "2 cards with 24 GiB each"."""
        what = "card" if self.on_cards else "process"
        plural = {"card": "cards", "process": "processes"}[what]
        each = " each" if self.ranks > 1 else ""
        return (
            f"{self.ranks} {what if self.ranks == 1 else plural} with {format_bytes(self.bytes)} free{each}"
        )


@dataclass(frozen=True)
class Choice:
    """The version to serve."""

    candidate: Candidate
    dtype: str
    method: str
    """vLLM's name of the quantization; empty for 16 bits."""
    context: int
    weights: int
    """Bytes of each rank."""
    kv_cache: int
    """Bytes of each rank."""
    reason: str


def choose(
    candidates: Sequence[Candidate], vllm: Vllm, room: Room, context: int, dtype: str | None = None
) -> Choice:
    """The best version that vLLM loads and that fits.

    candidates: best first. dtype: of the activations, if one is asked for. Raises SourceError with the
    reasons if vLLM loads none of them, MemoryBudgetError if none fits, and InvalidRequestError for a number
    of ranks that does not divide the model.
    """
    check_ranks(candidates[0].shape, room.ranks)
    refused: list[str] = []
    choices: list[Choice] = []
    for candidate in candidates:
        if problem := why_not(candidate, vllm, dtype, on_cards=room.on_cards):
            refused.append(f"{candidate.label}: {problem}")
        else:
            choices.append(_choice(candidate, vllm, room, context, dtype))
    if not choices:
        raise SourceError(
            f"vLLM loads no version that is here ({'; '.join(dict.fromkeys(refused))})",
            "Run `lowmem convert MODEL --bits 4 --for vllm`, or serve without --engine vllm",
        )
    for choice in choices:
        if _need(choice, room) <= room.bytes:
            return choice
    least = min(choices, key=lambda choice: _need(choice, room))
    raise MemoryBudgetError(
        f"no version that vLLM loads fits {room.words} at a context of {context}",
        f"The least that would be enough is {format_bytes(_need(least, room))} for each "
        f"({least.candidate.label}): use a larger --tensor-parallel, or a shorter --context",
    )


def why_not(candidate: Candidate, vllm: Vllm, dtype: str | None, *, on_cards: bool) -> str:
    """Why vLLM does not load a version; "" if it does."""
    shape, method = candidate.shape, candidate.form.method
    if method in ("int8", "nf4"):
        return "bitsandbytes is not part of vLLM"
    if candidate.path.is_file():
        return "vLLM loads folders, not single files"
    if candidate.form.head_bits == 8:
        return "vLLM keeps heads in 16 bits"
    if shape.format is None:
        return ""
    if dtype == "float32":
        return "vLLM multiplies packed weights in float16 and bfloat16 only"
    formats = {name: shape.format.of(name) for name in _packed(shape)}
    widths = {format.bits for format in formats.values() if format}
    if not on_cards:
        if widths - {4}:
            return "vLLM's CPU kernels take 4 bits only"
    elif widths & set(HUMMING_BITS):
        return _why_not_humming([format for format in formats.values() if format], vllm)
    try:
        READERS["vllm"].check(formats)
    except RecipeError as error:
        return error.message
    return ""


def _why_not_humming(formats: Sequence[LinearFormat], vllm: Vllm) -> str:
    """Why vLLM's Humming kernels do not load linears of these formats; "" if they do."""
    if not vllm.humming:
        return "2 and 3 bits need vLLM's Humming kernels: install humming-kernels beside it"
    if not all(format.bits in (*HUMMING_BITS, 4, 8) and format.sym for format in formats):
        return "vLLM's Humming kernels take symmetric linears of 8, 4, 3 and 2 bits"
    if any(format.group_size == -1 for format in formats):
        return "vLLM's Humming kernels do not take one group per row"
    return ""


def _packed(shape: ModelShape) -> list[str]:
    """The full names of the packed linears."""
    ends = ".qweight"
    return [tensor.name.removesuffix(ends) for tensor in shape.tensors if tensor.name.endswith(ends)]


def check_ranks(shape: ModelShape, ranks: int) -> None:
    """Raise InvalidRequestError unless the heads can be divided among the ranks."""
    if not fits_heads(shape, ranks):
        good = [str(count) for count in range(1, MOST_RANKS + 1) if fits_heads(shape, count)]
        raise InvalidRequestError(
            f"--tensor-parallel {ranks} does not divide the model's {shape.heads} attention heads and "
            f"{shape.kv_heads} KV heads",
            f"Use one of {', '.join(good)}",
        )


def fits_heads(shape: ModelShape, ranks: int) -> bool:
    """Whether each rank gets as many heads as the others, and whole KV heads or copies of one."""
    divides = shape.kv_heads % ranks == 0 or ranks % shape.kv_heads == 0
    return shape.heads % ranks == 0 and divides


def rank_weights(shape: ModelShape, form: Form, ranks: int) -> int:
    """Bytes of weights of one of several ranks."""
    total = weights_bytes(shape, form)
    tables = {table.name for table in head_tables(shape)}
    whole = sum(
        tensor.numel * form.itemsize
        for tensor in shape.tensors
        if not tensor.packed and not tensor.linear and tensor.name not in tables
    )
    return whole + -(-max(0, total - whole) // ranks)


def rank_kv_cache(shape: ModelShape, form: Form, tokens: int, ranks: int) -> int:
    """Bytes of one rank's keys and values of a number of tokens."""
    return -(-kv_cache_bytes(shape, form, tokens) // min(ranks, max(1, shape.kv_heads)))


def dtype_for(candidate: Candidate, asked: str | None) -> str:
    """The dtype of the activations.

    GPTQ's scales are float16, which float16 activations keep as they are stored; StarChat's family stays in
    its range. Other families may not, and keep the dtype that they were trained in.
    """
    if asked:
        return asked
    shape = candidate.shape
    if shape.format is None:
        return candidate.form.dtype if candidate.form.dtype in ITEMSIZE else "auto"
    return "float16" if shape.model_type == "gpt_bigcode" or shape.stored == "float32" else shape.stored


def _choice(candidate: Candidate, vllm: Vllm, room: Room, context: int, dtype: str | None) -> Choice:
    shape = candidate.shape
    found = dtype_for(candidate, dtype)
    form = Form(candidate.form.method, found)
    method = ""
    if shape.format is not None:
        humming = any(format.bits in HUMMING_BITS for format in shape.format.formats())
        method = "humming" if humming else "auto_gptq"
    weights = rank_weights(shape, form, room.ranks)
    tokens = context if room.sequences is None else room.sequences * (-(-context // BLOCK) + 1) * BLOCK
    kv_cache = rank_kv_cache(shape, form, tokens, room.ranks)
    each = " on each" if room.ranks > 1 else ""
    reason = (
        f"{candidate.label} is the best version that {vllm.title} loads and that fits {room.words}: "
        f"{format_bytes(weights)} of weights{each}, a context of {context}."
    )
    return Choice(candidate, found, method, context, weights, kv_cache, reason)


def _need(choice: Choice, room: Room) -> int:
    own = OWN_ON_CARD if room.on_cards else OWN_ON_HOST + SHARED_ON_HOST // room.ranks
    return choice.weights + choice.kv_cache + own
