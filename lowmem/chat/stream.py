"""A growing markdown text, split into final lines and a tail that may still change.

Lines that scrolled off the screen cannot be redrawn, so a line is final only when no continuation of the text
can change it: lines of all top-level blocks but the last (CommonMark never reopens a closed block), and of a
long last block the finished list items or code lines. Final source is removed; the tail is parsed each time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rich.console import Console

from lowmem.chat.markdown import Block, Line, fold, parse, render_block
from lowmem.chat.text import clean

# A last line whose kind is open: `-` may become the underline of a heading, an item or a rule.
_UNDECIDED = re.compile(r"\s{0,3}([-=*_+#>|:\s]+|\d{1,9}[.)]?\s*|(`{3}|~{3})[^\n]*)")
_OPEN_CODE = re.compile(r"(?:[^`]*`[^`]+`)*[^`]*`[^`]+")
_OPEN_STRONG = re.compile(r"(?:.*[\s(])?\*\*(?=\S)[^*]+")
_MARKS = "*`~"
# Rows of a list or of code that stay in the tail. A window that shrinks may scroll the first of them away,
# where they remain beside their redrawn copies; so the tail is short.
_TAIL = 10


@dataclass(frozen=True)
class Shown:
    """New final lines, and the rows of the tail, folded to the width."""

    final: list[Line]
    tail: list[Line]


class MarkdownStream:
    """One answer so far, without the source of lines that were returned as final."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rest = ""  # source that is not final, from the start of a block
        self._begun = False  # whether a block before `_rest` was returned
        self._number: int | None = None  # number of the first item where `_rest` continues a list
        self._going_on = False  # `_rest` starts within a block: no empty line before it
        self._code_lines = 0  # lines returned of the code block at the start of `_rest`

    def push(self, text: str) -> None:
        """Add a piece of the model's text."""
        self._rest += clean(text)

    def show(self, width: int, room: int, *, done: bool = False) -> Shown:
        """Lines of `width` columns, with at most `room` rows of tail. done: the text is complete."""
        final = self._take_closed(width, done)
        if done:
            return Shown(final, [])
        tail = self._draw(self._steady(), width)
        rows = [row for line in tail for row in fold(line, width)]
        if len(rows) > min(room, _TAIL):
            taken = self._take_from_open(width, len(rows) - min(room, _TAIL))
            if taken:
                final += taken
                rows = [row for line in self._draw(self._steady(), width) for row in fold(line, width)]
        return Shown(final, rows[-room:])

    def _take_closed(self, width: int, done: bool) -> list[Line]:
        """Remove all closed blocks and return their lines."""
        whole = self._rest if done else self._rest[: self._rest.rfind("\n") + 1]
        blocks = parse(whole)
        closed = blocks if done else blocks[:-1]
        if not closed:
            return []
        lines = self._lines(closed, whole, width)
        self._begun = self._begun or bool(lines)
        self._rest = "" if done else self._rest[_offset(whole, blocks[-1].start) :]
        self._going_on, self._number, self._code_lines = False, None, 0
        return lines

    def _take_from_open(self, width: int, wanted: int) -> list[Line]:
        """Remove finished items or lines of code from the last block: `wanted` rows, or all."""
        whole = self._rest[: self._rest.rfind("\n") + 1]
        blocks = parse(whole)
        if not blocks:
            return []
        block = blocks[0]
        if block.kind == "fence":
            return self._take_code(whole, block, width, wanted)
        starts = block.item_starts()
        for count, start in enumerate(starts[1:], 1):
            done = parse(whole[: _offset(whole, start)])
            lines = self._lines(done, whole, width)
            if sum(len(fold(line, width)) for line in lines) >= wanted or count == len(starts) - 1:
                if block.kind == "ordered_list_open":
                    first = (
                        self._number
                        if self._number is not None
                        else int(block.tokens[0].attrs.get("start", 1))
                    )
                    self._number = first + count
                self._begun = self._going_on = True
                self._rest = self._rest[_offset(whole, start) :]
                return lines
        return []

    def _take_code(self, whole: str, block: Block, width: int, wanted: int) -> list[Line]:
        """As `_take_from_open`, but keep the source: the colours of a line depend on those before."""
        taken: list[Line] = []
        rows = 0
        for line in self._lines([block], whole, width):
            if rows >= wanted:
                break
            taken.append(line)
            rows += len(fold(line, width))
        separator = 1 if self._begun and not self._going_on else 0
        if len(taken) <= separator:
            return []
        self._code_lines += len(taken) - separator
        self._begun = self._going_on = True
        return taken

    def _draw(self, source: str, width: int) -> list[Line]:
        return self._lines(parse(source), source, width)

    def _lines(self, blocks: list[Block], source: str, width: int) -> list[Line]:
        """The lines of the blocks of `source` that were not returned, separated by empty lines."""
        lines: list[Line] = []
        for position, block in enumerate(blocks):
            first = position == 0
            number = self._number if first else None
            rendered = render_block(block, source, self._console, width, number)
            if first and block.kind == "fence":
                rendered = rendered[self._code_lines :]
            before = (self._begun or bool(lines)) and not (first and self._going_on)
            if rendered and before:
                lines.append([])
            lines += rendered
        return lines

    def _steady(self) -> str:
        """The source without an undecided last line, and with open markers closed, to avoid flicker."""
        _, _, last = self._rest.rpartition("\n")
        head = self._rest[: len(self._rest) - len(last)]
        if _UNDECIDED.fullmatch(last):
            return head
        last = last.rstrip(_MARKS)
        if not self._in_text(head + last):
            return head + last
        if _OPEN_CODE.fullmatch(last):
            last += "`"
        elif _OPEN_STRONG.fullmatch(last):
            last = last.rstrip() + "**"
        return head + last

    def _in_text(self, source: str) -> bool:
        """Whether the source ends in a paragraph or a heading, not in code."""
        blocks = parse(source)
        leaves = [token for token in blocks[-1].tokens if token.nesting >= 0] if blocks else []
        return bool(leaves) and leaves[-1].type == "inline"


def _offset(source: str, lines: int) -> int:
    """Offset of line number `lines` of the source."""
    position = 0
    for _ in range(lines):
        end = source.find("\n", position)
        if end < 0:
            return len(source)
        position = end + 1
    return position
