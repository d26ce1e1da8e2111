"""The top of a report: a few figures and sentences, each computed from the records or left out."""

from __future__ import annotations

from lowmem.benchmarks.common.records import DecodeLatency, Subject, SubjectHumanEval, SubjectLatency
from lowmem.benchmarks.report.latency import per_second
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
from lowmem.benchmarks.report.quality import Pooled, floor_of, pooled
from lowmem.benchmarks.report.report import Records, Tile

HERO_BITS = 4
"""The form that the sentences are about is the one nearest to so many bits per weight, which is what most
people run; a converted one before those that are quantized while loading."""


def hero_of(records: Records) -> Subject | None:
    """The quantized form that stands for all in the sentences, or None where nothing is quantized."""
    quantized = [s for s in records.subjects if s.method != "dense"]
    converted = [s for s in quantized if s.method == "gptq"] or quantized
    return min(converted, key=lambda s: (abs(s.bits_per_weight - HERO_BITS), s.label), default=None)


def _dense(records: Records) -> Subject | None:
    """The unquantized form that sizes are compared with: bfloat16 where there is one."""
    dense = [s for s in records.subjects if s.method == "dense" and s.weight_bytes > 0]
    return next((s for s in dense if s.dtype == "bfloat16"), dense[0] if dense else None)


def _quality(records: Records, label: str) -> Pooled | None:
    if records.quality is None:
        return None
    found = next((s for s in records.quality.subjects if s.subject.label == label), None)
    return pooled(found.texts) if found else None


def _floor(records: Records) -> Pooled | None:
    floor = floor_of(records.quality) if records.quality else None
    return pooled(floor.texts) if floor else None


def _latency(records: Records, label: str) -> SubjectLatency | None:
    subjects = records.latency.subjects if records.latency else ()
    return next((s for s in subjects if s.subject.label == label), None)


def _shortest(subject: SubjectLatency | None) -> DecodeLatency | None:
    """The decode after the shortest context: what a chat begins with."""
    return min(subject.decode, key=lambda d: d.context_tokens, default=None) if subject else None


def _humaneval(records: Records, label: str) -> SubjectHumanEval | None:
    subjects = records.humaneval.subjects if records.humaneval else ()
    return next((s for s in subjects if s.subject.label == label), None)


def make_tiles(records: Records) -> tuple[Tile, ...]:
    """The form of the story in at most four figures; none where records are of different models."""
    hero = hero_of(records)
    if hero is None or not records.one_model:
        return ()
    found = []
    dense = _dense(records)
    if dense:
        share = percent(hero.weight_bytes / dense.weight_bytes)
        remark = f"{size(hero.weight_bytes)} of {size(dense.weight_bytes)}"
        found.append(Tile(share, f"of {dense.label}'s bytes", remark))
    quality, floor = _quality(records, hero.label), _floor(records)
    if quality:
        remark = f"{times(quality.kld, floor.kld)} the noise floor" if floor and floor.kld > 0 else ""
        found.append(Tile(significant(quality.kld, 2), "nats mean KL divergence", remark))
    decode = _shortest(_latency(records, hero.label))
    if decode:
        speed = significant(per_second(decode.tpot).median)
        found.append(Tile(speed, "tokens per second", f"{percent(decode.share)} of the ceiling"))
    solved = _humaneval(records, hero.label)
    if solved:
        remark = f"± {significant(100 * solved.standard_error, 2)} %" if solved.standard_error > 0 else ""
        found.append(Tile(f"{significant(100 * solved.pass_at_1)} %", "of HumanEval solved", remark))
    return tuple(found)


def make_story(records: Records) -> tuple[str, ...]:
    """Sentences on the form nearest to four bits, and on the unquantized model beside it."""
    hero = hero_of(records)
    if not records.one_model:
        return ("These records are of different models; their figures do not belong together.",)
    if hero is None:
        return ()
    dense = _dense(records)
    told = [
        _told_size(records, hero, dense),
        _told_speed(records, hero),
        _told_dense_speed(records, hero, dense),
        _told_prefill(records, hero),
        _told_humaneval(records, hero, dense),
    ]
    return tuple(sentence for sentence in told if sentence)


def _told_size(records: Records, hero: Subject, dense: Subject | None) -> str:
    parts = []
    if dense and hero.weight_bytes > 0:
        share = percent(hero.weight_bytes / dense.weight_bytes)
        sizes = f"{size(hero.weight_bytes)} of {size(dense.weight_bytes)}"
        parts.append(f"takes {share} of {dense.label}'s bytes ({sizes})")
    quality, floor = _quality(records, hero.label), _floor(records)
    if quality:
        against = f", {times(quality.kld, floor.kld)} the noise floor" if floor and floor.kld > 0 else ""
        parts.append(
            f"its mean KL divergence is {with_error(quality.kld, quality.kld_error)} nats{against}, and it "
            f"holds the same token most likely at {percent(quality.same_top1, quality.same_top1_error)} of "
            f"{count(quality.tokens)} tokens"
        )
    if not parts:
        return ""
    begin = f"{hero.label} {parts[0]}" if parts[0].startswith("takes") else f"{hero.label}: {parts[0]}"
    return "; ".join([begin, *parts[1:]]) + "."


def _told_speed(records: Records, hero: Subject) -> str:
    latency = _latency(records, hero.label)
    if latency is None or records.latency is None:
        return ""
    if not latency.fits:
        return f"{hero.label} does not fit this machine: {latency.reason.rstrip('.')}."
    decode = _shortest(latency)
    if decode is None:
        return ""
    return (
        f"After {count(decode.context_tokens)} tokens of context {hero.label} decodes "
        f"{significant(per_second(decode.tpot).median)} tokens per second, {percent(decode.share)} of what "
        "this machine allows; half of its tokens come within "
        f"{milliseconds(decode.itl_p50)} ms of the one before, 99 of 100 within "
        f"{milliseconds(decode.itl_p99)} ms."
    )


def _told_dense_speed(records: Records, hero: Subject, dense: Subject | None) -> str:
    if dense is None:
        return ""
    latency, decode = _latency(records, dense.label), _shortest(_latency(records, hero.label))
    if latency is None:
        return ""
    if not latency.fits:
        return f"{dense.label} does not fit this machine: {latency.reason.rstrip('.')}."
    same = next((d for d in latency.decode if decode and d.context_tokens == decode.context_tokens), None)
    if decode is None or same is None or decode.tpot.median <= 0:
        return ""
    ratio = significant(same.tpot.median / decode.tpot.median, 2)
    return (
        f"{dense.label} reaches {significant(per_second(same.tpot).median)} tokens per second there, so "
        f"{hero.label} is {ratio} times as fast."
    )


def _told_prefill(records: Records, hero: Subject) -> str:
    latency = _latency(records, hero.label)
    if latency is None or not latency.prefill:
        return ""
    longest = max(latency.prefill, key=lambda p: p.prompt_tokens)
    return (
        f"{hero.label} reads a prompt of {count(longest.prompt_tokens)} tokens at "
        f"{significant(longest.tokens_per_second.median)} tokens per second: the first new token comes after "
        f"{duration(longest.ttft.median)}."
    )


def _told_humaneval(records: Records, hero: Subject, dense: Subject | None) -> str:
    solved = _humaneval(records, hero.label)
    if solved is None:
        return ""
    told = (
        f"{hero.label} solves {percent(solved.pass_at_1, solved.standard_error)} of {count(solved.problems)} "
        "HumanEval problems"
    )
    full = _humaneval(records, dense.label) if dense else None
    if full and full.subject.label != hero.label:
        told += f"; {full.subject.label} solves {percent(full.pass_at_1, full.standard_error)}"
    return told + "."
