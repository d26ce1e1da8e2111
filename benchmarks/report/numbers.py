"""How a report writes numbers and untrusted text, in tables, plots and sentences alike."""

from __future__ import annotations

import math
import unicodedata

from lowmem.benchmarks.common.records import Repeated

from lowmem.text.units import format_bytes

NOTHING = "–"
"""Printed where a number is missing."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SMALLEST = -4
"""Numbers below this power of ten are written with an exponent."""
_MOST_DECIMALS = 7


def clean(text: str, keep_newlines: bool = False) -> str:
    """Return text on one line that is safe in any document.

    Control characters, characters that change the writing direction and unpaired surrogates become U+FFFD.
    """
    kept = "\n" if keep_newlines else ""
    spaced = "".join(" " if c in "\t\r\n" and c not in kept else c for c in text)
    bad = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
    return "".join(c if c in kept or unicodedata.category(c) not in bad else "�" for c in spaced).strip()


def significant(value: float, digits: int = 3) -> str:
    """Format `value` with `digits` significant digits: 0.00251, 71.3, 1230, 1.23×10⁻⁵."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    # The exponent after rounding: 9.996 in three digits is 10.0.
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
    decimals = max(digits - 1 - exponent, 0)
    if exponent >= 9 or exponent < _SMALLEST:
        return f"{value / 10.0**exponent:.{digits - 1}f}×10{str(exponent).translate(_SUPERSCRIPTS)}"
    return f"{round(value, digits - 1 - exponent):.{decimals}f}"


def with_error(value: float, error: float) -> str:
    """Format `value ± error`, both rounded to the second significant digit of the standard error.

    If the error is 0, only the value is formatted, with three digits.
    """
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return significant(value)
    exponent = int(f"{error:.1e}".partition("e")[2])
    if int(f"{abs(value):.1e}".partition("e")[2]) - exponent > 12:
        return significant(value)  # an error of float64 arithmetic
    decimals = max(1 - exponent, 0)
    if exponent >= 9 or decimals > _MOST_DECIMALS:
        # One power of ten for both: the larger one's.
        power = int(f"{max(abs(value), error):.1e}".partition("e")[2])
        scale, decimals = 10.0**power, max(1 - exponent + power, 0)
        text = f"({value / scale:.{decimals}f} ± {error / scale:.{decimals}f})"
        return f"{text}×10{str(power).translate(_SUPERSCRIPTS)}"
    digits = min(1 - exponent, 0)
    rounded = (value, error) if digits == 0 else (round(value, digits), round(error, digits))
    return f"{rounded[0]:.{decimals}f} ± {rounded[1]:.{decimals}f}"


def percent(share: float, error: float = 0.0) -> str:
    """Format a share as `71 %`, or with its standard error as `95.47 ± 0.12 %`."""
    if math.isfinite(error) and error > 0:
        return f"{with_error(100 * share, 100 * error)} %"
    if not abs(share) < 100:
        return f"{significant(100 * share)} %"
    # Two digits, but only what is exactly 0 or 1 is written as 0 or 100.
    if 0.99 <= share < 1 or 0 < share < 0.01:
        return f"{significant(100 * share)} %" if share < 0.5 else f"{_below_hundred(share)} %"
    return f"{100 * share:.0f} %"


def _below_hundred(share: float) -> str:
    for decimals in range(1, 6):
        text = f"{100 * share:.{decimals}f}"
        if float(text) < 100:
            return text
    return "99.99999"


def times(value: float, unit: float) -> str:
    """Format `value` in multiples of `unit`: `25 ×`; NOTHING if the unit is 0."""
    if not (math.isfinite(value) and math.isfinite(unit) and unit > 0):
        return NOTHING
    return f"{significant(value / unit, 2)} ×"


def milliseconds(seconds: float) -> str:
    """Format seconds as a number of milliseconds."""
    return significant(1000 * seconds)


def duration(seconds: float) -> str:
    """Format seconds as `45.6 ms`, `1.23 s`, `2 min 05 s`, `1 h 02 min`."""
    if not math.isfinite(seconds) or seconds < 0:
        return NOTHING
    if seconds < 1:
        return f"{milliseconds(seconds)} ms"
    if seconds < 60:
        return f"{significant(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def spread(measured: Repeated, scale: float = 1.0) -> str:
    """Format `12.3 (11.9–12.8)`: median, smallest and largest of the rounds, each times `scale`."""
    if len(measured.values) < 2:
        return significant(measured.median * scale)
    low, high = significant(measured.low * scale), significant(measured.high * scale)
    return f"{significant(measured.median * scale)} ({low}–{high})"


def size(count: int) -> str:
    """Format bytes as `8.25 GiB`; NOTHING for 0, which means unknown."""
    return format_bytes(count) if count > 0 else NOTHING


def count(number: int) -> str:
    """Format a whole number with thousands separators."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """Format a count and its noun: `1 core`, `2 cores`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def rate(measured: float, unit: str) -> str:
    """Format a rate in billions or trillions of `unit`: `35.1 GB/s`, `431 GFLOP/s`."""
    if abs(measured) >= 1e12:
        return f"{significant(measured / 1e12)} T{unit}/s"
    return f"{significant(measured / 1e9)} G{unit}/s"
