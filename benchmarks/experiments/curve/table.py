"""results/curve.json as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from lowmem.benchmarks.experiments.common import cell, made_with, table
from lowmem.benchmarks.experiments.curve.arithmetic import interpolate, lead, line, missed, ratio
from lowmem.benchmarks.experiments.curve.record import MIXED, PEERS, UNIFORM, CurveRecord, Point


def render(record: CurveRecord) -> str:
    """Both tables, and what they were measured with."""
    parts = [_mixed(record), _versions(record), "\n".join(_notes(record))]
    return "\n\n".join(part for part in parts if part)


def _mixed(record: CurveRecord) -> str:
    """Mixed versions beside the uniform ones, interpolated."""
    texts = record.texts()
    heads = ["bits per weight, mixed"]
    for text in texts:
        heads += [f"KL divergence: {text}", "uniform, interpolated", "ratio"]
    rows = []
    for point in record.of(MIXED):
        cells = [f"{point.bits:.2f}"]
        for text in texts:
            expected = interpolate(line(record.of(UNIFORM), text), point.bits)
            found = ratio(record, point, text)
            cells.append(_number(point.kld(text)))
            cells += ["", ""] if expected is None or found is None else [_number(expected), f"{found:.2f}"]
        rows.append(cells)
    return table(heads, rows) if rows else ""


def _versions(record: CurveRecord) -> str:
    """Every version by its bits; beside a peer, how far ours at the same bits are below it."""
    texts = record.texts()
    heads = ["", "bits per weight", *(f"KL divergence: {text}" for text in texts), "ours / peer"]
    rows = []
    for point in sorted(record.points, key=lambda p: p.bits):
        if point.failure:
            rows.append([point.label, f"failed: {point.failure}", *[""] * (len(heads) - 2)])
            continue
        cells = [_name(point), f"{point.bits:.2f}", *(_number(point.kld(text)) for text in texts)]
        leads = [lead(record, point, text) for text in texts] if point.family in PEERS else []
        shares = [f"{share:.2f}" for share in leads if share is not None]
        rows.append([*cells, " / ".join(shares)])
    return table(heads, rows)


def _name(point: Point) -> str:
    return f"lowmem {point.label}" if point.family == UNIFORM else point.label


def _number(kld: float) -> str:
    """Four significant digits."""
    return f"{kld:.{max(0, 3 - _exponent(kld))}f}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".split("e")[1])


def _notes(record: CurveRecord) -> Iterator[str]:
    yield made_with(record.origin, record.peer_versions)
    if record.kept is not None:
        yield f"Versions that it does not name are kept from an earlier run: {made_with(record.kept)}"
    tokens = next((p.texts[0].tokens for p in record.points if p.texts), 0)
    yield (
        f"{tokens:,} tokens of each text. Calibration: {record.calibration}. Bits per weight: integers, "
        "scales and zero-points or minimums of the decoder layers' linears, over their weights. All versions "
        "are evaluated in float32 from dequantized linears. Interpolated: log-linear between the uniform "
        "widths on both sides. Ours / peer: the line through our mixed versions at the peer's bits, over the "
        "peer's divergence, by text."
    )
    yield from (f"{cell(text)}." for text in record.left_out)
    yield from (f"Missed: {text}." for text in missed(record))
