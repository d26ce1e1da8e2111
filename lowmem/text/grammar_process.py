"""Compile grammars that are not trusted, in a process of their own.

Some schemas take llguidance minutes (`multipleOf` with a large number, thousands of properties), in a call
that cannot be interrupted, although they are within its own limits. So every grammar is first compiled in a
process with limited time and memory, for a tokenizer of single bytes. What passes is then compiled for the
model's tokenizer, which takes about as long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import Any

from lowmem.errors import InvalidRequestError

MOST_CHARACTERS = 1 << 18
"""Of a grammar's text."""
SECONDS = 5.0
"""Most time to compile a grammar."""
_START_SECONDS = 20.0  # that the process may take to start on a busy machine
MEMORY = 1 << 30
"""Bytes of address space to compile grammars in."""
MOST_ITEMS = 2000
"""llguidance's limit of a parser's row: about the properties of an object, divided by 4."""
WHITESPACE = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n[ \t]{0,32})?"}
"""Between JSON's tokens: a model that may write any white space sometimes writes nothing else."""

NAMES = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "choice": "choice",
    "lark": "grammar",
    "gbnf": "grammar",
}
"""What a kind of grammar is called in messages."""


class GrammarProcess:
    """Compiles grammars in another process, started at the first and again after one that took too long.

    Calls from several threads take turns.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    def compile(self, kind: str, text: str) -> str:
        """llguidance's own form of a grammar. Raises InvalidRequestError for one that it refuses.

        kind, text: see `lowmem.config.Grammar`.
        """
        if len(text) > MOST_CHARACTERS:
            raise refused(kind, f"it has {len(text)} characters, more than {MOST_CHARACTERS}")
        with self._turn:
            answer = self._ask(json.dumps([kind, text]))
        if answer is None:
            raise refused(kind, f"it takes more than {SECONDS:.0f} s or {MEMORY >> 20} MiB to compile")
        source, error = answer
        if error:
            raise refused(kind, error)
        return source

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, question: str) -> tuple[str, str] | None:
        """(the compiled grammar, the error), or None if the process had to be ended."""
        new = self._process is None or self._process.poll() is not None
        process = self._process = _started() if new or self._process is None else self._process
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(SECONDS + new * _START_SECONDS, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it has ended
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.close()
            return None
        source, error = json.loads(line)
        return source, error


def compile_grammar(kind: str, text: str) -> str:
    """`GrammarProcess.compile`, in one process for all callers."""
    return _SHARED.compile(kind, text)


def refused(kind: str, reason: str) -> InvalidRequestError:
    """The error for a grammar that cannot be used."""
    return InvalidRequestError(
        f"the {NAMES.get(kind, kind)} cannot be used: {_short(reason)}",
        "Correct or simplify it; docs/serve.md says what is supported",
    )


def source_of(kind: str, text: str) -> str:
    """llguidance's own form of a grammar, not compiled. Raises ValueError, and what llguidance raises."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if kind == "json_schema":
        schema = json.loads(text)
        if not isinstance(schema, dict | bool):
            raise ValueError("it is not an object")
        # A boolean is no schema to llguidance's function, so it becomes one that allows as much.
        whole = schema if isinstance(schema, dict) else {} if schema else {"enum": []}
        return LLMatcher.grammar_from_json_schema(whole, overrides=WHITESPACE)  # type: ignore[arg-type]
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        texts = json.loads(text)
        if not isinstance(texts, list) or not texts or not all(isinstance(one, str) and one for one in texts):
            raise ValueError("it is not a list of texts")
        words = " | ".join(json.dumps(one, ensure_ascii=False) for one in texts)
        return LLMatcher.grammar_from_lark(f"start: {words}")
    if kind in ("lark", "gbnf"):
        return LLMatcher.grammar_from_lark(any_to_lark(text) if kind == "gbnf" else text)
    raise ValueError("it is of an unknown kind")


def limits() -> Any:
    """llguidance's limits for a grammar; those of its version 1.9."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=MOST_ITEMS,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=250_000,
        max_grammar_size=500_000,
    )


def answer_questions() -> None:
    """The process: a line of JSON with [kind, text] in, one with [grammar, error] out, until input ends."""
    from llguidance import LLMatcher, LLTokenizer

    sys.setrecursionlimit(500)  # of the conversion from GBNF
    tokenizer = LLTokenizer("byte")
    for line in sys.stdin:
        source = ""
        try:
            source = source_of(*json.loads(line))
            matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits())
            error = matcher.get_error()
            if not error:
                matcher.compute_bitmask()
                error = matcher.get_error()
            if error.startswith("NoExtension") or (not error and not _satisfiable(matcher)):
                error = "no text matches it"
        except RecursionError:
            error = "it is nested too deeply"
        except Exception as caught:  # of llguidance, or of the conversion
            error = str(caught) or type(caught).__name__
        print(json.dumps([source, error]), flush=True)


def _satisfiable(matcher: Any) -> bool:
    """Whether a matcher at its start allows a text."""
    return bool(matcher.is_accepting()) or not matcher.is_stopped()


def _started() -> subprocess.Popen[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        )
    except OSError as error:
        raise InvalidRequestError(
            f"no process can be started to compile a grammar: {error}", "Answer without one"
        ) from error


_SHARED = GrammarProcess()
_START = f"""
from lowmem.platform import system
system.limit_memory({MEMORY})
from lowmem.text.grammar_process import answer_questions
answer_questions()
"""


def _short(reason: str, longest: int = 200) -> str:
    """The first line of a reason."""
    first = next(iter(reason.strip().splitlines()), "")
    return (first if len(first) <= longest else first[: longest - 1] + "…").rstrip(".:")
