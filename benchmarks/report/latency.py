"""The report's sections on what a form takes: tokens a second, latencies, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lowmem.benchmarks.common.records import DecodeLatency, LatencyRecord, Repeated, SubjectLatency
from lowmem.benchmarks.report.drawing import Style
from lowmem.benchmarks.report.numbers import (
    NOTHING,
    count,
    duration,
    milliseconds,
    percent,
    rate,
    significant,
    size,
    spread,
)
from lowmem.benchmarks.report.plots import Mark, Panel, Row, Series, drawn_twice, lines, row_chart
from lowmem.benchmarks.report.report import Column, Section, Table

DOES_NOT_FIT = "does not fit"


def latency_sections(record: LatencyRecord, styles: Mapping[str, Style]) -> list[Section]:
    """Decode against its ceiling, the spread of its latencies, prefill, memory."""
    found: list[Section] = []
    if not record.subjects:
        return found
    if any(s.decode or not s.fits for s in record.subjects):
        found.append(decode_section(record))
    if any(d.itl_seconds or d.itl_p50 > 0 for s in record.subjects for d in s.decode):
        found.append(itl_section(record))
    if any(s.prefill for s in record.subjects):
        found.append(prefill_section(record, styles))
    return [*found, memory_section(record)]


def per_second(tpot: Repeated) -> Repeated:
    """Seconds a token as tokens a second: the largest becomes the smallest."""
    values = tuple(1 / v if v > 0 else math.nan for v in (tpot.median, tpot.high, tpot.low, *tpot.values))
    return Repeated(values[0], values[1], values[2], values[3:])


def _contexts(record: LatencyRecord) -> list[int]:
    return sorted({d.context_tokens for s in record.subjects for d in s.decode})


def _context_name(context: int) -> str:
    return f"after {count(context)} token{'s' * (context != 1)} of context"


def _decode_at(subject: SubjectLatency, context: int) -> DecodeLatency | None:
    return next((d for d in subject.decode if d.context_tokens == context), None)


def decode_section(record: LatencyRecord) -> Section:
    """Tokens a second beside the most that memory allows."""
    panels = []
    for context in _contexts(record) or [0]:
        bars = [_decode_bar(s, _decode_at(s, context)) for s in record.subjects]
        panels.append(Panel(_context_name(context) if context else "", tuple(bar for bar in bars if bar)))
    title = "Tokens per second against the ceiling"
    description = (
        "For each form and context a bar as long as the tokens per second reached, inside an outline as long "
        "as the ceiling. The table that follows has the same figures."
    )
    plot = drawn_twice(
        "decode",
        title,
        description,
        lambda width: row_chart(
            width, panels, "tokens per second", [("reached", "solid"), ("ceiling", "outline")]
        ),
    )
    energy = any(d.joules_per_token is not None for s in record.subjects for d in s.decode)
    columns = (
        Column("Form", number=False),
        Column("Context", "Tokens before the first new one."),
        Column("Tokens/s", "Median of the rounds of 1 / TPOT (slowest–fastest round)."),
        Column("Ceiling", "Tokens per second if all that a token reads came as fast as it can."),
        Column("Reached", "Tokens per second over the ceiling."),
        Column("TPOT, ms", "Time per output token after the first: median of the rounds (least–most)."),
        Column("New tokens", "Generated in a round."),
        *((Column("J per token", "Energy that the machine counted."),) if energy else ()),
        Column("Kernel", "What multiplies; of a form that does not fit, why.", False),
    )
    rows: list[tuple[str, ...]] = []
    for s in record.subjects:
        if not s.fits:
            rows.append((s.subject.label, NOTHING, DOES_NOT_FIT, *[NOTHING] * (4 + energy), s.reason))
        for d in s.decode:
            joules = (NOTHING if d.joules_per_token is None else significant(d.joules_per_token),)
            rows.append(
                (
                    s.subject.label,
                    count(d.context_tokens),
                    spread(per_second(d.tpot)),
                    significant(d.ceiling_tokens_per_second),
                    percent(d.share),
                    spread(d.tpot, 1000),
                    count(d.new_tokens),
                    *(joules if energy else ()),
                    s.kernel,
                )
            )
    roof = record.roofline
    text = (
        f"Each new token reads all weights once. While this was measured the machine read memory at "
        f"{spread(roof.read_bytes_per_second, 1e-9)} GB/s and multiplied matrices at "
        f"{rate(roof.matmul_flops_per_second.median, 'FLOP')} in {roof.matmul_dtype}. The ceiling is what "
        "the machine allows for the bytes that a token of the form reads, from caches where they are so few.",
    )
    return Section("decode", title, text, (Table("Decode", columns, tuple(rows)),), plot)


def _decode_bar(s: SubjectLatency, d: DecodeLatency | None) -> Row | None:
    if not s.fits:
        return Row(s.subject.label, DOES_NOT_FIT, remark=s.reason)
    if d is None:
        return None
    reached = per_second(d.tpot).median
    marks = (Mark("bar", 0, reached), Mark("outline", 0, d.ceiling_tokens_per_second))
    said = f"{significant(reached)} of {significant(d.ceiling_tokens_per_second)} · {percent(d.share)}"
    return Row(s.subject.label, said, marks)


def itl_section(record: LatencyRecord) -> Section:
    """How evenly tokens come."""
    panels = []
    for context in _contexts(record):
        found = [(s, d) for s in record.subjects if (d := _decode_at(s, context))]
        panels.append(Panel(_context_name(context), tuple(_itl_row(s, d) for s, d in found)))
    title = "Latency between tokens"
    description = (
        "For each form and context the middle half of all inter-token latencies as a box, and the median, "
        "90th and 99th percentile as marks. The table that follows has the same figures."
    )
    legend = [*_SHAPES.items(), ("middle half", "outline")]
    plot = drawn_twice(
        "itl",
        title,
        description,
        lambda width: row_chart(width, panels, "milliseconds, logarithmic", legend, log=True),
    )
    columns = (
        Column("Form", number=False),
        Column("Context"),
        Column("p50, ms", "Half of the tokens came faster."),
        Column("p90, ms", "Nine of ten came faster."),
        Column("p99, ms", "99 of 100 came faster."),
        Column("max, ms", "The slowest of all."),
        Column("Latencies", "How many were measured, all rounds together."),
    )
    rows = tuple(
        (
            s.subject.label,
            count(d.context_tokens),
            *(milliseconds(v) for v in (d.itl_p50, d.itl_p90, d.itl_p99)),
            milliseconds(max(d.itl_seconds)) if d.itl_seconds else NOTHING,
            count(len(d.itl_seconds)),
        )
        for s in record.subjects
        for d in s.decode
    )
    text = (
        "The time from one token to the next, over every token of every round: what a reader of a growing "
        "answer feels.",
    )
    return Section("itl", title, text, (Table("Inter-token latency", columns, rows),), plot)


_SHAPES = {"p50": "o", "p90": "^", "p99": "D"}


def _itl_row(s: SubjectLatency, d: DecodeLatency) -> Row:
    values = sorted(1000 * v for v in d.itl_seconds)
    p50, p90, p99 = (1000 * v for v in (d.itl_p50, d.itl_p90, d.itl_p99))
    marks = [Mark("line", values[0] if values else p50, p99)]
    if values:
        marks.append(Mark("box", values[len(values) // 4], values[(3 * len(values)) // 4]))
    marks += [Mark("point", v, v, shape) for v, shape in zip((p50, p90, p99), _SHAPES.values(), strict=True)]
    return Row(
        s.subject.label, f"{significant(p50)} · {significant(p90)} · {significant(p99)} ms", tuple(marks)
    )


def prefill_section(record: LatencyRecord, styles: Mapping[str, Style]) -> Section:
    """How fast a prompt is read."""
    found = [s for s in record.subjects if s.prefill]
    lengths = sorted({p.prompt_tokens for s in found for p in s.prefill})
    series = []
    for s in found:
        ordered = sorted(s.prefill, key=lambda p: p.prompt_tokens)
        speeds = [p.tokens_per_second for p in ordered]
        points = tuple(
            (math.log2(max(p.prompt_tokens, 1)), v.median) for p, v in zip(ordered, speeds, strict=True)
        )
        errors = tuple((max(v.median - v.low, 0), max(v.high - v.median, 0)) for v in speeds)
        series.append(Series(s.subject.label, styles[s.subject.label], points, errors))
    title = "Prefill against prompt length"
    description = (
        f"Prompt tokens read per second, against the prompt's length, of {len(series)} forms. The table that "
        "follows has the same figures."
    )
    ticks = [(math.log2(max(length, 1)), count(length)) for length in lengths]
    plot = drawn_twice(
        "prefill",
        title,
        description,
        lambda width: lines(
            width, series, ticks, "tokens of the prompt, logarithmic", "prompt tokens per second", log=False
        ),
    )
    columns = (
        Column("Form", number=False),
        Column("Prompt", "Tokens of the prompt."),
        Column("Tokens/s", "Median of the rounds (slowest–fastest)."),
        Column("Ceiling", "Tokens per second that the measured rates of memory and arithmetic allow."),
        Column("Reached", "Tokens per second over the ceiling."),
        Column(
            "TTFT, ms", "Time from the request to the first new token: median of the rounds (least–most)."
        ),
    )
    rows = tuple(
        (
            s.subject.label,
            count(p.prompt_tokens),
            spread(p.tokens_per_second),
            significant(p.ceiling_tokens_per_second),
            percent(p.share),
            spread(p.ttft, 1000),
        )
        for s in found
        for p in s.prefill
    )
    text = (
        "How fast a prompt is read before the first new token comes. Strokes reach from the slowest round to "
        "the fastest.",
    )
    return Section("prefill", title, text, (Table("Prefill", columns, rows),), plot)


def memory_section(record: LatencyRecord) -> Section:
    """What was planned, and what it took."""
    unit, name = (2.0**30, "GiB") if _largest(record.subjects) >= 2**30 else (2.0**20, "MiB")
    device = any(s.peak_device_bytes for s in record.subjects)
    legend = [
        ("planned", "outline"),
        ("peak, host", "solid"),
        *((("peak, device", "second"),) if device else ()),
    ]
    panel = Panel("", tuple(_memory_bar(s, unit) for s in record.subjects))
    title = "Memory"
    description = (
        "For each form the planned memory as an outline and the peak that was used as a bar. The table that "
        "follows has the same figures."
    )
    plot = drawn_twice("memory", title, description, lambda width: row_chart(width, [panel], name, legend))
    columns = (
        Column("Form", number=False),
        Column("Weights", "Of the whole model as they are held."),
        Column("Planned", "Weights, KV cache and workspace, as predicted before loading."),
        Column("Peak, host", "The most main memory that the process held."),
        *((Column("Peak, device", "The most memory of the card that was allocated."),) if device else ()),
        Column("Load", "Time from nothing to ready: median of the rounds (least–most)."),
        Column("Fits", number=False),
    )
    rows = tuple(
        (
            s.subject.label,
            size(s.subject.weight_bytes),
            size(s.needed_bytes),
            size(s.peak_host_bytes),
            *((size(s.peak_device_bytes),) if device else ()),
            _load_time(s),
            "yes" if s.fits else f"{DOES_NOT_FIT}: {s.reason}",
        )
        for s in record.subjects
    )
    if all(s.fits for s in record.subjects):
        columns, rows = columns[:-1], tuple(row[:-1] for row in rows)
    text = ("What the planner predicted before loading, and the most that the process then held.",)
    return Section("memory", title, text, (Table("Memory and load time", columns, rows),), plot)


def _largest(subjects: Sequence[SubjectLatency]) -> int:
    return max((max(s.needed_bytes, s.peak_host_bytes + s.peak_device_bytes) for s in subjects), default=0)


def _load_time(s: SubjectLatency) -> str:
    if s.load_seconds is None:
        return NOTHING
    if len(s.load_seconds.values) < 2:
        return duration(s.load_seconds.median)
    return (
        f"{duration(s.load_seconds.median)} ({duration(s.load_seconds.low)}–{duration(s.load_seconds.high)})"
    )


def _memory_bar(s: SubjectLatency, unit: float) -> Row:
    host, card, planned = (v / unit for v in (s.peak_host_bytes, s.peak_device_bytes, s.needed_bytes))
    outline = Mark("outline", 0, planned)
    if not s.fits:
        return Row(s.subject.label, f"{DOES_NOT_FIT} · {size(s.needed_bytes)}", (outline,))
    marks = [Mark("bar", 0, host), *([Mark("second", host, host + card)] if card else []), outline]
    peak = size(s.peak_host_bytes + s.peak_device_bytes)
    return Row(s.subject.label, f"{peak} · planned {size(s.needed_bytes)}", tuple(marks))
