"""The version that `lowmem convert --fit` would make for the memory of a plan. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

from lowmem.checkpoint.formats import LinearFormat, mixed_label, packed_bytes
from lowmem.errors import LowmemError, MemoryBudgetError
from lowmem.plan.candidates import Candidate
from lowmem.plan.fit.allocation import best_allocation, best_of_heads
from lowmem.plan.fit.budget import SizeBudget, left_for_linears, packed_total, resized
from lowmem.plan.fit.sensitivities import read_kept, weights_digest
from lowmem.plan.memory import CUDA_CONTEXT, Form, with_head
from lowmem.plan.planner import Budget
from lowmem.plan.shape import ModelShape, as_converted

_MIB = 1 << 20
_EXACT_BITS = 6.5
"""From so many bits on, the head's rounding would cost more than that of the linears."""


def made_to_fit(
    model: str, candidates: Iterable[Candidate], budget: Budget, context: int
) -> Candidate | None:
    """The mixed version of a 16-bit source among `candidates` that fills the memory of `budget`.

    None where there is no such source, where uniform 8 bits fit, or where not even 2 bits do. Its KL
    divergence is predicted if the source's sensitivities were measured before; its size is close in any case.
    """
    source = next((c for c in candidates if c.form.method == "dense"), None)
    if source is None or not source.shape.convertible:
        return None
    cuda = budget.card is not None
    if budget.card is not None:
        # --fit counts a CUDA context, which the free memory of a card in this machine already excludes.
        card = (budget.card + CUDA_CONTEXT - budget.own_context) // _MIB * _MIB
        size = SizeBudget(card=card, context=context)
    else:
        size = SizeBudget(host=budget.host // _MIB * _MIB, context=context)
    widest = packed_total(as_converted(source.shape, 8))
    try:
        left = left_for_linears(size, source.shape)
    except MemoryBudgetError:
        return None
    if left.get(16, 0) >= widest:
        return None
    bits, kld = 0.0, None
    try:
        if found := read_kept(weights_digest(source.path)):
            allocation = best_of_heads(left, lambda nbytes: best_allocation(found, nbytes))
            packed, head = allocation.nbytes, allocation.head_bits
            bits, kld = allocation.bits_per_weight, allocation.predicted_kld
    except LowmemError:
        pass  # convert says what is wrong
    if not bits:
        # A head of 8 bits costs less than what it saves gains, except where the linears are nearly exact.
        head = (
            16
            if 16 in left and _bits(source.shape, left[16]) > _EXACT_BITS
            else max(left, key=left.__getitem__)
        )
        packed = min(left[head], widest)
        bits = _bits(source.shape, packed)
    form = Form("gptq", "float16" if cuda else "bfloat16", head)
    label = with_head(mixed_label(bits), head)
    command = f"lowmem convert {model} {size.label()}"
    shape = resized(source.shape, packed)
    return Candidate(label, round(bits, 2), form, source.path, shape, kld, command)


def _bits(shape: ModelShape, packed: int) -> float:
    """Average bits of a weight, with its share of scale and zero-point, where linears take `packed` bytes."""
    linears = [tensor for tensor in shape.tensors if tensor.linear]
    at_four = sum(packed_bytes(t.shape[1], t.shape[0], LinearFormat(4, -1)) for t in linears)
    weights = sum(t.numel for t in linears)
    return 4 + (packed - at_four) * 8 / weights
