"""The size that a checkpoint may have, and what that leaves for its packed linears. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lowmem.config import DEFAULT_CONTEXT
from lowmem.errors import InvalidRequestError, MemoryBudgetError, RecipeError
from lowmem.plan.memory import (
    CUDA_CONTEXT,
    HOST_CONTEXT,
    Form,
    need_on_device,
    takes_8bit_head,
    weights_bytes,
)
from lowmem.plan.shape import ModelShape, as_converted
from lowmem.text.units import format_bytes

LEAST_BITS = 2
_MIB = 1 << 20
PROBE_BITS = 4
"""A width for which the need beside the packed linears is computed; it is the same for all."""


@dataclass(frozen=True)
class SizeBudget:
    """How large a checkpoint may be, in exactly one of four ways. Raises RecipeError otherwise."""

    card: int | None = None
    """Bytes of memory that a card has free: the model, its KV cache and its workspace fit in them."""
    host: int | None = None
    """Bytes of memory that a machine without a card has free, likewise."""
    weights: int | None = None
    """Bytes of all weights."""
    bits_per_weight: float | None = None
    """Average bits of a linear's weights, with scales and zero-points."""
    context: int | None = None
    """Tokens of prompt and answer together, for `card` and `host`; None: as in a plan."""
    head_bits: int | None = None
    """Of the head and the token embedding in memory, for `card` and `host`: one of HEAD_BITS. None: 16,
    and on a card 8 where the linears gain more than that costs."""

    def __post_init__(self) -> None:
        given = [v for v in (self.card, self.host, self.weights, self.bits_per_weight) if v is not None]
        if len(given) != 1:
            raise RecipeError(
                "a checkpoint can be made for one size only", "Give one of --fit, --fit-ram, --size and --bpw"
            )
        if self.bits_per_weight is not None and not 2 < self.bits_per_weight <= 16:
            raise RecipeError(
                f"--bpw {self.bits_per_weight:g} is out of range", "Use more than 2, such as 3.5"
            )
        if self.context is not None and self.card is None and self.host is None:
            raise RecipeError("--context counts only for memory", "Give it with --fit or --fit-ram")

    def label(self) -> str:
        """The option that asks for this size, such as "--fit 12GiB"."""
        if self.bits_per_weight is not None:
            return f"--bpw {self.bits_per_weight:g}"
        name = "--size" if self.weights is not None else "--fit" if self.card is not None else "--fit-ram"
        size = self.weights or self.card or self.host or 0
        context = "" if self.context is None else f" --context {self.context}"
        return f"{name} {_exact(size)}{context}"

    def heads(self, shape: ModelShape) -> tuple[int, ...]:
        """The bits that the head may have, 16 first."""
        if self.card is None and self.host is None:
            return (16,)
        if self.head_bits is not None:
            return (self.head_bits,)
        return (16, 8) if self.card is not None and takes_8bit_head(shape) else (16,)

    def larger(self, nbytes: int, shape: ModelShape) -> SizeBudget:
        """The budget with `nbytes` more for the linears, rounded up to a MiB or a hundredth of a bit."""
        if self.bits_per_weight is not None:
            count = sum(tensor.numel for tensor in shape.tensors if tensor.linear)
            bits = math.ceil((self.bits_per_weight + 8 * nbytes / count) * 100) / 100
            return replace(self, bits_per_weight=bits)
        field = "card" if self.card is not None else "host" if self.host is not None else "weights"
        size = (getattr(self, field) + nbytes + _MIB - 1) // _MIB * _MIB
        return replace(self, **{field: size})

    def left_for_linears(self, shape: ModelShape, head_bits: int = 16) -> int:
        """Bytes that the packed linears of a 16-bit model may take: qweight, qzeros, scales and g_idx.

        head_bits: one of `heads`. May be negative.
        """
        if self.bits_per_weight is not None:
            count = sum(tensor.numel for tensor in shape.tensors if tensor.linear)
            indices = sum(4 * tensor.shape[1] for tensor in shape.tensors if tensor.linear)
            return int(self.bits_per_weight * count / 8) + indices
        probe = as_converted(shape, PROBE_BITS)
        packed = packed_total(probe)
        if self.weights is not None:
            return self.weights - (weights_bytes(probe, Form("gptq", "float16")) - packed)
        cuda = self.card is not None
        form = Form("gptq", "float16" if cuda else "bfloat16", head_bits)
        context = self.context or min(shape.positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        own = CUDA_CONTEXT if cuda else HOST_CONTEXT
        need = need_on_device(probe, form, context, cuda=cuda, own_context=own)
        return (self.card if self.card is not None else self.host or 0) - (need.total - packed)


def left_for_linears(budget: SizeBudget, shape: ModelShape) -> dict[int, int]:
    """`SizeBudget.left_for_linears` by the bits of the head, where it is enough for all linears at 2 bits.

    Raises MemoryBudgetError, naming the least that would be enough, when it never is, and
    InvalidRequestError for a context or a head that the model does not have.
    """
    positions = shape.positions
    if budget.context is not None and not 0 < budget.context <= (positions or budget.context):
        raise InvalidRequestError(
            f"--context {budget.context} is out of range: the model has {positions} positions",
            "Use a smaller one",
        )
    if budget.head_bits == 8 and not takes_8bit_head(shape):
        raise InvalidRequestError(
            "the head and the embedding of this model cannot be held in 8 bits", "Use --head-bits 16"
        )
    least = packed_total(as_converted(shape, LEAST_BITS))
    left = {head: budget.left_for_linears(shape, head) for head in budget.heads(shape)}
    short = least - max(left.values())
    if short > 0:
        raise MemoryBudgetError(
            f"{budget.label()} is too small: at {LEAST_BITS} bits the model needs {format_bytes(short)} more",
            f"Use at least {budget.larger(short, shape).label()}"
            + (", or a shorter --context" if budget.card or budget.host else ""),
        )
    return {head: nbytes for head, nbytes in left.items() if nbytes >= least}


def packed_total(shape: ModelShape) -> int:
    """Bytes of all packed linears."""
    return sum(tensor.nbytes for tensor in shape.tensors if tensor.packed)


def resized(shape: ModelShape, packed: int) -> ModelShape:
    """The shape of a conversion whose packed linears take `packed` bytes in all, spread evenly."""
    probe = as_converted(shape, PROBE_BITS)
    total = packed_total(probe)
    tensors = tuple(
        replace(tensor, nbytes=tensor.nbytes * packed // total) if tensor.packed else tensor
        for tensor in probe.tensors
    )
    return replace(probe, tensors=tensors)


def _exact(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)
