"""The report's sections on speed and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lowmem.benchmarks.common.records import DecodeLatency, LatencyRecord, Repeated, SubjectLatency
from lowmem.benchmarks.report.document import Column, Section, Table
from lowmem.benchmarks.report.numbers import (
    NOTHING,
    count,
    duration,
    milliseconds,
    percent,
    plural,
    rate,
    significant,
    size,
    spread,
)
from lowmem.benchmarks.report.plots import POINTS, Panel, Row, Series, lines, rows
from lowmem.benchmarks.report.svg import Style, draw

DOES_NOT_FIT = "does not fit"
SAME_FIGURES = "The table below has the same figures."
_VERSION = Column("Version", number=False)


def latency_sections(record: LatencyRecord, styles: Mapping[str, Style]) -> list[Section]:
    """Create the measured sections: decode and its ceiling, inter-token latency, prefill, memory."""
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
    """Convert seconds per token to tokens per second; the longest time becomes the lowest rate."""
    values = tuple(1 / v if v > 0 else math.nan for v in (tpot.median, tpot.high, tpot.low, *tpot.values))
    return Repeated(values[0], values[1], values[2], values[3:])


def _by_context(record: LatencyRecord) -> dict[int, list[tuple[SubjectLatency, DecodeLatency]]]:
    """Context → what was measured after it, contexts rising."""
    found: dict[int, list[tuple[SubjectLatency, DecodeLatency]]] = {}
    for s in record.subjects:
        for d in s.decode:
            found.setdefault(d.context_tokens, []).append((s, d))
    return dict(sorted(found.items()))


def _after(context: int) -> str:
    return f"after a context of {plural(context, 'token')}"


def decode_section(record: LatencyRecord) -> Section:
    """Create the section on decode: tokens per second and the limit set by memory bandwidth."""
    left_out = tuple(
        Row(s.subject.label, DOES_NOT_FIT, remark=s.reason) for s in record.subjects if not s.fits
    )
    panels = [
        Panel(_after(context), (*left_out, *(_decode_row(s, d) for s, d in found)))
        for context, found in _by_context(record).items()
    ] or [Panel("", left_out)]
    title = "Tokens per second against the ceiling"
    legend = [("measured", "bar"), ("ceiling", "outline")]
    plot = draw(
        "decode",
        title,
        "For each version and context, a bar for the tokens per second that were measured inside an outline "
        f"for the ceiling. {SAME_FIGURES}",
        lambda figure: rows(figure, panels, "tokens per second", legend),
    )
    text = (
        "Each new token reads all weights once. The ceiling is the rate at which the machine reads as many "
        "bytes as a token needs; a small model is read from caches.",
        roofline_text(record),
    )
    tables = [table for table in (decode_table(record), batch_table(record)) if table.rows]
    return Section("decode", title, text, tuple(tables), plot)


def roofline_text(record: LatencyRecord) -> str:
    """Describe the machine's rates in one sentence."""
    roof = record.roofline
    flops = rate(roof.matmul_flops_per_second.median, "FLOP")
    return (
        f"The machine read memory at {spread(roof.read_bytes_per_second, 1e-9)} GB/s and multiplied matrices "
        f"at {flops} in {roof.matmul_dtype}, with {plural(record.threads, 'thread')}."
    )


def decode_table(record: LatencyRecord) -> Table:
    """Create the table of decode for every version and context."""
    energy = any(d.joules_per_token is not None for s in record.subjects for d in s.decode)
    columns = (
        _VERSION,
        Column("Context", "Tokens before the first new one."),
        Column("Tokens/s", "1 / TPOT: median of the rounds (slowest–fastest)."),
        Column("Ceiling", "Tokens per second if everything that a token reads came at full bandwidth."),
        Column("Reached", "Tokens per second over the ceiling."),
        Column("TPOT, ms", "Time per output token after the first: median of the rounds (least–most)."),
        Column("New tokens", "Generated in a round."),
        *((Column("J per token", "Energy by the machine's own counters."),) if energy else ()),
        Column("Kernel", "What multiplies; for a version that does not fit, the reason.", False),
    )
    cells: list[tuple[str, ...]] = []
    for s in record.subjects:
        if not s.fits:
            cells.append((s.subject.label, NOTHING, DOES_NOT_FIT, *[NOTHING] * (4 + energy), s.reason))
        for d in s.decode:
            joules = NOTHING if d.joules_per_token is None else significant(d.joules_per_token)
            cells.append(
                (
                    s.subject.label,
                    count(d.context_tokens),
                    spread(per_second(d.tpot)),
                    significant(d.ceiling_tokens_per_second),
                    percent(d.share),
                    spread(d.tpot, 1000),
                    count(d.new_tokens),
                    *((joules,) if energy else ()),
                    s.kernel,
                )
            )
    return Table("Decode", columns, tuple(cells))


def batch_table(record: LatencyRecord) -> Table:
    """Create the table of several answers at once; it has no rows if none were timed."""
    columns = (
        _VERSION,
        Column("Answers", "At once, each behind a prompt of its own."),
        Column("Context", "Tokens before the first new one of each."),
        Column("Tokens/s", "Of all together: median of the rounds (slowest–fastest)."),
        Column("Of one", "Tokens per second of all, over those of one answer after this context."),
        Column("TPOT, ms", "Time per output token of each answer."),
    )
    cells = tuple(
        (
            s.subject.label,
            count(s.batch.sequences),
            count(s.batch.context_tokens),
            spread(per_second(s.batch.step), s.batch.sequences),
            f"{s.batch.of_one.median:.2f} ×",
            spread(s.batch.step, 1000),
        )
        for s in record.subjects
        if s.batch is not None
    )
    return Table("Several answers at once", columns, cells)


def _decode_row(s: SubjectLatency, d: DecodeLatency) -> Row:
    reached, ceiling = per_second(d.tpot).median, d.ceiling_tokens_per_second
    value = f"{significant(reached)} of {significant(ceiling)} · {percent(d.share)}"
    return Row(s.subject.label, value, bars=(reached,), outline=ceiling)


def itl_section(record: LatencyRecord) -> Section:
    """Create the section on the spread of the time between tokens."""
    panels = [
        Panel(_after(context), tuple(_itl_row(s, d) for s, d in found))
        for context, found in _by_context(record).items()
    ]
    title = "Latency between tokens"
    legend = [*zip(("p50", "p90", "p99"), POINTS, strict=True), ("middle half", "outline")]
    plot = draw(
        "itl",
        title,
        "For each version and context, a box for the middle half of all inter-token latencies and markers "
        f"for the median, the 90th and the 99th percentile. {SAME_FIGURES}",
        lambda figure: rows(figure, panels, "milliseconds, logarithmic", legend, log=True),
    )
    columns = (
        _VERSION,
        Column("Context"),
        Column("p50, ms", "Half of the tokens were faster."),
        Column("p90, ms", "90 % were faster."),
        Column("p99, ms", "99 % were faster."),
        Column("max, ms", "The slowest."),
        Column("Latencies", "Number measured in all rounds together."),
    )
    cells = tuple(
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
    text = ("The time from one token to the next, for every token of every round.",)
    return Section("itl", title, text, (Table("Inter-token latency", columns, cells),), plot)


def _itl_row(s: SubjectLatency, d: DecodeLatency) -> Row:
    values = sorted(1000 * v for v in d.itl_seconds)
    points = (1000 * d.itl_p50, 1000 * d.itl_p90, 1000 * d.itl_p99)
    return Row(
        s.subject.label,
        " · ".join(map(significant, points)) + " ms",
        span=(values[0] if values else points[0], points[2]),
        box=(values[len(values) // 4], values[3 * len(values) // 4]) if values else None,
        points=points,
    )


def prefill_section(record: LatencyRecord, styles: Mapping[str, Style]) -> Section:
    """Create the section on the speed of prefill."""
    found = [s for s in record.subjects if s.prefill]
    lengths = sorted({p.prompt_tokens for s in found for p in s.prefill})
    series = []
    for s in found:
        ordered = [
            (_log_length(p.prompt_tokens), p.tokens_per_second)
            for p in sorted(s.prefill, key=lambda p: p.prompt_tokens)
        ]
        points = tuple((x, v.median) for x, v in ordered)
        errors = tuple((max(v.median - v.low, 0), max(v.high - v.median, 0)) for _, v in ordered)
        series.append(Series(s.subject.label, styles[s.subject.label], points, errors))
    title = "Prefill against prompt length"
    ticks = [(_log_length(length), count(length)) for length in lengths]
    names = ("tokens of the prompt, logarithmic", "prompt tokens per second")
    plot = draw(
        "prefill",
        title,
        f"Prompt tokens processed per second against the prompt's length, of {len(series)} versions. "
        f"{SAME_FIGURES}",
        lambda figure: lines(figure, series, ticks, names, log=False),
    )
    text = (
        "How fast a prompt is processed before the first new token. Vertical bars reach from the slowest "
        "round to the fastest.",
    )
    return Section("prefill", title, text, (prefill_table(record),), plot)


def prefill_table(record: LatencyRecord) -> Table:
    """Create the table of prefill for every version and prompt length."""
    columns = (
        _VERSION,
        Column("Prompt", "Tokens of the prompt."),
        Column("Tokens/s", "Median of the rounds (slowest–fastest)."),
        Column("Ceiling", "Tokens per second that memory bandwidth and arithmetic allow."),
        Column("Reached", "Tokens per second over the ceiling."),
        Column("TTFT, ms", "Time to the first new token: median of the rounds (least–most)."),
    )
    cells = tuple(
        (
            s.subject.label,
            count(p.prompt_tokens),
            spread(p.tokens_per_second),
            significant(p.ceiling_tokens_per_second),
            percent(p.share),
            spread(p.ttft, 1000),
        )
        for s in record.subjects
        for p in s.prefill
    )
    return Table("Prefill", columns, cells)


def _log_length(tokens: int) -> float:
    return math.log2(max(tokens, 1))


def memory_section(record: LatencyRecord) -> Section:
    """Create the section on planned and measured memory."""
    unit, name = (2.0**30, "GiB") if _largest(record.subjects) >= 2**30 else (2.0**20, "MiB")
    device = any(s.peak_device_bytes for s in record.subjects)
    legend = [("planned", "outline"), ("peak, host", "bar")]
    legend += [("peak, device", "second bar")] if device else []
    panel = Panel("", tuple(_memory_row(s, unit) for s in record.subjects))
    title = "Memory"
    plot = draw(
        "memory",
        title,
        f"For each version, the planned memory as an outline and the measured peak as a bar. {SAME_FIGURES}",
        lambda figure: rows(figure, [panel], name, legend),
    )
    text = ("The planner's prediction before loading, and the measured peak.",)
    return Section("memory", title, text, (memory_table(record),), plot)


def memory_table(record: LatencyRecord) -> Table:
    """Create the table of planned and measured memory and load time of every version."""
    device = any(s.peak_device_bytes for s in record.subjects)
    columns = (
        _VERSION,
        Column("Weights", "Of the whole model in memory."),
        Column("Planned", "Weights, KV cache and workspace, computed before loading."),
        Column("Peak, host", "Peak host memory of the process."),
        *((Column("Peak, device", "Peak memory allocated on the card."),) if device else ()),
        Column("Load", "Time to load the model: median of the rounds (least–most)."),
        Column("Fits", number=False),
    )
    cells = tuple(
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
        columns, cells = columns[:-1], tuple(row[:-1] for row in cells)
    return Table("Memory and load time", columns, cells)


def _largest(subjects: Sequence[SubjectLatency]) -> int:
    return max((max(s.needed_bytes, s.peak_host_bytes + s.peak_device_bytes) for s in subjects), default=0)


def _load_time(s: SubjectLatency) -> str:
    if s.load_seconds is None:
        return NOTHING
    median, low, high = map(duration, (s.load_seconds.median, s.load_seconds.low, s.load_seconds.high))
    return median if len(s.load_seconds.values) < 2 else f"{median} ({low}–{high})"


def _memory_row(s: SubjectLatency, unit: float) -> Row:
    planned = s.needed_bytes / unit
    if not s.fits:
        return Row(s.subject.label, f"{DOES_NOT_FIT} · {size(s.needed_bytes)}", outline=planned)
    peak = size(s.peak_host_bytes + s.peak_device_bytes)
    bars = (s.peak_host_bytes / unit, *((s.peak_device_bytes / unit,) if s.peak_device_bytes else ()))
    return Row(s.subject.label, f"{peak} · planned {size(s.needed_bytes)}", bars, planned)
