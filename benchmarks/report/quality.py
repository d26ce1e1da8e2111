"""The report's sections on what a form answers: KL divergence, perplexity, HumanEval."""

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
from lowmem.benchmarks.report.drawing import Style
from lowmem.benchmarks.report.numbers import NOTHING, count, percent, significant, size, times, with_error
from lowmem.benchmarks.report.plots import (
    MOST_NAMES,
    Mark,
    Panel,
    Point,
    Row,
    Series,
    drawn_twice,
    lines,
    row_chart,
    scatter,
)
from lowmem.benchmarks.report.report import Column, Section, Table


@dataclass(frozen=True)
class Pooled:
    """A form over the tokens of all texts together. errors: standard errors of the means; texts are
    independent of one another."""

    tokens: int
    kld: float
    kld_error: float
    same_top1: float
    same_top1_error: float
    ppl_ratio: float
    ppl_ratio_error: float


def pooled(texts: Sequence[TextQuality]) -> Pooled | None:
    """Means over all tokens; None where there is no token. The ratio of perplexities is a geometric mean."""
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
    """The noise floor that others are counted in: of several, the one in bfloat16, else the first."""
    floors = [s for s in record.subjects if s.noise_floor]
    return next((s for s in floors if s.subject.dtype == "bfloat16"), floors[0] if floors else None)


def quality_sections(record: QualityRecord, styles: Mapping[str, Style]) -> list[Section]:
    """Quality against size, and KL divergence by confidence."""
    found = [quality_section(record, styles)]
    if any(text.buckets for s in record.subjects for text in s.texts):
        found.append(confidence_section(record, styles))
    return found


_KLD = Column(
    "KL divergence",
    "Mean Kullback–Leibler divergence of the form's distribution over the next token from the reference's, "
    "in nats, ± its standard error. 0 is no difference.",
)
_TOP1 = Column("Same top token", "Share of tokens at which both hold the same token most likely.")
_RATIO = Column("Perplexity ratio", "The form's perplexity over the reference's: 1 is no loss.")


def quality_section(record: QualityRecord, styles: Mapping[str, Style]) -> Section:
    """Everything that is measured against the reference's logits."""
    floor = floor_of(record)
    unit = pooled(floor.texts) if floor else None
    full = max((s.subject.weight_bytes for s in record.subjects if s.subject.method == "dense"), default=0)
    columns = (
        Column("#", "Number of the form in the plot, where its name has no room."),
        Column("Form", number=False),
        Column("Bits per weight", "All stored bits of the linears over their weights."),
        Column("Size", "Weights of the whole model as they are held; in brackets, of the unquantized one's."),
        _KLD,
        Column("× noise floor", "The same, counted in what rounding alone does."),
        _TOP1,
        _RATIO,
        Column(
            "Greedy equal",
            "Mean number of tokens for which the greedy answer is the reference's own, of the longest asked "
            "for; in brackets the prompts whose whole answer is equal.",
        ),
    )
    rows, points = [], []
    for number, s in enumerate(record.subjects, 1):
        p = pooled(s.texts)
        form = (
            str(number),
            s.subject.label,
            significant(s.subject.bits_per_weight),
            size(s.subject.weight_bytes)
            + (f" ({percent(s.subject.weight_bytes / full)})" if full and s.subject.weight_bytes else ""),
        )
        if p is None:
            rows.append((*form, *[NOTHING] * 4, greedy_text(s)))
            continue
        rows.append(
            (
                *form,
                with_error(p.kld, p.kld_error),
                times(p.kld, unit.kld) if unit else NOTHING,
                percent(p.same_top1, p.same_top1_error),
                with_error(p.ppl_ratio, p.ppl_ratio_error),
                greedy_text(s),
            )
        )
        if not s.noise_floor:
            style = styles[s.subject.label]
            points.append(
                Point(s.subject.label, number, s.subject.bits_per_weight, p.kld, p.kld_error, style)
            )
    floors = [
        (f"noise floor: {s.subject.label}", p.kld)
        for s in record.subjects
        if s.noise_floor and (p := pooled(s.texts))
    ]
    texts = list(dict.fromkeys(t.text for s in record.subjects for t in s.texts))
    title = "Output quality against size"
    description = (
        f"Mean KL divergence, logarithmic, against bits per weight of {len(points)} forms"
        + (", with the noise floor as a broken line" if floors else "")
        + ". The table that follows has the same figures."
    )
    lead = [
        f"How far each form's next-token distribution is from that of the unquantized model in "
        f"{record.reference_dtype}, on the same tokens"
        + (f" of {_listed(texts)}." if len(texts) < 6 else f" of {len(texts)} texts.")
    ]
    if floors:
        floor_dtypes = [s.subject.dtype for s in record.subjects if s.noise_floor]
        lead.append(
            f"The noise floor is the unquantized model itself, computed in {_listed(floor_dtypes)}: "
            "what rounding in the arithmetic does alone. A form near it cannot be told from the original."
        )
    if len(points) > MOST_NAMES:
        lead.append("The numbers in the plot are those of the rows of the table below.")
    plot = None
    if points:
        plot = drawn_twice(
            "quality",
            title,
            description,
            lambda width: scatter(width, points, floors, "bits per weight", "mean KL divergence (nats)"),
        )
    tables = [Table("Quality over all tokens", columns, tuple(rows))]
    tables += [text_table(record, text, folded=len(texts) > 1) for text in texts]
    return Section("quality", title, tuple(lead), tuple(tables), plot)


def text_table(record: QualityRecord, text: str, folded: bool) -> Table:
    """Every form on one text."""
    found = [(s, t) for s in record.subjects for t in s.texts if t.text == text]
    columns = (
        Column("Form", number=False),
        Column("Perplexity", "Of the form; smaller is better."),
        _RATIO,
        _KLD,
        Column("median", "Half of the tokens have a smaller KL divergence."),
        Column("p90", "Nine tokens of ten have a smaller one."),
        Column("p99", "99 tokens of 100 have a smaller one."),
        Column("max", "The largest of all tokens."),
        _TOP1,
        Column("RMS Δp", "Root mean square of the change in the right token's probability."),
    )
    rows = tuple(
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
    tokens = _listed([count(n) for n in dict.fromkeys(t.tokens for _, t in found)])
    reference = _listed([significant(p, 5) for p in dict.fromkeys(t.reference_ppl for _, t in found)])
    return Table(f"On {text}: {tokens} tokens, reference perplexity {reference}", columns, rows, folded)


def greedy_text(subject: SubjectQuality) -> str:
    """`41.2 of 64 (3/8)`."""
    g = subject.greedy
    if g is None or not g.equal_tokens:
        return NOTHING
    whole = sum(e >= a for e, a in zip(g.equal_tokens, g.answer_tokens, strict=False))
    mean = sum(g.equal_tokens) / len(g.equal_tokens)
    return f"{significant(mean)} of {g.limit} ({whole}/{len(g.equal_tokens)})"


def merged_buckets(texts: Sequence[TextQuality]) -> dict[tuple[float, float], Bucket]:
    """Buckets of all texts together, each mean weighted by its tokens; empty ones are left out."""
    parts: dict[tuple[float, float], list[Bucket]] = {}
    for bucket in (b for t in texts for b in t.buckets if b.tokens > 0):
        parts.setdefault((bucket.low, bucket.high), []).append(bucket)
    merged = {}
    for (low, high), found in sorted(parts.items()):
        tokens = sum(b.tokens for b in found)
        kld = sum(b.tokens * b.kld for b in found) / tokens
        merged[low, high] = Bucket(
            low, high, tokens, kld, sum(b.tokens * b.same_top1 for b in found) / tokens
        )
    return merged


def confidence_section(record: QualityRecord, styles: Mapping[str, Style]) -> Section:
    """KL divergence where the reference is unsure, and where it is sure."""
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
    description = (
        f"Mean KL divergence, logarithmic, of {len(series)} forms in {len(ranges)} ranges of the reference's "
        "largest probability. The table that follows has the same figures."
    )
    plot = drawn_twice(
        "confidence",
        title,
        description,
        lambda width: lines(
            width, series, ticks, "reference's largest probability", "mean KL divergence (nats)", log=True
        ),
    )
    columns = (
        Column("Form", number=False),
        *(Column(f"{low:g}–{high:g}") for low, high in ranges),
    )
    counted = next((buckets for buckets in merged.values() if len(buckets) == len(ranges)), {})
    tokens = ("tokens", *(count(counted[key].tokens) if key in counted else NOTHING for key in ranges))

    def row(label: str, value: str) -> tuple[str, ...]:
        values = (merged[label].get(key) for key in ranges)
        return (label, *(significant(getattr(b, value)) if b else NOTHING for b in values))

    def share(label: str) -> tuple[str, ...]:
        values = (merged[label].get(key) for key in ranges)
        return (label, *(percent(b.same_top1) if b else NOTHING for b in values))

    tables = (
        Table(
            "Mean KL divergence by the reference's largest probability",
            columns,
            (*(row(label, "kld") for label in merged), tokens),
        ),
        Table(
            "Same top token by the reference's largest probability", columns, tuple(map(share, merged)), True
        ),
    )
    text = (
        "Tokens are grouped by the largest probability that the reference gives to any token: to the left it "
        "is unsure and many continuations are as good, to the right it knows what comes next.",
    )
    return Section("confidence", title, text, tables, plot)


def humaneval_sections(record: HumanEvalRecord) -> list[Section]:
    """The share of HumanEval's problems that each form solves."""
    if not record.subjects:
        return []
    outcomes = sorted({a.outcome for s in record.subjects for a in s.attempts} - {"passed"})
    columns = (
        Column("Form", number=False),
        Column("pass@1", "Share of the problems solved by one answer, ± its standard error over problems."),
        Column("Problems"),
        Column("Answers each", "Answers generated for a problem."),
        Column("Temperature", "0 takes the most likely token always."),
        Column("passed", "Answers that passed the problem's tests."),
        *(Column(outcome) for outcome in outcomes),
    )
    rows = tuple(_humaneval_row(s, outcomes) for s in record.subjects)
    title = "HumanEval"
    panel = Panel("", tuple(_humaneval_bar(s) for s in record.subjects))
    description = (
        f"Share of HumanEval's problems solved by {len(rows)} forms, with standard errors. The table that "
        "follows has the same figures."
    )
    plot = drawn_twice(
        "humaneval",
        title,
        description,
        lambda width: row_chart(
            width, [panel], "problems solved (%)", [("pass@1, ± one standard error", "solid")]
        ),
    )
    text = (
        "Python functions written from their docstrings, each run against the problem's own tests in a "
        "locked process. Forms whose standard errors overlap cannot be told apart by it.",
    )
    return [Section("humaneval", title, text, (Table("Problems solved", columns, rows),), plot)]


def _humaneval_row(s: SubjectHumanEval, outcomes: Sequence[str]) -> tuple[str, ...]:
    seen = Counter(a.outcome for a in s.attempts)
    return (
        s.subject.label,
        percent(s.pass_at_1, s.standard_error),
        count(s.problems),
        count(s.samples),
        significant(s.temperature),
        count(seen["passed"]),
        *(count(seen[outcome]) for outcome in outcomes),
    )


def _humaneval_bar(s: SubjectHumanEval) -> Row:
    share, error = 100 * s.pass_at_1, 100 * s.standard_error
    marks = (Mark("bar", 0, share), Mark("line", max(share - error, 0), min(share + error, 100)))
    return Row(s.subject.label, percent(s.pass_at_1, s.standard_error), marks)


def _listed(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""
