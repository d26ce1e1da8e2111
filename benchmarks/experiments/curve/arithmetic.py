"""Comparisons of versions of different sizes: interpolation, ratios, and the bounds on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from lowmem.benchmarks.experiments.curve.record import MIXED, PEERS, UNIFORM, CurveRecord, Point

FEW_BITS = 3.25
"""Up to this average the bound is FEW_RATIO, above it MANY_RATIO."""
FEW_RATIO, MANY_RATIO = 0.70, 0.80


def interpolate(points: Sequence[tuple[float, float]], bits: float) -> float | None:
    """The KL divergence at `bits` on straight lines through (bits, log of the divergence).

    None outside of the points.
    """
    ordered = sorted(points)
    for (low, before), (high, after) in pairwise(ordered):
        if low <= bits <= high:
            share = (bits - low) / (high - low) if high > low else 0.0
            return math.exp((1 - share) * math.log(before) + share * math.log(after))
    return None


def line(points: Sequence[Point], text: str) -> list[tuple[float, float]]:
    """(bits, KL divergence on a text) of versions."""
    return [(point.bits, point.kld(text)) for point in points]


def ratio(record: CurveRecord, mixed: Point, text: str) -> float | None:
    """A mixed version's KL divergence over that of the uniform widths, interpolated at its bits."""
    expected = interpolate(line(record.of(UNIFORM), text), mixed.bits)
    return None if expected is None else mixed.kld(text) / expected


def bound(bits: float) -> float:
    """The largest ratio that is aimed at."""
    return FEW_RATIO if bits <= FEW_BITS else MANY_RATIO


def lead(record: CurveRecord, peer: Point, text: str) -> float | None:
    """Our KL divergence at a peer's bits, over the peer's; None where none of ours is as small.

    Ours is the line through the mixed versions, continued to the uniform ones on both sides of them.
    """
    mixed = record.of(MIXED)
    if not mixed:
        return None
    outside = [p for p in record.of(UNIFORM) if not mixed[0].bits < p.bits < mixed[-1].bits]
    expected = interpolate(line([*mixed, *outside], text), peer.bits)
    return None if expected is None else expected / peer.kld(text)


def missed(record: CurveRecord) -> Iterator[str]:
    """A line for each bound that does not hold, and for each peer that is not above our line."""
    for text in record.texts():
        for point in record.of(MIXED):
            found = ratio(record, point, text)
            if found is not None and found > bound(point.bits):
                yield f"{point.bits:.2f} bits on {text}: ratio {found:.2f}, bound {bound(point.bits):.2f}"
        for peer in record.of(*PEERS):
            led = lead(record, peer, text)
            if led is not None and led >= 1:
                yield f"{peer.label} ({peer.bits:.2f} bits) on {text}: ours is {led:.2f} of it"
