"""The request of a user, and the plan made for it on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowmem.cards.find import driver_present, is_card, resolve_device
from lowmem.checkpoint.files.home import typed_path
from lowmem.checkpoint.files.reading import is_hub_id
from lowmem.errors import ForeignError, InvalidRequestError, SourceError
from lowmem.models.layer_state import check_checkpoint
from lowmem.plan import device as machine
from lowmem.plan.bandwidth import card_bandwidth, host_bandwidth
from lowmem.plan.candidates import (
    Candidate,
    by_bits,
    convertible,
    find_candidates,
    with_8bit_head,
    with_spare_heads,
)
from lowmem.plan.drafts import Draft, draft_of, find_draft, suggestion
from lowmem.plan.fit.candidate import made_to_fit
from lowmem.plan.memory import CUDA_CONTEXT, HEAD_BITS
from lowmem.plan.planner import Budget, Plan, default_context, make_plan
from lowmem.text.units import format_bytes

if TYPE_CHECKING:
    import torch

VRAM_VARIABLE = "LOWMEM_VRAM"


@dataclass(frozen=True)
class ModelRequest:
    """Which model to run, and where. None leaves a choice to the plan.

    Raises RecipeError for a size that cannot be parsed, InvalidRequestError for other bits of the head.
    """

    model: str | os.PathLike[str]
    """A folder, a weight file, a hub id, or a name from `lowmem list`."""
    context: int | None = None
    """Tokens of prompt and answer together."""
    bits: int | None = None
    """Only versions with this many bits per weight: 32, 16, or one of config.BITS."""
    method: str | None = None
    """Only "gptq" (converted), "int8" or "nf4" (bitsandbytes, while loading) or "dense" (as published)."""
    device: str = "auto"
    """One of `cards.find.DEVICES`."""
    vram: int | str | None = None
    """Memory of the card to plan with, in bytes or as text such as "12GiB"; by default what is free."""
    ram: int | str | None = None
    """Memory of the host to plan with, likewise."""
    dtype: str | None = None
    """Of activations and dense weights: "float32", "bfloat16" or "float16"."""
    bandwidth: float | None = None
    """Bytes per second of a card that is not in this machine."""
    activation_bits: int | None = None
    """8, 12 or 16: see `kernels.native.linear.activation_bits`."""
    head_bits: int | None = None
    """8 holds the head and the token embedding in 8 bits, 16 never does; None: where a better version then
    fits the card."""
    draft: str | os.PathLike[str] | None = None
    """A small model that drafts tokens, named as `model` is: its vocabulary begins like the model's."""
    check: bool = False
    """Compare all files with their digests before loading."""
    verbose: bool = False
    """Print the plan's reason and the progress of a download on standard error."""

    def __post_init__(self) -> None:
        _ = self.vram_bytes, self.ram_bytes  # raise now, not when the plan is made
        if self.head_bits not in (None, *HEAD_BITS):
            raise InvalidRequestError(f"head_bits={self.head_bits} is not supported", "Use 16 or 8")

    @property
    def vram_bytes(self) -> int | None:
        """`vram` in bytes."""
        return _size(self.vram, "vram")

    @property
    def ram_bytes(self) -> int | None:
        """`ram` in bytes."""
        return _size(self.ram, "ram")


def plan_for(request: ModelRequest, *, named_card: bool = False, measure: bool = False) -> Plan:
    """Find the versions of the model and plan. Imports torch only where a card's driver is installed.

    named_card: plan for a card with `vram` that is not in this machine. measure: include tokens/s, from
    memory bandwidth that is measured unless an earlier run did. Raises LowmemError.
    """
    model, vram = os.fspath(request.model), request.vram_bytes or vram_of_environment()
    card = None if request.device == "cpu" or (named_card and vram) else find_card(request.device)
    if card is None and request.vram is not None and not named_card:
        raise InvalidRequestError(
            "--vram needs a card, and this machine has none", "Use --ram SIZE to limit the memory of the CPU"
        )
    on_card = card is not None or (named_card and vram is not None and request.device != "cpu")
    candidates = find_candidates(model, cuda=on_card, dtype=request.dtype)
    possible = [] if request.method else convertible(model, candidates, cuda=on_card)
    context = context_of(request, candidates)
    if request.bits is not None:
        possible = [c for c in possible if c.has_bits(request.bits)]
    budget = _budget(request, card, vram if on_card else None, measure)
    draft = _draft(request, context, budget)
    if draft is not None:
        budget = _beside(budget, draft)
    if possible and request.bits is None and (mixed := made_to_fit(model, candidates, budget, context)):
        possible = sorted([*possible, mixed], key=by_bits)
    matching = _with_heads(_matching(candidates, request), request, on_card)
    plan = make_plan(matching, budget, context, _with_heads(possible, request, on_card))
    return _with_draft(plan, draft)


def plan_or_download(request: ModelRequest, notify: Callable[[str], None]) -> Plan:
    """`plan_for`; a hub id that is not on this machine is downloaded first, if it is of a kind that runs.

    notify: receives the progress of the download, a line at a time.
    """
    if request.draft is not None:
        request = replace(request, draft=_draft_or_download(os.fspath(request.draft), notify))
    model = os.fspath(request.model)
    try:
        return plan_for(request)
    except SourceError:
        if typed_path(model).exists() or not is_hub_id(model):
            raise
    return plan_for(replace(request, model=_download(model, notify)))


def find_or_download(request: ModelRequest, notify: Callable[[str], None], *, cuda: bool) -> list[Candidate]:
    """The versions with the requested bits and method, best first.

    A hub id that is not on this machine is downloaded. Raises SourceError if there is no version.
    """
    model = os.fspath(request.model)
    try:
        candidates = find_candidates(model, cuda=cuda, dtype=request.dtype)
    except SourceError:
        if typed_path(model).exists() or not is_hub_id(model):
            raise
        model = os.fspath(_download(model, notify))
        candidates = find_candidates(model, cuda=cuda, dtype=request.dtype)
    return _matching(candidates, request)


def context_of(request: ModelRequest, candidates: list[Candidate]) -> int:
    """The tokens of prompt and answer together.

    Raises InvalidRequestError for more than the model has positions.
    """
    context = request.context or default_context(candidates)
    positions = candidates[0].shape.positions
    if request.context is not None and not 0 < context <= (positions or context):
        raise InvalidRequestError(
            f"--context {context} is out of range: the model has {positions} positions", "Use a smaller one"
        )
    return context


def _draft_or_download(name: str, notify: Callable[[str], None]) -> str | os.PathLike[str]:
    """The name of a draft model, or the folder to which it was downloaded."""
    try:
        find_draft(name, cuda=False, dtype=None)
    except SourceError:
        if typed_path(name).exists() or not is_hub_id(name):
            raise
        return _download(name, notify)
    return name


def _download(model: str, notify: Callable[[str], None]) -> os.PathLike[str]:
    from lowmem.checkpoint.source.hub import download

    try:
        return download(model, progress=notify, check=check_checkpoint)
    except ForeignError:
        raise
    except SourceError as error:
        raise SourceError(f"no version of {model} is on this machine: {error.message}", error.hint) from error


def find_card(device: str) -> torch.device | None:
    """The card that `device` names, or None for the CPU. Imports torch only if a driver is installed.

    Raises InvalidRequestError for an unknown name, or a card that is not in this machine.
    """
    if device == "cpu" or (device == "auto" and not driver_present()):
        return None
    found = resolve_device(device)
    return found if is_card(found) else None


def _size(value: int | str | None, name: str) -> int | None:
    return machine.parse_bytes(value, name) if isinstance(value, str) else value


def vram_of_environment() -> int | None:
    """The bytes of $LOWMEM_VRAM; None if it is not set. Raises RecipeError for text that is not a size."""
    text = os.environ.get(VRAM_VARIABLE)
    return machine.parse_bytes(text, f"${VRAM_VARIABLE}") if text else None


def _budget(request: ModelRequest, card: torch.device | None, vram: int | None, measure: bool) -> Budget:
    host = request.ram_bytes or machine.host_memory_available() + machine.host_memory_private()
    rate = host_bandwidth().bytes_per_second if measure else None
    support = machine.kernel_support(card)
    if card is None and vram is None:
        return Budget("cpu", host, host_bandwidth=rate, support=support)
    if card is None:
        assert vram is not None
        name = f"a card with {format_bytes(vram)}"
        return Budget(name, host, vram, CUDA_CONTEXT, rate, request.bandwidth, support)
    rate_on_card = request.bandwidth or (card_bandwidth(card) if measure else None)
    free, own = (machine.card_memory_free(card), 0) if vram is None else (vram, CUDA_CONTEXT)
    if machine.shares_memory(card):
        host = max(0, host - free)
    return Budget(str(card), host, free, own, rate, rate_on_card, support)


def _draft(request: ModelRequest, context: int, budget: Budget) -> Draft | None:
    """The draft model that is asked for."""
    if request.draft is None:
        return None
    name, cuda = os.fspath(request.draft), budget.card is not None
    candidate = find_draft(name, cuda=cuda, dtype=request.dtype)
    return draft_of(name, candidate, context, cuda=cuda, support=budget.support)


def _beside(budget: Budget, draft: Draft) -> Budget:
    """The memory that a draft leaves. With a card, the host's shrinks too: the draft may end up there."""
    card = None if budget.card is None else max(0, budget.card - draft.need.total)
    return replace(budget, host=max(0, budget.host - draft.need.total), card=card)


def _with_draft(plan: Plan, draft: Draft | None) -> Plan:
    """The plan with its draft, or with a sentence on a draft that would fit."""
    option, budget = plan.chosen, plan.budget
    if draft is not None:
        name, size = draft.candidate.path.name, format_bytes(draft.need.total)
        text = f" The draft model {name} ({draft.candidate.label}) takes {size} beside it."
        return replace(plan, draft=draft, reason=plan.reason + text)
    room = budget.memory(option.device) - option.need.total
    text = suggestion(option.candidate.shape, plan.context, room)
    return replace(plan, reason=plan.reason + text)


def _with_heads(candidates: list[Candidate], request: ModelRequest, on_card: bool) -> list[Candidate]:
    """The candidates with the head that is asked for; on a card, without a wish, also with a spare one.

    Raises InvalidRequestError if an 8-bit head is asked for and no candidate can have one.
    """
    if request.head_bits is None:
        return with_spare_heads(candidates) if on_card else candidates
    if request.head_bits == 16:
        return candidates
    found = [c for c in map(with_8bit_head, candidates) if c is not None]
    if candidates and not found:
        raise InvalidRequestError(
            f"the head and the embedding of {request.model} cannot be held in 8 bits: their size is not a "
            "multiple of 32, or lowmem does not know them",
            "Use --head-bits 16",
        )
    return found


def _matching(candidates: list[Candidate], request: ModelRequest) -> list[Candidate]:
    """The candidates with the requested bits and method. Raises SourceError if none matches."""
    bits, method = request.bits, request.method
    found = [c for c in candidates if (bits is None or c.has_bits(bits)) and method in (None, c.form.method)]
    if found:
        return found
    if method in (None, "gptq") and any(c.form.method == "dense" for c in candidates):
        width = f" --bits {bits}" if bits else ""
        hint = f"Make it with: lowmem convert {request.model}{width}"
    else:
        hint = "Use one of these, or leave the choice to the plan"
    what = f"{bits}-bit" if bits else method
    labels = ", ".join(c.label for c in candidates)
    raise SourceError(f"{request.model} has no {what} version here; available: {labels}", hint)
