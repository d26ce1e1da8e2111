"""Calls of tools in answers: every format, in pieces of every size, and what only looks like a call."""

from __future__ import annotations

import json
import random

import pytest

from lowmem.models.call_formats import FORMATS, CallFormat, call_format
from lowmem.server.calls import CallParser

MISTRAL, GRANITE, HERMES, LLAMA = FORMATS
ARGUMENTS = {"of": 'a "b" {c} \\ [d]', "deep": {"list": [1, {"x": "}"}]}, "größe": "日本"}
JSON = json.dumps(ARGUMENTS)
ONE = f'{{"name": "size", "arguments": {JSON}}}'
LATE = f'{{"arguments": {JSON}, "name": "size"}}'
PARAMETERS = f'{{"name": "size", "parameters": {JSON}}}'
TWO = '{"name": "other", "arguments": {}}'


def split(
    format: CallFormat, text: str, seed: int = 0, **options: bool
) -> tuple[str, list[tuple[str, object]]]:
    """The words of an answer and its calls; it comes in pieces of random sizes, seed 0: at once."""
    parser, sizes = CallParser(format, ["size", "other"], **options), random.Random(seed)
    words, parts, at = "", [], 0
    while at < len(text):
        size = sizes.randint(1, 5) if seed else len(text)
        piece, found = parser.push(text[at : at + size])
        words, parts, at = words + piece, parts + found, at + size
    piece, found = parser.finish()
    words, parts = words + piece, parts + found
    calls: dict[int, tuple[str, str]] = {}
    for part in parts:
        if part.name is not None:
            assert part.index == len(calls) and part.id is not None and len(part.id) == 9
            calls[part.index] = (part.name, "")
        name, before = calls[part.index]
        calls[part.index] = (name, before + part.arguments)
    return words, [(name, json.loads(arguments)) for name, arguments in calls.values()]


SIZE, OTHER = ("size", ARGUMENTS), ("other", {})
CASES = [
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [SIZE]),
    (
        HERMES,
        f"I look.\n<tool_call>{ONE}</tool_call>\n<tool_call>{TWO}</tool_call>",
        "I look.\n",
        [SIZE, OTHER],
    ),
    (HERMES, f"<tool_call>[{ONE}, {TWO}]</tool_call>", "", [SIZE, OTHER]),
    (HERMES, f"<tool_call>{LATE}</tool_call>", "", [SIZE]),
    (HERMES, f"<tool_call>{ONE}", "", [SIZE]),
    (HERMES, "a < b, <tool, </tool_call>", "a < b, <tool, </tool_call>", []),
    (HERMES, "<tool_call>not JSON</tool_call>", "<tool_call>not JSON</tool_call>", []),
    (HERMES, '<tool_call>{"name": "si', '<tool_call>{"name": "si', []),
    (HERMES, ONE, ONE, []),
    (HERMES, "  Plain words. ", "  Plain words. ", []),
    (MISTRAL, f"[TOOL_CALLS][{ONE}, {TWO}]", "", [SIZE, OTHER]),
    (MISTRAL, f"[TOOL_CALLS]size[ARGS]{JSON}[TOOL_CALLS]other[ARGS]{{}}", "", [SIZE, OTHER]),
    (MISTRAL, f"[TOOL_CALLS]size[CALL_ID]123456789[ARGS]{JSON}", "", [SIZE]),
    (MISTRAL, "[1, 2] [TOOL", "[1, 2] [TOOL", []),
    (GRANITE, f"<|tool_call|>[{ONE},{TWO}]", "", [SIZE, OTHER]),
    (GRANITE, f"<|tool_call|>[{ONE}]<|/tool_call|>", "", [SIZE]),
    (LLAMA, PARAMETERS, "", [SIZE]),
    (LLAMA, f"\n{PARAMETERS}; {TWO}", "", [SIZE, OTHER]),
    (LLAMA, f"<|python_tag|>{PARAMETERS}", "", [SIZE]),
    (LLAMA, '{"type": "function", "name": "other", "parameters": {}}', "", [OTHER]),
    (LLAMA, '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
    (LLAMA, '{"a": 1} is JSON', '{"a": 1} is JSON', []),
    (LLAMA, f"Words, then {PARAMETERS}", f"Words, then {PARAMETERS}", []),
]


@pytest.mark.parametrize(("format", "text", "words", "calls"), CASES, ids=[case[1][:40] for case in CASES])
def test_calls_and_words(format: CallFormat, text: str, words: str, calls: list[tuple[str, object]]) -> None:
    for seed in range(30):
        assert split(format, text, seed) == (words, calls), seed


def test_a_forced_call_has_no_marker() -> None:
    for seed in range(9):
        assert split(HERMES, ONE, seed, forced=True) == ("", [SIZE])
        assert split(LLAMA, PARAMETERS, seed, forced=True) == ("", [SIZE])


def test_only_the_first_call_is_kept_if_one_is_allowed() -> None:
    for seed in range(9):
        text = f"<tool_call>{ONE}</tool_call><tool_call>{TWO}</tool_call>"
        assert split(HERMES, text, seed, parallel=False) == ("", [SIZE])


def test_arguments_come_piece_by_piece() -> None:
    parser = CallParser(HERMES, [])
    assert parser.push('<tool_call>{"name": "size", "arguments": {')[1][0].name == "size"
    assert [part.arguments for part in parser.push('"of": "ab')[1]] == ['"of": "ab']


def test_formats_are_recognized_in_templates() -> None:
    shown = '{"name": <function-name>, "arguments": <args-json-object>}'
    assert call_format(f"<tool_call>\n{shown}\n</tool_call>") == HERMES
    assert call_format("{{ '[TOOL_CALLS] [' }}") == MISTRAL
    assert call_format("<|tool_call|>") == GRANITE
    assert call_format('Respond in the format {"name": function name, "parameters": dictionary}') == LLAMA
    assert call_format("<tool_call>\n<function=example>") is None and call_format("") is None
