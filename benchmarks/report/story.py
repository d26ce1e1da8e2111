"""The top of a report: figures and sentences on one quantized version, computed from the records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lowmem.benchmarks.common.records import DecodeLatency, Subject, SubjectHumanEval, SubjectLatency
from lowmem.benchmarks.report.document import Tile
from lowmem.benchmarks.report.inputs import Records
from lowmem.benchmarks.report.latency_sections import per_second
from lowmem.benchmarks.report.numbers import (
    count,
    duration,
    milliseconds,
    percent,
    significant,
    size,
    times,
    with_error,
)
from lowmem.benchmarks.report.quality_sections import Pooled, floor_of, pooled

HEADLINE_BITS = 4


class _Measured(Protocol):
    @property
    def subject(self) -> Subject: ...


Entry = TypeVar("Entry", bound=_Measured)


def _of(label: str, entries: Iterable[Entry]) -> Entry | None:
    return next((entry for entry in entries if entry.subject.label == label), None)


@dataclass(frozen=True)
class Results:
    """The results of one version; a kind that was not measured is None."""

    subject: Subject
    quality: Pooled | None
    latency: SubjectLatency | None
    humaneval: SubjectHumanEval | None

    @classmethod
    def of(cls, subject: Subject, records: Records) -> Results:
        """Look a version up in all records."""
        quality = _of(subject.label, records.quality.subjects) if records.quality else None
        return cls(
            subject,
            pooled(quality.texts) if quality else None,
            _of(subject.label, records.latency.subjects) if records.latency else None,
            _of(subject.label, records.humaneval.subjects) if records.humaneval else None,
        )

    @property
    def decode(self) -> DecodeLatency | None:
        """Decode after the shortest context, which is how a chat begins."""
        found = self.latency.decode if self.latency else ()
        return min(found, key=lambda d: d.context_tokens, default=None)

    @property
    def does_not_fit(self) -> str:
        """A sentence, or "" if the version ran."""
        if self.latency is None or self.latency.fits:
            return ""
        return f"{self.subject.label} does not fit this machine: {self.latency.reason.rstrip('.')}."


@dataclass(frozen=True)
class Headline:
    """The version that the tiles and sentences describe, and the versions it is compared with."""

    main: Results
    dense: Results | None
    """The unquantized model: in bfloat16 if that was measured."""
    floor: Pooled | None
    """The noise floor of the quality measurement."""

    @classmethod
    def of(cls, records: Records) -> Headline | None:
        """The converted version nearest to HEADLINE_BITS, else one quantized at load time.

        None if nothing is quantized or the records are of different models.
        """
        quantized = [s for s in records.subjects if s.method != "dense"]
        converted = [s for s in quantized if s.method == "gptq"] or quantized
        if not converted or not records.one_model:
            return None
        main = min(converted, key=lambda s: (abs(s.bits_per_weight - HEADLINE_BITS), s.label))
        dense = [s for s in records.subjects if s.method == "dense" and s.weight_bytes > 0]
        dense.sort(key=lambda s: s.dtype != "bfloat16")
        floor = floor_of(records.quality) if records.quality else None
        return cls(
            Results.of(main, records),
            Results.of(dense[0], records) if dense else None,
            pooled(floor.texts) if floor else None,
        )

    @property
    def title(self) -> str:
        """`4-bit g128, at 4.16 bits per weight`."""
        subject = self.main.subject
        return f"{subject.label}, at {significant(subject.bits_per_weight)} bits per weight"

    @property
    def over_floor(self) -> str:
        """`25 × the noise floor`, or "" without one."""
        if self.main.quality is None or self.floor is None or self.floor.kld <= 0:
            return ""
        return f"{times(self.main.quality.kld, self.floor.kld)} the noise floor"


def make_tiles(headline: Headline) -> tuple[Tile, ...]:
    """Create at most four tiles with figures on the headline version."""
    main, dense = headline.main, headline.dense
    found = []
    if dense:
        share = percent(main.subject.weight_bytes / dense.subject.weight_bytes)
        sizes = f"{size(main.subject.weight_bytes)} of {size(dense.subject.weight_bytes)}"
        found.append(Tile(share, f"of the size of {dense.subject.label}", sizes))
    if main.quality:
        kld = significant(main.quality.kld, 2)
        found.append(Tile(kld, "nats mean KL divergence", headline.over_floor))
    if main.decode:
        speed = significant(per_second(main.decode.tpot).median)
        found.append(Tile(speed, "tokens per second", f"{percent(main.decode.share)} of the ceiling"))
    if solved := main.humaneval:
        error = f"± {significant(100 * solved.standard_error, 2)} %" if solved.standard_error > 0 else ""
        found.append(Tile(f"{significant(100 * solved.pass_at_1)} %", "of HumanEval solved", error))
    return tuple(found)


def make_story(headline: Headline | None, records: Records) -> tuple[str, ...]:
    """Describe the main results, one sentence each."""
    if not records.one_model:
        return ("These records measure different models. Their figures cannot be compared.",)
    if headline is None:
        return ()
    sentences = (_size_and_quality, _speed, _dense_speed, _prefill, _humaneval)
    return tuple(text for sentence in sentences if (text := sentence(headline)))


def _size_and_quality(headline: Headline) -> str:
    main, dense, quality = headline.main.subject, headline.dense, headline.main.quality
    parts = []
    if dense and main.weight_bytes > 0:
        share = percent(main.weight_bytes / dense.subject.weight_bytes)
        sizes = f"{size(main.weight_bytes)} of {size(dense.subject.weight_bytes)}"
        parts.append(f"{main.label} takes {share} of the memory of {dense.subject.label} ({sizes}).")
    if quality:
        subject = "Its" if parts else f"{main.label}'s"
        over = f", {headline.over_floor}" if headline.over_floor else ""
        kld = with_error(quality.kld, quality.kld_error)
        same = percent(quality.same_top1, quality.same_top1_error)
        parts.append(
            f"{subject} mean KL divergence is {kld} nats{over}, and its most likely token is the reference's "
            f"at {same} of {count(quality.tokens)} tokens."
        )
    return " ".join(parts)


def _speed(headline: Headline) -> str:
    main, decode = headline.main, headline.main.decode
    if main.does_not_fit or decode is None:
        return main.does_not_fit
    speed = significant(per_second(decode.tpot).median)
    return (
        f"After a context of {count(decode.context_tokens)} tokens {main.subject.label} decodes {speed} "
        f"tokens per second, {percent(decode.share)} of what this machine allows. Half of the tokens arrive "
        f"within {milliseconds(decode.itl_p50)} ms of the previous one, 99 % within "
        f"{milliseconds(decode.itl_p99)} ms."
    )


def _dense_speed(headline: Headline) -> str:
    dense, decode = headline.dense, headline.main.decode
    if dense is None or dense.latency is None:
        return ""
    if dense.does_not_fit or decode is None or decode.tpot.median <= 0:
        return dense.does_not_fit
    context = decode.context_tokens
    same = next((d for d in dense.latency.decode if d.context_tokens == context), None)
    if same is None:
        return ""
    ratio = significant(same.tpot.median / decode.tpot.median, 2)
    return (
        f"{dense.subject.label} decodes {significant(per_second(same.tpot).median)} tokens per second, so "
        f"{headline.main.subject.label} is {ratio} times as fast."
    )


def _prefill(headline: Headline) -> str:
    latency = headline.main.latency
    if latency is None or not latency.prefill:
        return ""
    longest = max(latency.prefill, key=lambda p: p.prompt_tokens)
    return (
        f"{latency.subject.label} processes a prompt of {count(longest.prompt_tokens)} tokens at "
        f"{significant(longest.tokens_per_second.median)} tokens per second, so the first new token arrives "
        f"after {duration(longest.ttft.median)}."
    )


def _humaneval(headline: Headline) -> str:
    solved, dense = headline.main.humaneval, headline.dense
    if solved is None:
        return ""
    share = percent(solved.pass_at_1, solved.standard_error)
    text = f"{solved.subject.label} solves {share} of {count(solved.problems)} HumanEval problems"
    if dense and dense.humaneval:
        share = percent(dense.humaneval.pass_at_1, dense.humaneval.standard_error)
        text += f"; {dense.subject.label} solves {share}"
    return text + "."
