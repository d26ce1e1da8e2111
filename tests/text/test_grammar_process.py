"""The process that compiles grammars: what takes too long ends, and the next grammar compiles."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from lowmem.errors import InvalidRequestError
from lowmem.text import grammar_process
from lowmem.text.grammar_process import GrammarProcess

SLOW = json.dumps({"type": "integer", "multipleOf": 99999989})
QUICK = json.dumps({"type": "integer"})


def test_a_grammar_that_takes_too_long_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    process = GrammarProcess()
    assert json.loads(process.compile("json_schema", QUICK))
    monkeypatch.setattr(grammar_process, "SECONDS", 0.5)
    with pytest.raises(InvalidRequestError, match="takes more than"):
        process.compile("json_schema", SLOW)
    monkeypatch.undo()
    assert json.loads(process.compile("json_schema", QUICK))
    process.close()


def test_a_process_that_was_killed_is_started_again() -> None:
    process = GrammarProcess()
    process.compile("regex", "a")
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    assert process.compile("regex", "a")
    process.close()


def test_threads_take_turns() -> None:
    process = GrammarProcess()
    texts = [f"a{{{count}}}" for count in range(1, 40)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda text: process.compile("regex", text), texts))
    assert [text in source for text, source in zip(texts, found, strict=True)] == [True] * len(texts)
    process.close()
