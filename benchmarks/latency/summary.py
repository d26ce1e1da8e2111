"""Timings → latency record: medians, quantiles, ceilings, drift, and warnings about the figures."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from lowmem.benchmarks.common.currency import made_with
from lowmem.benchmarks.common.records import (
    BatchLatency,
    DecodeLatency,
    LatencyRecord,
    Origin,
    PrefillLatency,
    Repeated,
    Roofline,
    SubjectLatency,
)
from lowmem.benchmarks.latency.planning import PlannedVersion, usual_dtype
from lowmem.benchmarks.latency.roofline import Rates
from lowmem.benchmarks.latency.rounds import Rounds
from lowmem.benchmarks.latency.tasks import Timings

from lowmem.text.units import format_bytes

DRIFT = 0.10
"""A larger change of memory bandwidth between rounds is worth a warning."""
_CACHED = 1.1
"""Reads this much faster than memory come from a cache."""
_OVER = 1.05
"""A larger share of a ceiling is not explained by noise."""


def repeated(values: Sequence[float]) -> Repeated:
    """Summarize the values of all rounds by their median, smallest and largest."""
    return Repeated(statistics.median(values), min(values), max(values), tuple(values))


def drift_of(per_round: Sequence[float]) -> float:
    """Compute largest over smallest, minus 1."""
    return max(per_round) / min(per_round) - 1


def roofline_of(results: Mapping[str, Sequence[Timings]], dtypes: Mapping[str, str]) -> Roofline:
    """Compute one value per round: the median of the rates measured beside each version.

    results, dtypes: by label. Matrix products are those in the dtype of most versions.
    """
    dtype = Counter(dtypes[label] for label in results).most_common(1)[0][0]
    rounds = range(min(len(found) for found in results.values()))

    def each(figure: Callable[[Rates], float], labels: Iterable[str]) -> Repeated:
        names = list(labels)
        return repeated(
            [statistics.median(figure(r) for label in names for r in results[label][i].rates) for i in rounds]
        )

    return Roofline(
        each(lambda rates: rates.read, results),
        each(lambda rates: rates.matmul, [label for label in results if dtypes[label] == dtype]),
        dtype,
    )


def subject_latency(planned: PlannedVersion, found: Sequence[Timings], failure: str = "") -> SubjectLatency:
    """Summarize all rounds of one version. failure: the reason if there are none."""
    subject = planned.entrant.subject
    if reason := planned.reason or failure:
        return SubjectLatency(subject, False, reason, planned.needed_bytes, "", None, (), (), 0, 0)
    kernel = found[0].kernel
    return SubjectLatency(
        subject=replace(subject, made_with=made_with(planned.entrant.candidate.path, kernel)),
        fits=True,
        reason="",
        needed_bytes=planned.needed_bytes,
        kernel=kernel,
        load_seconds=repeated([timings.load_seconds for timings in found]),
        prefill=tuple(_prefill(planned, found, i) for i in range(len(planned.lengths.prompts))),
        decode=tuple(_decode(planned, found, i) for i in range(len(planned.lengths.contexts))),
        peak_host_bytes=max(timings.peak_host_bytes for timings in found),
        peak_device_bytes=max(timings.peak_device_bytes for timings in found),
        batch=_batch(planned.lengths.new_tokens, found),
    )


def own_read(found: Sequence[Timings]) -> float:
    """Bytes per second of reading as many bytes as a token of the version reads."""
    return statistics.median(rates.own for timings in found for rates in timings.rates)


def _prefill(planned: PlannedVersion, found: Sequence[Timings], index: int) -> PrefillLatency:
    tokens = planned.lengths.prompts[index]
    ttft = [timings.prompts[index].ttft for timings in found]
    speed = repeated([tokens / seconds for seconds in ttft])
    matmul = statistics.median(rates.matmul for timings in found for rates in timings.rates)
    ceiling = planned.prefill_ceiling(tokens, own_read(found), matmul)
    return PrefillLatency(tokens, repeated(ttft), speed, ceiling, speed.median / ceiling)


def _batch(new_tokens: int, found: Sequence[Timings]) -> BatchLatency | None:
    pairs = [(timings.batch, timings.decodes[0].tpot) for timings in found]
    steps = [(statistics.fmean(batch.steps), one, batch) for batch, one in pairs if batch is not None]
    if not steps:
        return None
    batch = steps[0][2]
    return BatchLatency(
        batch.sequences,
        batch.context,
        new_tokens,
        repeated([step for step, _, _ in steps]),
        repeated([batch.sequences * one / step for step, one, _ in steps]),
    )


def _decode(planned: PlannedVersion, found: Sequence[Timings], index: int) -> DecodeLatency:
    context, new = planned.lengths.contexts[index], planned.lengths.new_tokens
    decodes = [timings.decodes[index] for timings in found]
    gaps = tuple(gap for decode in decodes for gap in decode.gaps)
    p50, p90, p99 = map(float, np.quantile(gaps, (0.5, 0.9, 0.99)))
    tpot = repeated([decode.tpot for decode in decodes])
    ceiling = planned.decode_ceiling(context, own_read(found))
    joules = [decode.joules / new for decode in decodes if decode.joules is not None]
    return DecodeLatency(
        context_tokens=context,
        new_tokens=new,
        tpot=tpot,
        itl_p50=p50,
        itl_p90=p90,
        itl_p99=p99,
        itl_seconds=gaps,
        ceiling_tokens_per_second=ceiling,
        share=1 / tpot.median / ceiling,
        joules_per_token=statistics.median(joules) if len(joules) == len(decodes) else None,
    )


def make_record(origin: Origin, rounds: Rounds, probe: Timings, warnings: Sequence[str]) -> LatencyRecord:
    """Create the record of all complete rounds. probe: timings of the machine alone, used if no version
    fits.
    """
    planned, results = rounds.planned, rounds.results()
    dtypes = {one.label: one.entrant.subject.dtype for one in planned}
    if results:
        roofline = roofline_of(results, dtypes)
        threads = next(iter(results.values()))[0].threads
    else:
        roofline = roofline_of({"": [probe]}, {"": usual_dtype(planned)})
        threads = probe.threads
    drift = drift_of(roofline.read_bytes_per_second.values)
    subjects = tuple(
        subject_latency(one, results.get(one.label, ()), rounds.failures.get(one.label, ""))
        for one in planned
    )
    lines = [*warnings, *(note for one in planned for note in one.lengths.notes)]
    if drift > DRIFT:
        lines.append(
            f"memory bandwidth changed by {drift:.0%} between rounds: compare the versions, which were "
            "interleaved, but not this run with others"
        )
    read = roofline.read_bytes_per_second.median
    for one in planned:
        own = own_read(results[one.label]) if one.label in results else 0.0
        if own > _CACHED * read:
            lines.append(
                f"{one.label}: some of the {format_bytes(one.own_bytes)} that a token reads stay in caches, "
                f"so the ceiling is computed from {own / 1e9:.1f} GB/s, not from memory bandwidth"
            )
    for subject in subjects:
        shares = [d.share for d in subject.decode] + [p.share for p in subject.prefill]
        if shares and max(shares) > _OVER:
            lines.append(
                f"{subject.subject.label} reached {max(shares):.0%} of a ceiling: the machine was slower "
                f"while the ceiling was measured, or the kernel multiplies in a narrower type than "
                f"{subject.subject.dtype}"
            )
    count = len(roofline.read_bytes_per_second.values) if results else 0
    return LatencyRecord(origin, count, threads, roofline, drift, tuple(dict.fromkeys(lines)), subjects)
