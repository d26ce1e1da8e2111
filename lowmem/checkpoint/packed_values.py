"""Whether the values of a packed linear agree with its format: groups, zero-points and scales.

Reads what a load has in memory anyway; the integers themselves may have any value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowmem.checkpoint.dequantize import PackedLinear
from lowmem.checkpoint.formats import LAYOUTS, LinearFormat, QuantizationFormat
from lowmem.checkpoint.packed_headers import MISMATCH, PackedFault
from lowmem.checkpoint.packing import all_middle, unpack_rows
from lowmem.checkpoint.values import all_finite

_AGAIN = "Run `lowmem verify DIR` to list all problems, then download or convert it again"
_EXACT_WRITERS = ("gptqmodel", "auto-round", "optimum")
"""Tools that store a zero-point of 0 as `unpack_zeros` reads it (see packing.py)."""


def groups_in_order(inputs: int, group_size: int) -> torch.Tensor:
    """The g_idx of groups in order, int32 [in]: input // group_size."""
    return torch.arange(inputs, dtype=torch.int32) // (inputs if group_size == -1 else group_size)


@dataclass(frozen=True)
class Findings:
    """What the values of a packed linear show."""

    faults: tuple[PackedFault, ...]
    """With any of these, the weight is not what its maker meant."""
    note: str
    """What a user should know about the zero-points; "" for nothing."""


def examine(name: str, linear: PackedLinear, format: QuantizationFormat) -> Findings:
    """Compare the values of a linear, whose shapes are right, with its format. format: of its checkpoint."""
    origin = format.origin
    zeros, note = _zero_findings(linear.qzeros, linear.format, format)
    found = {
        "scales": None if all_finite(linear.scales) else ("has values that are not finite", _AGAIN),
        "g_idx": _group_fault(linear.g_idx, linear.scales.shape[0], linear.format, origin),
        "qzeros": zeros,
    }
    faults = [PackedFault(f"{name}.{part}", *fault) for part, fault in found.items() if fault]
    return Findings(tuple(faults), note)


_Fault = tuple[str, str] | None
"""(what is wrong with a tensor, the next step)."""


def _group_fault(g_idx: torch.Tensor, groups: int, format: LinearFormat, origin: str) -> _Fault:
    """(what is wrong with a g_idx [in] of `groups` groups, the next step), or None.

    In act-order an input may be in any group, but every group has `group_size` inputs, and the last the rest.
    """
    inputs = g_idx.numel()
    size = inputs if format.group_size == -1 else format.group_size
    if torch.equal(g_idx, groups_in_order(inputs, size).to(g_idx.device)):
        return None
    low, high = (int(edge) for edge in g_idx.aminmax())
    if low < 0 or high >= groups:
        return f"names groups {low} to {high}, there are 0 to {groups - 1}", MISMATCH
    if low == high:
        return (
            f"puts all inputs into group {low}, and there are {groups} groups: it was never written",
            "Use another version; if it was made without desc_act, the g_idx tensors can be removed",
        )
    if not format.desc_act:
        return (
            "has groups out of order, and desc_act is false",
            f"If the checkpoint was made with desc_act, set it to true in {origin}",
        )
    counts = torch.bincount(g_idx, minlength=groups)
    full = torch.full_like(counts, size)
    full[-1] = inputs - (groups - 1) * size
    if not torch.equal(counts, full):
        group = int((counts != full).nonzero()[0])
        return f"puts {int(counts[group])} inputs into group {group}, and group_size is {size}", MISMATCH
    return None


def _zero_findings(qzeros: torch.Tensor, own: LinearFormat, format: QuantizationFormat) -> tuple[_Fault, str]:
    """(a fault of the zero-points, or a note about them).

    `sym` promises the middle of the range. One other value in the whole linear is another layout's, or that
    of a tensor that was never written. Different values are used as they are stored.
    """
    if not own.sym:
        # lowmem itself never stores a zero-point of 0, although it names GPTQModel, whose readers ask for it.
        exact = format.quantizer and all(name.startswith(_EXACT_WRITERS) for name in format.quantizer)
        if own.zeros_v2 or exact or not _has_full_field(qzeros, own.bits):
            return None, ""
        return (
            None,
            "zero-points are stored as -1, on which readers disagree; they are read as GPTQModel does",
        )
    if qzeros.numel() == 0 or all_middle(qzeros, own.bits, own.layout):
        return None, ""
    for layout in (name for name, found in LAYOUTS.items() if own.bits in found.bits):
        if not all_middle(qzeros, own.bits, layout):
            continue
        problem = f"is in layout {layout}, and the config says {own.layout}"
        return (problem, f'Set checkpoint_format to "{layout}" in {format.origin}'), ""
    fields = unpack_rows(qzeros.T, own.bits, own.layout)
    if bool((fields == fields[0, 0]).all()):
        problem = f"holds {int(fields[0, 0])} everywhere; a symmetric grid (sym) has another zero-point"
        return (problem, "Use another version of the checkpoint: the tensor was never written"), ""
    return None, "zero-points differ although sym is true; they are used as they are stored"


def _has_full_field(qzeros: torch.Tensor, bits: int) -> bool:
    """Whether a field of these words, in layout `gptq`, has all bits set."""
    if bits == 3:
        return bool((unpack_rows(qzeros.T, bits, "gptq") == 7).any())
    full = qzeros
    step = 1
    while step < bits:  # a bit is left where all bits of its field are set
        full = full & (full >> step)
        step *= 2
    lowest = sum(1 << shift for shift in range(0, 32, bits))
    return bool((full & lowest).any())
