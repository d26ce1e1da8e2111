"""From times to a latency record: which lengths, what fits, ceilings, medians, drift. Nothing runs here."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lowmem.benchmarks.common.lineup import Entrant
from lowmem.benchmarks.common.records import (
    DecodeLatency,
    Origin,
    PrefillLatency,
    Repeated,
    Roofline,
    SubjectLatency,
)
from lowmem.benchmarks.common.records import LatencyRecord as Record
from lowmem.benchmarks.latency.roofline import Rates, decode_ceiling, prefill_ceiling
from lowmem.benchmarks.latency.worker import Visit

from lowmem.errors import InvalidRequestError
from lowmem.plan.memory import HOST_CONTEXT, bytes_read_a_token, need_on_device
from lowmem.text.units import format_bytes

PROMPTS = (32, 128, 512, 2048)
CONTEXTS = (128, 1024, 4096)
NEW_TOKENS = 64
ROUNDS = 3
DRIFT = 0.10
"""More change than this of the machine itself is worth a warning."""
_CACHED = 1.1  # times the rate of memory: reads so fast come out of a cache
_OVER = 1.05  # a share of the ceiling that noise does not explain


@dataclass(frozen=True)
class Lengths:
    """Token counts, rising, and what was left out of those that were asked for."""

    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    notes: tuple[str, ...] = ()

    @property
    def context(self) -> int:
        """Tokens that the KV cache is made for."""
        decoded = max(self.contexts, default=0) + self.new_tokens if self.contexts else 0
        return max(decoded, max(self.prompts, default=0))


@dataclass(frozen=True)
class Place:
    """Where everything runs. device: as torch names it. free: bytes that may be taken there, and how that is
    said. own: what a process takes before it loads anything, where `free` still has it."""

    device: str
    free: int
    said: str
    own: int = HOST_CONTEXT
    packs_nf4: bool = False


@dataclass(frozen=True)
class Entry:
    """An entrant with what is planned for it. lengths: those that fit. reason: why nothing fits, if so."""

    entrant: Entrant
    lengths: Lengths
    needed_bytes: int
    reason: str = ""

    @property
    def label(self) -> str:
        """The subject's."""
        return self.entrant.subject.label

    @property
    def own_bytes(self) -> int:
        """Of weights that a token reads."""
        return bytes_read_a_token(self.entrant.candidate.shape, self.entrant.candidate.form)


def choose_lengths(
    prompts: Sequence[int] | None, contexts: Sequence[int] | None, new_tokens: int, positions: int | None
) -> Lengths:
    """Those that the model has positions for; None takes the defaults.

    Of the default contexts, the first that does not fit is cut to the longest that does. What was asked for
    and does not fit is left out, with a note. Raises InvalidRequestError if nothing is left, or a number
    means nothing.
    """
    if new_tokens < 2:
        raise InvalidRequestError("--new-tokens below 2 leaves no time between tokens", "Use 64, say")
    if any(number < 1 for number in [*(prompts or ()), *(contexts or ())]):
        raise InvalidRequestError("a prompt or context of no tokens", "Give numbers of 1 and more")
    limit = positions or 1 << 31
    most = limit - new_tokens
    if contexts is None:
        wanted = [c for c in CONTEXTS if c <= most]
        contexts = wanted if len(wanted) == len(CONTEXTS) or most < 1 else [*wanted, most]
    asked = prompts if prompts is not None else [p for p in PROMPTS if p <= limit]
    notes = []
    if long := sorted({c for c in contexts if c > most}):
        notes.append(
            f"{_listed('context', long)} left out: with {new_tokens} new tokens that is more than "
            f"the model's {limit} positions"
        )
    if long := sorted({p for p in asked if p > limit}):
        notes.append(f"{_listed('prompt', long)} left out: the model has {limit} positions")
    found = Lengths(
        tuple(sorted({p for p in asked if p <= limit})),
        tuple(sorted({c for c in contexts if c <= most})),
        new_tokens,
        tuple(notes),
    )
    if not found.prompts or not found.contexts:
        raise InvalidRequestError(
            f"no length is left that fits the model's {limit} positions with {new_tokens} new tokens",
            "Ask for shorter --prompts and --contexts, or fewer --new-tokens",
        )
    return found


def _listed(word: str, numbers: Sequence[int]) -> str:
    many = len(numbers) > 1
    return f"{word}{'s' * many} {', '.join(map(str, numbers))} {'are' if many else 'is'}"


def enter(entrant: Entrant, lengths: Lengths, place: Place) -> Entry:
    """What of `lengths` the planner lets this form run in the memory there is."""
    shape, form = entrant.candidate.shape, entrant.candidate.form

    def need(tokens: int) -> int:
        return need_on_device(
            shape,
            form,
            tokens,
            cuda=place.device != "cpu",
            packs_nf4=place.packs_nf4,
            own_context=place.own,
        ).total

    new = lengths.new_tokens
    prompts = tuple(p for p in lengths.prompts if need(p) <= place.free)
    contexts = tuple(c for c in lengths.contexts if need(c + new) <= place.free)
    label = entrant.subject.label
    if not prompts or not contexts:
        tokens = max(min(lengths.prompts), min(lengths.contexts) + new)
        reason = f"needs {format_bytes(need(tokens))} with a context of {tokens}, and {place.said}"
        return Entry(entrant, lengths, need(tokens), reason)
    notes = []
    if left := len(lengths.prompts) + len(lengths.contexts) - len(prompts) - len(contexts):
        longest = f"prompts up to {prompts[-1]} and contexts up to {contexts[-1]}"
        notes.append(f"{label}: {left} lengths do not fit the memory; {longest} were measured")
    fitting = Lengths(prompts, contexts, new, tuple(notes))
    return Entry(entrant, fitting, need(fitting.context))


def order(count: int, round_number: int) -> list[int]:
    """The places of `count` entrants in a round: each round begins one further on."""
    first = round_number % count
    return [*range(first, count), *range(first)]


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which `share` of all lie, interpolated between the two nearest (numpy's "linear")."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def repeated(values: Sequence[float]) -> Repeated:
    """Values of several rounds, with their median and their ends."""
    return Repeated(statistics.median(values), min(values), max(values), tuple(values))


def drift_of(per_round: Sequence[float]) -> float:
    """The largest over the smallest, minus 1."""
    return max(per_round) / min(per_round) - 1


Visits = Mapping[str, Sequence[Visit]]
"""Label → one visit a round, in their order; a form that failed is not among them."""


def roofline_of(visits: Visits, dtypes: Mapping[str, str]) -> Roofline:
    """One value a round: the median of what was seen beside each form. The dtype is that of most forms."""
    dtype = Counter(dtypes[label] for label in visits).most_common(1)[0][0]
    rounds = range(min(len(found) for found in visits.values()))

    def each(figure: Callable[[Rates], float], labels: Iterable[str]) -> Repeated:
        names = list(labels)
        return repeated(
            [statistics.median(figure(r) for label in names for r in visits[label][i].rates) for i in rounds]
        )

    return Roofline(
        each(lambda rates: rates.read, visits),
        each(lambda rates: rates.matmul, [label for label in visits if dtypes[label] == dtype]),
        dtype,
    )


def subject_latency(entry: Entry, visits: Sequence[Visit], failure: str = "") -> SubjectLatency:
    """All rounds of a form; `failure` tells why there are none."""
    subject = entry.entrant.subject
    reason = entry.reason or failure
    if reason:
        return SubjectLatency(subject, False, reason, entry.needed_bytes, "", None, (), (), 0, 0)
    return SubjectLatency(
        subject=subject,
        fits=True,
        reason="",
        needed_bytes=entry.needed_bytes,
        kernel=visits[0].kernel,
        load_seconds=repeated([visit.load_seconds for visit in visits]),
        prefill=tuple(_prefill(entry, visits, i) for i in range(len(entry.lengths.prompts))),
        decode=tuple(_decode(entry, visits, i) for i in range(len(entry.lengths.contexts))),
        peak_host_bytes=max(visit.peak_host_bytes for visit in visits),
        peak_device_bytes=max(visit.peak_device_bytes for visit in visits),
    )


def own_read(visits: Sequence[Visit]) -> float:
    """Bytes a second at which as many bytes are read as the form reads a token."""
    return statistics.median(rates.own for visit in visits for rates in visit.rates)


def _prefill(entry: Entry, visits: Sequence[Visit], index: int) -> PrefillLatency:
    candidate, tokens = entry.entrant.candidate, entry.lengths.prompts[index]
    ttft = [visit.prompts[index].ttft for visit in visits]
    speed = repeated([tokens / seconds for seconds in ttft])
    matmul = statistics.median(rates.matmul for visit in visits for rates in visit.rates)
    ceiling = prefill_ceiling(candidate.shape, candidate.form, tokens, own_read(visits), matmul)
    return PrefillLatency(tokens, repeated(ttft), speed, ceiling, speed.median / ceiling)


def _decode(entry: Entry, visits: Sequence[Visit], index: int) -> DecodeLatency:
    candidate, context = entry.entrant.candidate, entry.lengths.contexts[index]
    new = entry.lengths.new_tokens
    found = [visit.decodes[index] for visit in visits]
    gaps = tuple(gap for decode in found for gap in decode.gaps)
    tpot = repeated([decode.tpot for decode in found])
    ceiling = decode_ceiling(candidate.shape, candidate.form, context, new, own_read(visits))
    joules = [decode.joules / new for decode in found if decode.joules is not None]
    return DecodeLatency(
        context_tokens=context,
        new_tokens=new,
        tpot=tpot,
        itl_p50=quantile(gaps, 0.5),
        itl_p90=quantile(gaps, 0.9),
        itl_p99=quantile(gaps, 0.99),
        itl_seconds=gaps,
        ceiling_tokens_per_second=ceiling,
        share=1 / tpot.median / ceiling,
        joules_per_token=statistics.median(joules) if len(joules) == len(found) else None,
    )


def make_record(
    origin: Origin,
    entries: Sequence[Entry],
    visits: Visits,
    failures: Mapping[str, str],
    probe: Visit,
    warnings: Sequence[str],
) -> Record:
    """The record of all whole rounds. probe: a look at the machine, all that there is where no form fits."""
    dtypes = {entry.label: entry.entrant.subject.dtype for entry in entries}
    if visits:
        roofline = roofline_of(visits, dtypes)
        threads = next(iter(visits.values()))[0].threads
    else:
        roofline = roofline_of({"": [probe]}, {"": probe_dtype(entries)})
        threads = probe.threads
    drift = drift_of(roofline.read_bytes_per_second.values)
    subjects = tuple(
        subject_latency(entry, visits.get(entry.label, ()), failures.get(entry.label, ""))
        for entry in entries
    )
    lines = [*warnings, *(note for entry in entries for note in entry.lengths.notes)]
    lines += _remarks(entries, visits, subjects, roofline, drift)
    rounds = len(roofline.read_bytes_per_second.values) if visits else 0
    return Record(origin, rounds, threads, roofline, drift, tuple(dict.fromkeys(lines)), subjects)


def probe_dtype(entries: Sequence[Entry]) -> str:
    """In which the first look at the machine multiplies: that of most forms."""
    return Counter(entry.entrant.subject.dtype for entry in entries).most_common(1)[0][0]


def _remarks(
    entries: Sequence[Entry],
    visits: Visits,
    subjects: Sequence[SubjectLatency],
    roofline: Roofline,
    drift: float,
) -> list[str]:
    """What the figures themselves say about their worth."""
    lines = []
    if drift > DRIFT:
        lines.append(
            f"The machine itself changed while this ran: in one round it read memory {drift:.0%} faster than "
            "in another. Compare the forms, which took turns, and not this run with others"
        )
    read = roofline.read_bytes_per_second.median
    for entry in entries:
        own = own_read(visits[entry.label]) if entry.label in visits else 0.0
        if own > _CACHED * read:
            lines.append(
                f"{entry.label}: the {format_bytes(entry.own_bytes)} that a token reads stay partly in "
                f"caches; its ceiling is that of reading so many bytes, {own / 1e9:.1f} GB/s, not memory's"
            )
    for subject in subjects:
        shares = [d.share for d in subject.decode] + [p.share for p in subject.prefill]
        if shares and max(shares) > _OVER:
            lines.append(
                f"{subject.subject.label} reached {max(shares):.0%} of a ceiling: the machine was slower "
                "when that was measured, or the kernel multiplies in something narrower than "
                f"{subject.subject.dtype}"
            )
    return lines
