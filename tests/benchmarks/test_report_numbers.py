"""How a report writes numbers and untrusted text."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lowmem.benchmarks.report.numbers import clean, duration, percent, significant, size, with_error
from lowmem.benchmarks.report.svg import fitted, text_width

from tests.benchmarks.bench_records import (
    HOSTILE,
    MIB,
)

# --- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0025, "0.00250"),
        (71.34, "71.3"),
        (9.996, "10.0"),
        (1234.5, "1230"),
        (0.00009996, "0.000100"),
        (0.000015, "1.50×10⁻⁵"),
        (3e12, "3.00×10¹²"),
        (-0.5, "-0.500"),
        (math.nan, "–"),
        (math.inf, "∞"),
    ],
)
def test_a_number_has_three_significant_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.0025034, 0.0000412, "0.002503 ± 0.000041"),
        (25.3124, 0.4321, "25.31 ± 0.43"),
        (1234.5, 56.0, "1234 ± 56"),
        (123456.0, 789.0, "123460 ± 790"),
        (1e97, 0.1, "1.00×10⁹⁷"),
        (1.5e-9, 2e-11, "(1.500 ± 0.020)×10⁻⁹"),
        (0.0, 1e-9, "(0.0 ± 1.0)×10⁻⁹"),
        (0.5, 0.0, "0.500"),
        (0.5, math.nan, "0.500"),
    ],
)
def test_a_number_is_rounded_to_the_digits_of_its_error(value, error, text):
    assert with_error(value, error) == text


@settings(deadline=None)
@given(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12))
def test_a_rounded_error_is_within_its_last_digit(value, error):
    text = with_error(value, error)
    power = re.fullmatch(r"\((.*) ± (.*)\)×10(.*)", text)
    plain = re.fullmatch(r"(\S+) ± (\S+)", text)
    found = power or plain
    assert found or value > 1e12 * error
    if not found:
        return
    scale = 10.0 ** int(power[3].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))) if power else 1.0
    assert abs(float(found[2]) * scale - error) <= error * 0.0501
    assert abs(float(found[1]) * scale - value) <= error * 0.0501 + 1e-9 * value


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.714, "71 %"), (1.0, "100 %"), (0.9996, "99.96 %"), (0.0, "0 %"), (0.0042, "0.420 %"), (1.3, "130 %")],
)
def test_a_share_is_never_rounded_to_0_or_100_percent(share, text):
    assert percent(share) == text


def test_durations_and_sizes():
    spoken = [duration(s) for s in (0.0456, 1.234, 125, 3725)]
    assert spoken == ["45.6 ms", "1.23 s", "2 min 05 s", "1 h 02 min"]
    assert [size(n) for n in (0, 105 * MIB)] == ["–", "105 MiB"]


@settings(deadline=None)
@given(st.text())
@example(HOSTILE)
def test_a_cleaned_text_is_valid_in_every_format(text):
    found = clean(text)
    found.encode()
    ElementTree.fromstring(f"<a>{found.replace('&', '&amp;').replace('<', '&lt;')}</a>")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\r\n]", found)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=80), st.integers(20, 300))
def test_a_fitted_text_is_no_wider_than_asked(text, width):
    assert text_width(fitted(text, width)) <= width
