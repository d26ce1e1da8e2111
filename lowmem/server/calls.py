"""Finds the calls of tools in an answer as it comes."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass

from lowmem.models.call_formats import CallFormat

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_BETWEEN = " \t\r\n,;[]"
"""What may stand around the calls of a list."""


@dataclass(frozen=True)
class CallDelta:
    """A new part of a call: first its name, then its arguments piece by piece."""

    index: int
    id: str | None = None
    """Given with the name, in the first part."""
    name: str | None = None
    arguments: str = ""
    """The next piece of the JSON of the arguments."""


class CallParser:
    """Splits the text of an answer into words and calls.

    format: how the model writes calls. names: the tools; where no marker precedes a call, an object counts as
    one only with such a name. forced: the answer is a call from its first character. parallel: False drops
    all calls but the first. What looks like a call and is none stays text, markers included.
    """

    def __init__(
        self, format: CallFormat, names: Collection[str], *, forced: bool = False, parallel: bool = True
    ) -> None:
        self._openings = tuple(
            marker for marker in (format.opening, *format.others) if marker not in ("", "[ARGS]", "[CALL_ID]")
        )
        self._closing, self._bare = format.closing, not format.opening
        self._names, self._parallel = frozenset(names), parallel
        self._held = ""
        """Text that is still to be read."""
        self._raw = ""
        """The markers before it, which are text again if no call follows."""
        self._in_call = forced
        self._marked = forced
        self._begun = False
        """Words have been given."""
        self._scan: _Scan | None = None
        """Inside of the arguments of a call."""
        self.count = 0
        """Calls so far."""

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """Add text; returns the words and the parts of calls that it completes."""
        self._held += text
        return self._read(end=False)

    def finish(self) -> tuple[str, list[CallDelta]]:
        """End the answer; what is held and is no call becomes words."""
        words, calls = self._read(end=True)
        if self._scan is None:
            rest, self._held, self._raw = self._raw + self._held, "", ""
            if self.count and not rest.replace(self._closing, "").strip(_BETWEEN):
                rest = ""
            words += rest
        return words, calls

    def _read(self, *, end: bool) -> tuple[str, list[CallDelta]]:
        words: list[str] = []
        calls: list[CallDelta] = []
        while True:
            before = (self._held, self._in_call, self._scan)
            if self._scan is not None:
                self._read_arguments(calls)
            elif self._in_call:
                words.append(self._read_call(calls, end=end))
            else:
                words.append(self._read_words(end=end))
            if before == (self._held, self._in_call, self._scan):
                return "".join(words), calls

    def _read_words(self, *, end: bool) -> str:
        """Words up to a marker; what may be the start of one is held."""
        if self._bare and not self._begun and not self.count:
            start = self._held.lstrip()
            if start.startswith("{"):
                self._in_call, self._marked = True, False
                return ""
        found = [(at, marker) for marker in self._openings if (at := self._held.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            words, self._held, self._raw = self._held[:at], self._held[at + len(marker) :], marker
            self._in_call = self._marked = True
            return self._given(words) if words.strip() else ""
        keep = 0
        if not end:
            longest = max(map(len, self._openings), default=1) - 1
            tails = (self._held[-size:] for size in range(min(longest, len(self._held)), 0, -1))
            keep = next((len(t) for t in tails if any(m.startswith(t) for m in self._openings)), 0)
        words = self._held[: len(self._held) - keep]
        if not words.strip() and (not self._begun or self.count) and not end:
            return ""  # white space before a call is none of the answer's
        self._held = self._held[len(words) :]
        return self._given(words)

    def _given(self, words: str) -> str:
        self._begun = self._begun or bool(words)
        return words

    def _read_call(self, calls: list[CallDelta], *, end: bool) -> str:
        """The start of the next call, or the end of the calls. Returns what has turned out to be words."""
        at = 0
        while at < len(self._held):
            rest = self._held[at:]
            for marker in (*self._openings, *([self._closing] if self._closing else [])):
                if rest.startswith(marker):
                    closes = marker == self._closing
                    self._held, self._in_call = rest[len(marker) :], not closes
                    self._raw = "" if closes else self._raw or marker
                    return ""
                if not end and marker.startswith(rest):
                    return ""
            if self._held[at] not in _BETWEEN:
                break
            at += 1
        rest = self._held[at:]
        if not rest:
            return ""
        if rest.startswith("{"):
            return self._read_object(rest, calls, end=end)
        if "[ARGS]" in rest:  # name[CALL_ID]id[ARGS]{…}
            name, _, value = rest.partition("[ARGS]")
            self._start(name.partition("[CALL_ID]")[0].strip(), value.lstrip(), 0, calls)
            return ""
        if not end and self._marked and re.fullmatch(r"[\w.\-]+(\[[\w\[\]]*)?", rest) and self._raw:
            return ""  # may be a name
        return self._no_call()

    def _read_object(self, rest: str, calls: list[CallDelta], *, end: bool) -> str:
        head = _HEAD.match(rest)
        if head:
            name = _string(head[1])
            if self._marked or name in self._names:
                self._start(name, rest[head.end() :], 1, calls)
                return ""
            return self._no_call()
        scan = _Scan()
        size = scan.length(rest)
        if not scan.closed:  # a name that follows the arguments is waited for
            return self._no_call() if end else ""
        call = _call_of(rest[:size])
        if call is None or not (self._marked or call[0] in self._names):
            return self._no_call()
        self._held, self._raw = rest[size:], ""
        if self._parallel or not self.count:
            calls.append(CallDelta(self.count, _new_id(), call[0], call[1]))
            self.count += 1
        return ""

    def _start(self, name: str, value: str, around: int, calls: list[CallDelta]) -> None:
        """Begin a call whose arguments come next. around: objects that enclose them."""
        self._raw, self._held = "", value
        kept = self._parallel or not self.count
        self._scan = _Scan(around=around, index=self.count if kept else None)
        if kept:
            calls.append(CallDelta(self.count, _new_id(), name))
            self.count += 1

    def _read_arguments(self, calls: list[CallDelta]) -> None:
        scan = self._scan
        assert scan is not None
        size = scan.length(self._held)
        value, self._held = self._held[:size], self._held[size:]
        if value and scan.index is not None and not scan.behind:
            calls.append(CallDelta(scan.index, arguments=value))
        if scan.closed and not scan.behind and scan.around:
            self._scan = _Scan(depth=scan.around, behind=True)
        elif scan.closed:
            self._scan = None

    def _no_call(self) -> str:
        words, self._held, self._raw, self._in_call = self._raw + self._held, "", "", False
        self._bare = False
        return self._given(words)


class _Scan:
    """Follows the brackets of a JSON value piece by piece.

    depth: brackets that are open. behind: it is the rest of the object around the arguments.
    """

    def __init__(
        self, depth: int = 0, around: int = 0, index: int | None = None, *, behind: bool = False
    ) -> None:
        self.around, self.index, self.behind = around, index, behind
        self.closed = False
        self._depth, self._quoted, self._escaped = depth, False, False

    def length(self, text: str) -> int:
        """Characters of a further piece up to the end of the value."""
        for at, char in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._quoted = False
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.closed = True
                    return at + 1
        return len(text)


def _call_of(text: str) -> tuple[str, str] | None:
    """(name, arguments) of a whole JSON object, or None if it is no call."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    inner = found.get("function")
    found = inner if isinstance(inner, dict) else found
    name = found.get("name")
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(name, str):
        return None
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _string(quoted: str) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return quoted[1:-1]


def _new_id() -> str:
    return uuid.uuid4().hex[:9]  # Mistral's templates refuse ids of another length
