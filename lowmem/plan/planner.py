"""(candidates, memory budget, context) → the version to run, with the reason. Pure: nothing is measured here.

The planner takes the best candidate that fits the device whole. If none does, it moves decoder layers to the
CPU: it takes the best candidate that keeps at least half of them on the card, or else the one with the fewest
bytes on the CPU. If that does not fit either, it takes the best that fits the host's memory. A refusal names
the least memory that would be enough.

A candidate `only_to_fit`, which has an 8-bit head, follows its plain version. So it is chosen where it fits a
card, or keeps half of its layers there, and the plain version does not. Elsewhere it is never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowmem.config import DEFAULT_CONTEXT
from lowmem.errors import MemoryBudgetError
from lowmem.kernels.registry import USUAL_SUPPORT, KernelSupport
from lowmem.plan.candidates import Candidate, by_bits
from lowmem.plan.drafts import Draft
from lowmem.plan.memory import (
    HOST_CONTEXT,
    Form,
    Need,
    bytes_read_a_token,
    kv_cache_bytes,
    need_of_split,
    need_on_device,
)
from lowmem.plan.shape import ModelShape
from lowmem.text.units import format_bytes

_MIB = 1 << 20


@dataclass(frozen=True)
class Budget:
    """The memory that may be used, and how fast it is."""

    device: str
    """"cpu", "cuda:0", or a description of a card that is not in this machine."""
    host: int
    """Bytes of host memory."""
    card: int | None = None
    """Bytes of the card's memory; None without a card."""
    own_context: int = 0
    """Bytes of `card` that the process's own CUDA context will take."""
    host_bandwidth: float | None = None
    """Bytes a second; None where unknown."""
    card_bandwidth: float | None = None
    """Bytes a second; None where unknown."""
    support: KernelSupport = USUAL_SUPPORT

    def memory(self, device: str) -> int:
        """Bytes for what is on this device of an `Option`; of "split", the card's part."""
        return self.host if device == "cpu" else self.card or 0


@dataclass(frozen=True)
class Option:
    """One candidate in one place."""

    candidate: Candidate
    device: str
    """"card", "split" or "cpu"."""
    cpu_layers: int
    """Decoder layers on the CPU beside a card."""
    need: Need
    """Memory of the card, or of the host when `device` is "cpu"."""
    host: Need | None
    """Memory of the host when `device` is "split"."""
    short: int
    """Bytes by which `need` exceeds the budget; 0 if it fits."""
    longest: int
    """The longest context that fits; 0 if none does."""
    ceiling: float | None
    """Tokens/s at the measured memory bandwidth, each weight read once; None where that is unknown."""

    @property
    def fits(self) -> bool:
        """Whether it fits the budget."""
        return self.short == 0


@dataclass(frozen=True)
class Plan:
    """Which version to run, and the alternatives."""

    context: int
    """Tokens of prompt and answer together."""
    budget: Budget
    chosen: Option
    options: tuple[Option, ...]
    """Every candidate whole on the device, best first."""
    fallbacks: tuple[Option, ...]
    """Options to try next, in order, when an allocation fails in spite of the plan."""
    possible: tuple[Option, ...]
    """Versions that a conversion would make."""
    reason: str
    """One or two sentences for the user."""
    draft: Draft | None = None
    """The model that drafts for the chosen version. Its memory is not part of `budget`."""


def slot_bytes(plan: Plan, need: Need) -> int:
    """Bytes of each sequence's keys and values in one place of an option, the draft model's included."""
    return need.kv_cache + (plan.draft.need.kv_cache if plan.draft else 0)


def room_for_slots(plan: Plan) -> int:
    """Sequences whose KV caches fit in the plan's memory at once, beside the chosen version."""
    option, budget = plan.chosen, plan.budget
    sides = [(option.need, budget.memory(option.device))]
    if option.host is not None:
        sides.append((option.host, budget.host))
    more = [(have - need.total) // slot_bytes(plan, need) for need, have in sides if need.kv_cache]
    return 1 + max(0, min(more, default=0))


def planned_bytes(plan: Plan, option: Option, slots: int) -> int:
    """Bytes that an option and its draft model take on the option's device, for `slots` sequences at once."""
    draft = plan.draft.need.total if plan.draft else 0
    return option.need.total + draft + (slots - 1) * slot_bytes(plan, option.need)


PARALLEL = 4
"""Answers at once by default: four rows take little more than the time of one."""


def usual_slots(plan: Plan) -> int:
    """Answers at once: up to PARALLEL, as many as there is room for; 1 for layers on card and CPU."""
    return 1 if plan.chosen.device == "split" else min(PARALLEL, room_for_slots(plan))


def default_context(candidates: Sequence[Candidate]) -> int:
    """The model's longest context, DEFAULT_CONTEXT at most."""
    return min(candidates[0].shape.positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def make_plan(
    candidates: Sequence[Candidate], budget: Budget, context: int, possible: Sequence[Candidate] = ()
) -> Plan:
    """Choose among ranked candidates for `context` tokens of prompt and answer together.

    possible: versions that do not exist yet. Raises MemoryBudgetError, naming the least memory that would be
    enough, when nothing fits anywhere.
    """
    if budget.card is None:
        candidates = [c for c in candidates if not c.only_to_fit]
        possible = [c for c in possible if not c.only_to_fit]
    whole = [_whole(c, budget, context) for c in candidates]
    others = _worth_showing([_whole(c, budget, context) for c in possible])
    order = [option for option in whole if option.fits]
    if budget.card is not None:
        splits = [s for s in (_split(c, budget, context) for c in candidates) if s is not None]
        half = [s for s in splits if 2 * s.cpu_layers <= s.candidate.shape.layers]
        rest = [s for s in splits if s not in half and not s.candidate.only_to_fit]
        order += (
            half
            + sorted(rest, key=_host_weights)
            + [option for option in _on_host(candidates, budget, context) if option.fits]
        )
    if not order:
        raise _refusal(candidates, budget, context, others)
    chosen = order[0]
    options = _worth_showing(whole, chosen.candidate)
    smaller = [o for o in order[1:] if _weights(o) < _weights(chosen) or o.device != chosen.device]
    reason = _reason(chosen, options, budget, context) + _advice(chosen, others)
    if chosen.candidate.only_to_fit:
        reason += " Its head and embedding are rounded to 8 bits while loading (--head-bits 16: never)."
    return Plan(context, budget, chosen, options, tuple(smaller), others, reason)


def _whole(candidate: Candidate, budget: Budget, context: int) -> Option:
    """The candidate whole on the card, or on the CPU without a card."""
    return _alone(candidate, budget, context, cuda=budget.card is not None)


def _on_host(candidates: Sequence[Candidate], budget: Budget, context: int) -> list[Option]:
    """The candidates whole on the CPU, without the ones that are for a card."""
    return [_alone(c, budget, context, cuda=False) for c in candidates if not c.only_to_fit]


def _worth_showing(options: Sequence[Option], chosen: Candidate | None = None) -> tuple[Option, ...]:
    """Leave out what is `only_to_fit` and does not fit, or whose plain version, the one before, fits too."""
    return tuple(
        option
        for index, option in enumerate(options)
        if not option.candidate.only_to_fit
        or option.candidate is chosen
        or (option.fits and not options[index - 1].fits)
    )


def _alone(candidate: Candidate, budget: Budget, context: int, *, cuda: bool) -> Option:
    """The candidate whole on the card, or whole on the CPU."""
    shape, form = candidate.shape, candidate.form
    have, bandwidth, own = budget.host, budget.host_bandwidth, HOST_CONTEXT
    if cuda:
        have, bandwidth, own = budget.card or 0, budget.card_bandwidth, budget.own_context

    def need(tokens: int) -> Need:
        return need_on_device(shape, form, tokens, cuda=cuda, support=budget.support, own_context=own)

    rate = _rate([(bytes_read_a_token(shape, form), bandwidth)])
    longest = _longest(lambda tokens: need(tokens).total, have, candidate)
    short = max(0, need(context).total - have)
    cpu_layers = 0 if cuda or budget.card is None else shape.layers
    device = "card" if cuda else "cpu"
    return Option(candidate, device, cpu_layers, need(context), None, short, longest, rate)


def _split(candidate: Candidate, budget: Budget, context: int) -> Option | None:
    """As many decoder layers on the card as fit and the others on the CPU; None where that does not fit."""
    shape, form, card = candidate.shape, candidate.form, budget.card
    assert card is not None

    def needs(split: int, tokens: int) -> tuple[Need, Need]:
        return need_of_split(
            shape, form, tokens, split, support=budget.support, own_context=budget.own_context
        )

    fitting = [s for s in range(1, shape.layers) if needs(s, context)[0].total <= card]
    if not fitting:
        return None
    split = max(fitting)
    on_card, on_host = needs(split, context)
    if on_host.total > budget.host:
        return None

    def least(tokens: int) -> int:
        """The need of the tighter side, shifted so that it can be compared with the card's budget."""
        first, second = needs(split, tokens)
        return max(first.total, second.total - budget.host + card)

    rate = _rate(
        [
            (bytes_read_a_token(shape, form, range(split)), budget.card_bandwidth),
            (_read_on_host(shape, form, split), budget.host_bandwidth),
        ]
    )
    longest = _longest(least, card, candidate)
    return Option(candidate, "split", shape.layers - split, on_card, on_host, 0, longest, rate)


def _read_on_host(shape: ModelShape, form: Form, split: int) -> int:
    return bytes_read_a_token(shape, form, range(split, shape.layers), outside=False)


def _longest(need: Callable[[int], int], have: int, candidate: Candidate) -> int:
    """The most tokens whose need is at most `have`, by bisection: the need grows with the tokens."""
    low, high = 0, candidate.shape.positions or 1 << 20
    while low < high:
        middle = (low + high + 1) // 2
        if need(middle) <= have:
            low = middle
        else:
            high = middle - 1
    return low


def _rate(parts: list[tuple[int, float | None]]) -> float | None:
    seconds = 0.0
    for nbytes, bandwidth in parts:
        if not bandwidth:
            return None
        seconds += nbytes / bandwidth
    return 1 / seconds if seconds else None


def _host_weights(option: Option) -> int:
    return option.host.weights if option.host else 0


def _weights(option: Option) -> int:
    """Bytes of weights on both devices."""
    return option.need.weights + _host_weights(option)


def _reason(chosen: Option, options: Sequence[Option], budget: Budget, context: int) -> str:
    """One sentence for the user."""
    candidate, need = chosen.candidate, chosen.need
    have = budget.memory(chosen.device)
    size = f"needs {format_bytes(need.total)} of {format_bytes(have)} free"
    if chosen.device == "split":
        layers, host = candidate.shape.layers, chosen.host
        assert host is not None
        return (
            f"No version fits {budget.device} whole: {candidate.label} with {layers - chosen.cpu_layers} of "
            f"{layers} decoder layers on it ({format_bytes(need.total)} of {format_bytes(have)}) and "
            f"{chosen.cpu_layers} on the CPU ({format_bytes(host.total)} of memory)."
        )
    where = "the CPU" if chosen.device == "cpu" else budget.device
    if chosen.device == "cpu" and budget.card is not None:
        return (
            f"Not even a few layers fit {budget.device}, which has {format_bytes(budget.card)} free: "
            f"{candidate.label} on the CPU {size}."
        )
    better = options[: options.index(chosen)]
    if not better:
        what = "is the best version here" if len(options) > 1 else "is the only version available"
        return f"{candidate.label} {what} and fits {where} with a context of {context}: it {size}."
    nearest = min(better, key=lambda option: option.short)
    return (
        f"{candidate.label} is the best version that fits {where} with a context of {context}: it {size}; "
        f"{nearest.candidate.label} would need {format_bytes(nearest.short)} more."
    )


def _advice(chosen: Option, possible: Sequence[Option]) -> str:
    """A sentence on a conversion that would give a better version which fits, if there is one.

    A version that fits whole is better than one with layers on the CPU; otherwise `by_bits` decides.
    """
    for option in possible:
        better = chosen.cpu_layers > 0 or by_bits(option.candidate) < by_bits(chosen.candidate)
        if option.fits and better:
            better_one = option.candidate
            return f" {better_one.label} would be better and fit: make it with {better_one.command}."
    return ""


def _refusal(
    candidates: Sequence[Candidate], budget: Budget, context: int, possible: Sequence[Option]
) -> MemoryBudgetError:
    """The error that names the least memory with which a plan is found, in whole MiB."""
    smallest = min(_on_host(candidates, budget, context), key=lambda option: option.need.total)
    least, ram = smallest.candidate, math.ceil(smallest.need.total / _MIB)
    kv = math.ceil(kv_cache_bytes(least.shape, least.form, context) / _MIB)
    made = next((o.candidate for o in possible if o.fits), None)
    convert = f"make one that fits: {made.command}" if made else "convert to fewer bits"
    other = f"or {convert}, or use a shorter --context (its KV cache is {kv} MiB of that)"
    if budget.card is None:
        return MemoryBudgetError(
            f"no version of this model fits {format_bytes(budget.host)} of free memory "
            f"with a context of {context}",
            f"The least that would be enough is {ram}MiB ({least.label}); {other}",
        )
    cards = {c.label: _least_card(c, budget, context) for c in candidates}
    best = min(cards, key=lambda label: cards[label])
    return MemoryBudgetError(
        f"no version of this model fits {budget.device} with {format_bytes(budget.card)} free, nor with "
        f"layers in the {format_bytes(budget.host)} of free memory, at a context of {context}",
        f"The least that would be enough is --vram {math.ceil(cards[best] / _MIB)}MiB ({best}), or {ram}MiB "
        f"of memory ({least.label}); {other}",
    )


def _least_card(candidate: Candidate, budget: Budget, context: int) -> int:
    """The fewest bytes of card memory with which the candidate runs, with or without layers on the CPU."""
    shape, form = candidate.shape, candidate.form
    own, support = budget.own_context, budget.support
    least = need_on_device(shape, form, context, cuda=True, support=support, own_context=own).total
    for split in range(-(-shape.layers // 2) if candidate.only_to_fit else 1, shape.layers):
        card, host = need_of_split(shape, form, context, split, support=support, own_context=own)
        if host.total <= budget.host:
            least = min(least, card.total)
    return least
