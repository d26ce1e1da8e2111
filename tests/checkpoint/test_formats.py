"""Formats of linears: which exception covers which linear, and what a mixture is called."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.checkpoint.formats import FormatException, LinearFormat, QuantizationFormat, layout_for
from lowmem.errors import SourceError

FOUR, EIGHT = LinearFormat(4, 128), LinearFormat(8, 32, layout="gptq_v2")
NAMES = [
    f"model.layers.{layer}.{linear}"
    for layer in (0, 1, 10, 11)
    for linear in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
] + ["lm_head", "transformer.h.1.attn.c_attn"]


@pytest.mark.parametrize(
    "pattern",
    [
        ".*",
        ".*gate.*",
        r".*\.gate_proj$",
        r"^model\.layers\.1\..*",
        r"model.layers.1",
        r".*layers\.(0|11)\.mlp\.(?:gate|up)_proj",
        r".*\.\d+\.mlp\.down_proj",
        r"model\.layers\.[01]\..*q_proj$",
        "nothing",
        r"transformer\.h\.1\.attn\.c_attn",
        "",
    ],
)
def test_a_pattern_matches_as_re_match_does(pattern: str) -> None:
    exception = FormatException(pattern, None)
    assert exception.is_supported
    assert [n for n in NAMES if exception.covers(n)] == [n for n in NAMES if re.match(pattern, n)]


@pytest.mark.parametrize("pattern", ["(a+)+$", r"(\d+)*x", "a{1,9999}", "(?=a)", "(", r"\d+\d+\d+", "a*b*c*"])
def test_an_unsafe_pattern_is_never_evaluated(pattern: str) -> None:
    exception = FormatException(pattern, None)
    assert not exception.is_supported and not exception.covers("a" * 1000)


def test_matching_takes_no_time_that_grows_with_the_wildcards() -> None:
    exception = FormatException(".*a" * 30 + "b", None)
    start = time.perf_counter()
    assert not exception.covers("a" * 1024)
    assert time.perf_counter() - start < 1


def test_the_first_exception_that_covers_a_linear_decides() -> None:
    format = QuantizationFormat(
        FOUR, (FormatException(r".*\.q_proj", None), FormatException(r".*layers\.1\.", EIGHT))
    )
    assert format.of("model.layers.0.mlp.up_proj") == FOUR
    assert format.of("model.layers.1.mlp.up_proj") == EIGHT
    assert format.of("model.layers.1.self_attn.q_proj") is None
    with pytest.raises(SourceError, match=r"q_proj.*dynamic"):
        format.of_packed("model.layers.1.self_attn.q_proj")


def test_labels() -> None:
    assert QuantizationFormat(FOUR).label == "4-bit g128"
    dense = QuantizationFormat(FOUR, (FormatException(".*gate.*", None),))
    assert dense.uniform and dense.label == "4-bit g128"
    mixed = QuantizationFormat(FOUR, (FormatException(".*down.*", EIGHT),))
    assert not mixed.uniform and mixed.label == "4/8-bit mixed"
    assert not FOUR.zeros_v2 and EIGHT.zeros_v2


def test_the_layout_of_a_checkpoint() -> None:
    """`gptq`, which everything reads, wherever it stores all widths."""
    assert layout_for((8, 4, 3, 2)) == layout_for(()) == "gptq"
    assert layout_for((4, 3, 6)) == "gptq_p" == LinearFormat(5, 128).layout
    with pytest.raises(ValueError, match="9"):
        layout_for((4, 9))
    assert not LinearFormat(3, 128).planar and LinearFormat(3, 128, layout="gptq_p").planar
    assert LinearFormat(6, 128).planar and not LinearFormat(4, 128, layout="gptq_p").planar
    assert [LinearFormat(bits, 32).unit for bits in (8, 7, 6, 5, 4, 3, 2)] == [4, 32, 32, 32, 8, 32, 16]


LEAVES = ("self_attn.q_proj", "mlp.down_proj", "mlp.experts.3.up-proj")
LINEARS = [f"model.layers.{layer}.{leaf}" for layer in (0, 1, 2, 10, 11, 21) for leaf in LEAVES]
LINEARS += ["lm_head", "h.007.x", "0.mlp", "model.layer2.1.w"]
STRANGERS = ["model.layers.100.mlp.down_proj", "model.layers.1.mlp.down_proj.x", "xlm_head"]


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(LINEARS), st.sampled_from((None, EIGHT, LinearFormat(3, -1)))))
def test_a_mixture_covers_exactly_the_linears_that_differ(differ: dict[str, LinearFormat | None]) -> None:
    """As lowmem reads it, and as GPTQModel and vLLM do: the first pattern that re.match finds."""
    mixed = QuantizationFormat.mixture(FOUR, differ)
    excluded = [exception.format is None for exception in mixed.exceptions]
    assert excluded == sorted(excluded, reverse=True)  # GPTQModel puts them first
    for name in (*LINEARS, *STRANGERS):
        found = [one.format for one in mixed.exceptions if re.match(one.pattern, name)]
        assert len(found) == (name in differ) and all(one.is_supported for one in mixed.exceptions)
        assert mixed.of(name) == differ.get(name, FOUR) == (found[0] if found else FOUR)


def test_linears_that_differ_by_their_layer_share_a_pattern() -> None:
    """A model of 80 layers has a readable list."""
    differ = {f"model.layers.{layer}.mlp.down_proj": EIGHT for layer in range(0, 80, 2)}
    (exception,) = QuantizationFormat.mixture(FOUR, differ).exceptions
    assert exception.pattern.startswith(r"^model\.layers\.(?:0|2|4|") and len(exception.pattern) < 200
    one = QuantizationFormat.mixture(FOUR, {"model.layers.7.mlp.down_proj": None}).exceptions
    assert [e.pattern for e in one] == [r"^model\.layers\.7\.mlp\.down_proj$"]


def test_many_widths_have_a_short_label() -> None:
    differ = {f"h.{bits}": LinearFormat(bits, 128) for bits in (2, 3, 8)}
    assert QuantizationFormat.mixture(FOUR, differ).label == "2 to 8-bit mixed"
