"""An answer that grows → lines that are final, and a tail that may still change.

What scrolled off the screen cannot be drawn again, so a line is given out as final only when no
continuation of the text can change it: all top-level blocks but the last (CommonMark never reopens a closed
block), and of a last block that grows long the finished items of a list and the finished lines of code. What
is final is cut off the source; the tail is parsed anew each time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rich.console import Console

from lowmem.chat.markdown import Block, Line, fold, parse, render_block
from lowmem.chat.text import clean

# A last line that does not show yet what it will be: `-` may become a heading's line, an item or a rule.
_UNDECIDED = re.compile(r"\s{0,3}([-=*_+#>|:\s]+|\d{1,9}[.)]?\s*|(`{3}|~{3})[^\n]*)")
_OPEN_CODE = re.compile(r"(?:[^`]*`[^`]+`)*[^`]*`[^`]+")
_OPEN_STRONG = re.compile(r"(?:.*[\s(])?\*\*(?=\S)[^*]+")
_MARKS = "*`~"
# Rows of a list or of code that stay in the tail. A window that shrinks may push the tail's first rows out of
# reach, where they stay beside what is drawn for them later: the shorter, the better.
_TAIL = 10


@dataclass(frozen=True)
class Shown:
    """What there is to draw: lines that are final now, and rows of at most the width that are not."""

    final: list[Line]
    tail: list[Line]


class MarkdownStream:
    """The text of one answer so far, without what has been given out as final lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rest = ""  # the source that is not final, from the start of a block
        self._begun = False  # whether a block before `_rest` was given out
        self._number: int | None = None  # `_rest` goes on with a list, from this number on
        self._going_on = False  # `_rest` starts inside of a block: no empty line before it
        self._code_lines = 0  # lines of the code block that `_rest` starts with that were given out

    def push(self, text: str) -> None:
        """Add a piece as the model said it."""
        self._rest += clean(text)

    def show(self, width: int, room: int, *, done: bool = False) -> Shown:
        """Lines for a text width of `width`, with `room` rows for the tail; done: the text is whole."""
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
        """Cut off all blocks that are closed, and give their lines."""
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
        """Cut finished items or lines of code off the last block, `wanted` rows if there are so many."""
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
        """The block stays in the source: its first lines give the others their colours."""
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
        """The lines of the first blocks of `source`, less those given out, empty lines between blocks."""
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
        """The source without an end that would only flicker, and with its open markers closed."""
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
        """Whether the source ends in a paragraph or a heading: not in code."""
        blocks = parse(source)
        leaves = [token for token in blocks[-1].tokens if token.nesting >= 0] if blocks else []
        return bool(leaves) and leaves[-1].type == "inline"


def _offset(source: str, lines: int) -> int:
    """Where line number `lines` of the source starts."""
    position = 0
    for _ in range(lines):
        end = source.find("\n", position)
        if end < 0:
            return len(source)
        position = end + 1
    return position
