"""The report's sections on the quality of answers: KL divergence, perplexity, HumanEval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowmem.benchmarks.common.records import (
    Bucket,
    HumanEvalRecord,
    QualityRecord,
    SubjectHumanEval,
    SubjectQuality,
    TextQuality,
)
from lowmem.benchmarks.report.document import Column, Section, Table
from lowmem.benchmarks.report.numbers import NOTHING, count, percent, significant, size, times, with_error
from lowmem.benchmarks.report.plots import Panel, Point, Row, Series, lines, rows, scatter
from lowmem.benchmarks.report.svg import Style, draw

SAME_FIGURES = "The table below has the same figures."


@dataclass(frozen=True)
class Pooled:
    """One version over the tokens of all texts together.

    The errors are standard errors of the means; texts count as independent of one another.
    """

    tokens: int
    kld: float
    kld_error: float
    same_top1: float
    same_top1_error: float
    ppl_ratio: float
    ppl_ratio_error: float


def pooled(texts: Sequence[TextQuality]) -> Pooled | None:
    """Compute means over all tokens; None if there are no tokens. The perplexity ratio is a geometric
    mean.
    """
    tokens = sum(t.tokens for t in texts)
    if not tokens:
        return None

    def mean(values: Sequence[float]) -> float:
        return sum(t.tokens * v for t, v in zip(texts, values, strict=True)) / tokens

    def error(values: Sequence[float]) -> float:
        return math.hypot(*(t.tokens * v for t, v in zip(texts, values, strict=True))) / tokens

    positive = [t.ppl_ratio > 0 for t in texts]
    ratio = math.exp(mean([math.log(t.ppl_ratio) for t in texts])) if all(positive) else math.nan
    relative = [t.ppl_ratio_standard_error / t.ppl_ratio if t.ppl_ratio > 0 else math.nan for t in texts]
    return Pooled(
        tokens,
        mean([t.kld.mean for t in texts]),
        error([t.kld.standard_error for t in texts]),
        mean([t.same_top1 for t in texts]),
        error([t.same_top1_standard_error for t in texts]),
        ratio,
        ratio * error(relative),
    )


def floor_of(record: QualityRecord) -> SubjectQuality | None:
    """Return the noise floor that others are compared with: the one in bfloat16, else the first."""
    floors = [s for s in record.subjects if s.noise_floor]
    return next((s for s in floors if s.subject.dtype == "bfloat16"), floors[0] if floors else None)


def quality_sections(record: QualityRecord, styles: Mapping[str, Style]) -> list[Section]:
    """Create the sections on quality against size and on KL divergence by confidence."""
    found = [quality_section(record, styles)]
    if any(text.buckets for s in record.subjects for text in s.texts):
        found.append(confidence_section(record, styles))
    return found


_VERSION = Column("Version", number=False)
_KLD = Column(
    "KL divergence",
    "Mean Kullback–Leibler divergence of the version's next-token distribution from the reference's, in "
    "nats, ± its standard error. 0 means equal.",
)
_TOP1 = Column("Same top token", "Share of tokens for which both have the same most likely token.")
_RATIO = Column("Perplexity ratio", "The version's perplexity over the reference's. 1 means no loss.")


def quality_section(record: QualityRecord, styles: Mapping[str, Style]) -> Section:
    """Create the section that compares every version with the reference's logits."""
    floors = [(s, p) for s in record.subjects if s.noise_floor and (p := pooled(s.texts))]
    points = [
        Point(s.subject.label, s.subject.bits_per_weight, p.kld, p.kld_error, styles[s.subject.label])
        for s in record.subjects
        if not s.noise_floor and (p := pooled(s.texts))
    ]
    texts = list(dict.fromkeys(t.text for s in record.subjects for t in s.texts))
    title = "Output quality against size"
    named = f"of {_listed(texts)}" if len(texts) < 6 else f"of {len(texts)} texts"
    lead = [
        "The difference between each version's next-token distribution and that of the unquantized model in "
        f"{record.reference_dtype}, on the same tokens {named}."
    ]
    if floors:
        dtypes = _listed([s.subject.dtype for s, _ in floors])
        lead.append(
            f"The noise floor is the unquantized model computed in {dtypes}: the effect of rounding in the "
            "arithmetic alone. A version near it is indistinguishable from the original."
        )
    plot = None
    if points:
        dashed = [(f"noise floor: {s.subject.label}", p.kld) for s, p in floors]
        plot = draw(
            "quality",
            title,
            f"Mean KL divergence against bits per weight of {len(points)} versions, both axes logarithmic"
            f"{', with the noise floor as a dashed line' if floors else ''}. {SAME_FIGURES}",
            lambda figure: scatter(
                figure,
                points,
                dashed,
                "bits per weight, logarithmic",
                "mean KL divergence (nats), logarithmic",
            ),
        )
    return Section("quality", title, tuple(lead), quality_tables(record), plot)


def quality_tables(record: QualityRecord) -> tuple[Table, ...]:
    """Create the tables of every version over all texts together, then on each text."""
    texts = dict.fromkeys(t.text for s in record.subjects for t in s.texts)
    return (_overview(record), *(text_table(record, text, folded=len(texts) > 1) for text in texts))


def _overview(record: QualityRecord) -> Table:
    floor = floor_of(record)
    unit = pooled(floor.texts) if floor else None
    full = max((s.subject.weight_bytes for s in record.subjects if s.subject.method == "dense"), default=0)
    columns = (
        _VERSION,
        Column("Bits per weight", "All stored bits of the linears per weight."),
        Column(
            "Size", "Weights of the whole model in memory; in brackets, the share of the unquantized model."
        ),
        _KLD,
        Column("× noise floor", "The KL divergence in multiples of the noise floor."),
        _TOP1,
        _RATIO,
        Column(
            "Greedy equal",
            "Mean number of tokens before the greedy answer departs from the reference's, of the longest "
            "answer allowed; in brackets, prompts with equal answers.",
        ),
    )
    found = []
    for s in record.subjects:
        p, weight_bytes = pooled(s.texts), s.subject.weight_bytes
        share = f" ({percent(weight_bytes / full)})" if full and weight_bytes else ""
        figures = [NOTHING] * 4
        if p is not None:
            figures = [
                with_error(p.kld, p.kld_error),
                times(p.kld, unit.kld) if unit else NOTHING,
                percent(p.same_top1, p.same_top1_error),
                with_error(p.ppl_ratio, p.ppl_ratio_error),
            ]
        bits = significant(s.subject.bits_per_weight)
        found.append((s.subject.label, bits, size(weight_bytes) + share, *figures, greedy_text(s)))
    return Table("Quality over all tokens", columns, tuple(found))


def text_table(record: QualityRecord, text: str, folded: bool) -> Table:
    """Create the table of every version on one text."""
    found = [(s, t) for s in record.subjects for t in s.texts if t.text == text]
    columns = (
        _VERSION,
        Column("Perplexity", "Of the version; lower is better."),
        _RATIO,
        _KLD,
        Column("median", "Half of the tokens have a smaller KL divergence."),
        Column("p90", "90 % of the tokens have a smaller one."),
        Column("p99", "99 % of the tokens have a smaller one."),
        Column("max", "The largest of all tokens."),
        _TOP1,
        Column("RMS Δp", "Root mean square of the change in the correct token's probability."),
    )
    cells = tuple(
        (
            s.subject.label,
            significant(t.ppl, 5),
            with_error(t.ppl_ratio, t.ppl_ratio_standard_error),
            with_error(t.kld.mean, t.kld.standard_error),
            *(significant(v) for v in (t.kld.median, t.kld.p90, t.kld.p99, t.kld.max)),
            percent(t.same_top1, t.same_top1_standard_error),
            f"{significant(100 * t.rms_dp)} %",
        )
        for s, t in found
    )
    tokens = _listed([count(t.tokens) for _, t in found])
    reference = _listed([significant(t.reference_ppl, 5) for _, t in found])
    return Table(f"On {text}: {tokens} tokens, reference perplexity {reference}", columns, cells, folded)


def greedy_text(subject: SubjectQuality) -> str:
    """Format greedy agreement as `41.2 of 64 (3/8)`."""
    g = subject.greedy
    if g is None or not g.equal_tokens:
        return NOTHING
    whole = sum(e >= a for e, a in zip(g.equal_tokens, g.answer_tokens, strict=False))
    mean = sum(g.equal_tokens) / len(g.equal_tokens)
    return f"{significant(mean)} of {g.limit} ({whole}/{len(g.equal_tokens)})"


def merged_buckets(texts: Sequence[TextQuality]) -> dict[tuple[float, float], Bucket]:
    """Merge the buckets of all texts, weighted by tokens; returns non-empty buckets by (low, high)."""
    parts: dict[tuple[float, float], list[Bucket]] = {}
    for bucket in (b for t in texts for b in t.buckets if b.tokens > 0):
        parts.setdefault((bucket.low, bucket.high), []).append(bucket)
    merged = {}
    for (low, high), found in sorted(parts.items()):
        tokens = sum(b.tokens for b in found)
        kld, same = (sum(b.tokens * v for b, v in zip(found, values, strict=True)) / tokens
                     for values in ([b.kld for b in found], [b.same_top1 for b in found]))  # fmt: skip
        merged[low, high] = Bucket(low, high, tokens, kld, same)
    return merged


def confidence_section(record: QualityRecord, styles: Mapping[str, Style]) -> Section:
    """Create the section on KL divergence by the largest probability of the reference."""
    merged = {s.subject.label: merged_buckets(s.texts) for s in record.subjects}
    ranges = sorted({key for buckets in merged.values() for key in buckets})
    place = {key: index for index, key in enumerate(ranges)}
    series = [
        Series(label, styles[label], tuple((place[k], b.kld) for k, b in buckets.items()))
        for label, buckets in merged.items()
        if buckets
    ]
    ticks = [(place[low, high] - 0.5, f"{low:g}") for low, high in ranges]
    ticks += [(place[ranges[-1]] + 0.5, f"{ranges[-1][1]:g}")] if ranges else []
    title = "KL divergence by confidence"
    plot = draw(
        "confidence",
        title,
        f"Mean KL divergence, logarithmic, of {len(series)} versions in {len(ranges)} ranges of the "
        f"reference's largest probability. {SAME_FIGURES}",
        lambda figure: lines(
            figure,
            series,
            ticks,
            ("reference's largest probability", "mean KL divergence (nats), logarithmic"),
            log=True,
        ),
    )
    columns = (_VERSION, *(Column(f"{low:g}–{high:g}") for low, high in ranges))
    counted = next((buckets for buckets in merged.values() if len(buckets) == len(ranges)), {})
    tokens = ("tokens", *(count(counted[key].tokens) if key in counted else NOTHING for key in ranges))
    found = {label: [buckets.get(key) for key in ranges] for label, buckets in merged.items()}
    klds = [(label, *(significant(b.kld) if b else NOTHING for b in bs)) for label, bs in found.items()]
    same = [(label, *(percent(b.same_top1) if b else NOTHING for b in bs)) for label, bs in found.items()]
    by = "by the reference's largest probability"
    tables = (
        Table(f"Mean KL divergence {by}", columns, (*klds, tokens)),
        Table(f"Same top token {by}", columns, tuple(same), folded=True),
    )
    text = (
        "Tokens are grouped by the largest probability that the reference gives to any token. On the left "
        "the reference is unsure and many continuations are equally good; on the right it is sure.",
    )
    return Section("confidence", title, text, tables, plot)


def humaneval_sections(record: HumanEvalRecord) -> list[Section]:
    """Create the section on the share of HumanEval's problems that each version solves."""
    if not record.subjects:
        return []
    title = "HumanEval"
    bars = Panel("", tuple(_humaneval_bar(s) for s in record.subjects))
    plot = draw(
        "humaneval",
        title,
        f"Share of HumanEval problems solved by {len(bars.rows)} versions, with standard errors. "
        f"{SAME_FIGURES}",
        lambda figure: rows(figure, [bars], "problems solved (%)", [("pass@1, ± one standard error", "bar")]),
    )
    text = (
        "Python functions written from their docstrings and run against the problem's own tests in a "
        "sandbox. Differences within the standard errors are not significant.",
    )
    return [Section("humaneval", title, text, (humaneval_table(record),), plot)]


def humaneval_table(record: HumanEvalRecord) -> Table:
    """Create the table of problems solved by every version, and how the other answers ended."""
    outcomes = sorted({a.outcome for s in record.subjects for a in s.attempts} - {"passed"})
    columns = (
        _VERSION,
        Column("pass@1", "Share of problems solved by one answer, ± its standard error over problems."),
        Column("Problems"),
        Column("Answers each", "Answers generated for a problem."),
        Column("Temperature", "0 is greedy."),
        Column("passed", "Answers that passed the problem's tests."),
        *(Column(outcome) for outcome in outcomes),
    )
    rows = tuple(_humaneval_row(s, outcomes) for s in record.subjects)
    return Table("Problems solved", columns, rows)


def _humaneval_row(s: SubjectHumanEval, outcomes: Sequence[str]) -> tuple[str, ...]:
    seen = Counter(a.outcome for a in s.attempts)
    return (
        s.subject.label,
        percent(s.pass_at_1, s.standard_error),
        count(s.problems),
        count(s.samples),
        significant(s.temperature),
        *(count(seen[outcome]) for outcome in ("passed", *outcomes)),
    )


def _humaneval_bar(s: SubjectHumanEval) -> Row:
    share, error = 100 * s.pass_at_1, 100 * s.standard_error
    ends = (max(share - error, 0), min(share + error, 100))
    return Row(s.subject.label, percent(s.pass_at_1, s.standard_error), bars=(share,), span=ends)


def _listed(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""
