"""Fuzz every format with Hypothesis: valid inputs are mutated in and around the relevant places.

The targets are those of coverage_guided.py. LOWMEM_FUZZ_EXAMPLES sets the length of the long run (-m slow).
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz import fuzz_targets
from tests.fuzz.fuzz_targets import TARGETS, seeds_of

LONG = int(os.environ.get("LOWMEM_FUZZ_EXAMPLES", "400"))
# Default numbers of examples: those that use transformers take some hundredths of a second each.
SHORT = {
    "safetensors": 60,
    "bin_file": 40,
    "bin_pickle": 60,
    "gguf": 60,
    "manifest": 40,
    "card": 40,
    "index": 12,
    "quantization": 20,
    "config": 8,
    "tokenizer": 5,
    "tokenizer_config": 5,
    "template": 20,
    "gguf_model": 3,
}
PEAK = 300_000_000
"""Bytes that Python may allocate for an input: more than a seed needs, far less than an input may claim."""

# Values that often break readers, for any place in a JSON text.
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    10**30,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "../x",
    "/etc/passwd",
    "a\x1b[2J\n\u202e",
    "\ud800",
    "x" * 5000,
    [],
    [[]],
    [1, "a"],
    {},
    {"a": {"b": []}},
    [None] * 40,
]


def mutated_json(data: st.DataObject, text: bytes) -> bytes:
    """Change a few values or keys anywhere in a JSON text, or damage its bytes."""
    if not data.draw(st.integers(0, 4)):
        return mutated_bytes(data, text)
    value = json.loads(text)
    for _ in range(data.draw(st.integers(1, 3))):
        value = _changed(data, value, 0)
    return json.dumps(value, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass")


def _changed(data: st.DataObject, value: Any, depth: int) -> Any:
    if isinstance(value, dict) and value and data.draw(st.integers(0, 7 if depth else 30)):
        key = data.draw(st.sampled_from(sorted(value)))
        how = data.draw(st.sampled_from(("value", "value", "value", "gone", "renamed", "new")))
        result = dict(value)
        if how == "value":
            result[key] = _changed(data, value[key], depth + 1)
        elif how == "new":
            result[
                data.draw(st.sampled_from(("a", "", "text_config", "get_text_config", "\x00", "ü" * 300)))
            ] = data.draw(st.sampled_from(ODD))
        else:
            removed = result.pop(key)
            if how == "renamed":
                result[key + data.draw(st.sampled_from(("x", "\n", "\ud800")))] = removed
        return result
    if isinstance(value, list) and value and data.draw(st.integers(0, 3)):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], _changed(data, value[place], depth + 1), *value[place + 1 :]]
    if type(value) is int and data.draw(st.booleans()):
        return value + data.draw(st.sampled_from((-1, 1, 7, -value - 1, value, 2**16, 2**40)))
    return data.draw(st.sampled_from(ODD))


def mutated_bytes(data: st.DataObject, blob: bytes) -> bytes:
    """Flip, cut, copy or insert a few bytes, or replace them by numbers that serve as lengths elsewhere."""
    changed = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(changed) - 1, 0)))
        how = data.draw(st.sampled_from(("flip", "cut", "drop", "insert", "copy", "number")))
        if how == "flip" and changed:
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del changed[at:]
        elif how == "drop":
            del changed[at : at + data.draw(st.integers(1, 9))]
        elif how == "copy":
            changed[at:at] = changed[at : at + data.draw(st.integers(1, 60))]
        elif how == "number":
            width = data.draw(st.sampled_from((1, 4, 8)))
            number = data.draw(
                st.sampled_from((0, 1, 255, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(blob)))
            )
            changed[at : at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        else:
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=6))
    return bytes(changed)


def mutated_safetensors(data: st.DataObject, blob: bytes) -> bytes:
    """Change the header as JSON and correct its length; otherwise only the length check would be tested."""
    end = 8 + int.from_bytes(blob[:8], "little")
    if data.draw(st.integers(0, 3)):
        header = mutated_json(data, blob[8:end])
        return len(header).to_bytes(8, "little") + header + blob[end:]
    return mutated_bytes(data, blob)


def mutated_template(data: st.DataObject, text: bytes) -> bytes:
    """Insert pieces of valid and invalid templates into a template, or remove pieces."""
    pieces = (
        "{% for i in range(99999) %}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ messages }}",
        "{{ x.__class__ }}",
        "{% set x = 'a' * 999 %}",
        "{{ x ~ x }}",
        "{{ 2 ** 9999999999 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}",
        "{{ f() }}",
        "{{ raise_exception('no') }}",
        "{% include '/etc/passwd' %}",
        "{{ messages | tojson }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ lipsum() }}",
        "{% generation %}",
        "{{ [1] * 10**9 }}",
        "{{ '%9999999999d' % 1 }}",
    )
    result = text.decode()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(result)))
        end = min(len(result), at + data.draw(st.sampled_from((0, 0, 3, 40))))
        result = result[:at] + data.draw(st.sampled_from(pieces)) + result[end:]
    return result.encode()


MUTATIONS: dict[str, Callable[[st.DataObject, bytes], bytes]] = {
    "safetensors": mutated_safetensors,
    "template": mutated_template,
    **dict.fromkeys(("bin_file", "bin_pickle", "gguf", "gguf_model", "card"), mutated_bytes),
    **dict.fromkeys(
        ("config", "quantization", "index", "tokenizer", "tokenizer_config", "manifest"), mutated_json
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _cleaned_up():
    yield
    fuzz_targets.clean_up()


def check(target: str, examples: int) -> None:
    seeds = seeds_of(target)
    for seed in seeds:
        TARGETS[target](seed)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data(), seed=st.sampled_from(seeds))
    def one(data: Any, seed: bytes) -> None:
        hostile = MUTATIONS[target](data, seed)
        tracemalloc.start()
        try:
            TARGETS[target](hostile)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < PEAK or target == "template"  # rendering has its own memory limit

    one()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", SHORT)
def test_a_short_fuzz_finds_no_fault(target: str) -> None:
    check(target, SHORT[target])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", SHORT)
def test_a_long_fuzz_finds_no_fault(target: str) -> None:
    check(target, LONG)
