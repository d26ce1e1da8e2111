"""From what a user asks for, and what this machine has, to a plan."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.errors import InvalidRequestError, SourceError
from lowmem.plan import device as machine
from lowmem.plan.bandwidth import card_bandwidth, host_bandwidth
from lowmem.plan.candidates import Candidate, convertible, find_candidates
from lowmem.plan.memory import CUDA_CONTEXT
from lowmem.plan.planner import Budget, Plan, default_context, make_plan
from lowmem.text.units import format_bytes

if TYPE_CHECKING:
    import torch

VRAM_VARIABLE = "LOWMEM_VRAM"


@dataclass(frozen=True)
class Request:
    """What to run, and on what; None leaves the choice to the plan.

    context: tokens of prompt and answer together. bits, method: only such forms ("gptq", "int8", "nf4" or
    "dense"). device: "auto", "cpu" or "cuda:N". vram, ram: bytes that may be taken instead of what is free.
    dtype: of activations and dense weights. bandwidth: bytes a second of a card that is only named.
    activation_bits: 8, 12 or 16, of a CPU's activations (see kernels.native_linear.activation_bits).
    check: compare the files with their digests before they are loaded.
    """

    model: str
    context: int | None = None
    bits: int | None = None
    method: str | None = None
    device: str = "auto"
    vram: int | None = None
    ram: int | None = None
    dtype: str | None = None
    bandwidth: float | None = None
    activation_bits: int | None = None
    check: bool = False


def plan_for(request: Request, *, named_card: bool = False, measure: bool = False) -> Plan:
    """Find the candidates and plan. torch is imported only if this machine may have a card to ask.

    named_card: `vram` may be of a card that is not here, as `lowmem plan` allows. measure: have tokens/s in
    the plan, from bandwidth that is measured if it was not before. Raises LowmemError for everything that
    the user can mend.
    """
    vram = request.vram if request.vram is not None else _vram_of_environment()
    card = None if request.device == "cpu" or (named_card and vram is not None) else find_card(request.device)
    if card is None and request.vram is not None and not named_card:
        raise InvalidRequestError(
            "there is no card here for --vram to be of", "Use --ram SIZE to limit what the CPU may take"
        )
    on_card = card is not None or (named_card and vram is not None and request.device != "cpu")
    candidates = find_candidates(request.model, cuda=on_card, dtype=request.dtype)
    possible = [] if request.method else convertible(request.model, candidates, cuda=on_card)
    context = request.context or default_context(candidates)
    positions = candidates[0].shape.positions
    if request.context is not None and not 0 < context <= (positions or context):
        raise InvalidRequestError(
            f"--context {context} is not possible: the model has positions for {positions}", "Ask for less"
        )
    if request.bits is not None:
        possible = [c for c in possible if c.bits == request.bits]
    budget = _budget(request, card, vram if on_card else None, measure)
    return make_plan(_wanted(candidates, request), budget, context, possible)


def find_card(device: str) -> torch.device | None:
    """The CUDA device that `device` means, or None for the CPU; torch is asked only if a driver is here.

    Raises InvalidRequestError for a name that means nothing, or a card that is not there.
    """
    if device == "auto" and not machine.cuda_driver_present():
        return None
    found = machine.resolve_device(device)
    return found if found.type == "cuda" else None


def _vram_of_environment() -> int | None:
    text = os.environ.get(VRAM_VARIABLE)
    return machine.parse_bytes(text, f"${VRAM_VARIABLE}") if text else None


def _budget(request: Request, card: torch.device | None, vram: int | None, measure: bool) -> Budget:
    host = request.ram or machine.host_memory_available() + machine.host_memory_private()
    rate = host_bandwidth() if measure else None
    packs = machine.packs_nf4()
    if card is None and vram is None:
        return Budget("cpu", host, host_bandwidth=rate, packs_nf4=packs)
    if card is None:
        assert vram is not None
        name = f"a card with {format_bytes(vram)}"
        return Budget(name, host, vram, CUDA_CONTEXT, rate, request.bandwidth, packs)
    rate_on_card = request.bandwidth or (card_bandwidth(card) if measure else None)
    if vram is not None:
        return Budget(str(card), host, vram, CUDA_CONTEXT, rate, rate_on_card, packs)
    return Budget(str(card), host, machine.card_memory_free(card), 0, rate, rate_on_card, packs)


def _wanted(candidates: list[Candidate], request: Request) -> list[Candidate]:
    """Those of the asked bits and method; SourceError saying how to get one when there is none."""
    found = [
        c for c in candidates if request.bits in (None, c.bits) and request.method in (None, c.form.method)
    ]
    if found:
        return found
    there = ", ".join(c.label for c in candidates)
    source = next((c for c in candidates if c.form.method == "dense"), None)
    if request.method in (None, "gptq") and source is not None:
        bits = f" --bits {request.bits}" if request.bits else ""
        hint = f"Make it with: lowmem convert {request.model}{bits}"
    else:
        hint = "Choose one of them, or leave the choice to the plan"
    what = f"{request.bits}-bit form" if request.bits else f"{request.method} form"
    raise SourceError(f"there is no {what} of {request.model} here, but {there}", hint)
