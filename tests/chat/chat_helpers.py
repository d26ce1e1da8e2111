"""A simulated terminal and a scripted session for tests of the chat."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from rich.cells import cell_len
from rich.console import Console

from lowmem.chat.markdown import THEME
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.loading.loader import LoadedModel
from lowmem.session import Response

_CODES = re.compile(r"\x1b\[(\?)?([0-9;]*)([A-Za-z])")


class Terminal(io.StringIO):
    """A terminal of fixed size with scrollback, as a file to write to.

    It knows line feeds, carriage returns, cursor up and down, erasing to the right, wrapping on and off, and
    colours. Any other unprintable character in the output raises.
    """

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, rows
        self.scrolled: list[dict[int, str]] = []
        self.screen: list[dict[int, str]] = [{}]
        self.row = self.column = 0
        self.wraps = True
        self.waits_to_wrap = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        position = 0
        while position < len(text):
            code = _CODES.match(text, position)
            if code:
                self._obey(bool(code[1]), code[2], code[3])
                position = code.end()
                continue
            self._put(text[position])
            position += 1
        return len(text)

    def _obey(self, private: bool, number: str, letter: str) -> None:
        if letter == "m" and not private:
            return
        if private and number == "7" and letter in "hl":
            self.wraps = letter == "h"
        elif not private and letter == "A":
            assert int(number) > 0
            self.row = max(self.row - int(number), 0)
            self.waits_to_wrap = False
        elif not private and letter == "B" and not number:
            self.row = min(self.row + 1, self.rows - 1)
            while len(self.screen) <= self.row:
                self.screen.append({})
        elif not private and letter == "K" and not number:
            line = self.screen[self.row]
            self.screen[self.row] = {column: c for column, c in line.items() if column < self.column}
        else:
            raise AssertionError(f"escape code {number!r} {letter!r}")

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column, self.waits_to_wrap = 0, False
            return
        if character == "\n":
            self._line_feed()
            return
        assert character.isprintable() or (cell_len(character) == 0 and ord(character) > 0xA0), repr(
            character
        )
        cells = cell_len(character)
        if cells == 0:
            return
        if self.wraps and (self.waits_to_wrap or self.column + cells > self.columns):
            self._line_feed()
        self.column = min(self.column, self.columns - cells)
        self.screen[self.row][self.column] = character
        self.column += cells
        if self.column >= self.columns:
            self.column, self.waits_to_wrap = self.columns - 1, self.wraps
            if not self.wraps:
                self.column = self.columns

    def _line_feed(self) -> None:
        self.column, self.waits_to_wrap = 0, False
        self.row += 1
        if self.row == len(self.screen):
            self.screen.append({})
        if self.row == self.rows:
            self.scrolled.append(self.screen.pop(0))
            self.row -= 1

    def lines(self) -> list[str]:
        """The scrollback and the screen, without trailing spaces."""
        found = []
        last = max([self.row, *(number for number, line in enumerate(self.screen) if line)])
        for line in [*self.scrolled, *self.screen[: last + 1]]:
            text, column = "", 0
            for at in sorted(line):
                text += " " * (at - column) + line[at]
                column = at + cell_len(line[at])
            found.append(text.rstrip())
        return found

    def text(self) -> str:
        return "\n".join(self.lines())


def terminal_console(columns: int = 60, rows: int = 20) -> tuple[Console, Terminal]:
    """A rich console that writes to a Terminal."""
    terminal = Terminal(columns, rows)
    console = Console(
        file=terminal,
        force_terminal=True,
        color_system="truecolor",
        width=columns,
        height=rows,
        theme=THEME,
        legacy_windows=False,
        no_color=False,
        _environ={"TERM": "xterm-256color"},
    )
    return console, terminal


@dataclass
class Answer:
    """An answer of a FakeSession: pieces with a pause before each, then perhaps an error."""

    pieces: Sequence[str]
    pause: float = 0.0
    finish_reason: Any = "stop"
    dropped_turns: int = 0
    error: BaseException | None = None


REPACKING = SimpleNamespace(in_background=nullcontext)


@dataclass
class FakeSession:
    """A Session without a model: answers from a list, one token per word; records the requests."""

    answers: list[Answer]
    context: int = 1000
    templated: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    closed: int = 0
    engine: Any = field(
        default_factory=lambda: SimpleNamespace(repacking=REPACKING, drafting=SimpleNamespace(why_not=""))
    )

    @property
    def loaded(self) -> Any:
        return LoadedModel(
            model=None,
            tokenizer=SimpleNamespace(chat_template="x" if self.templated else None),
            dialogue=None,
            stop_ids=(),
            format=None,
            dtype=torch.float32,
            device=torch.device("cpu"),
            load_seconds=0.5,
            weight_bytes=13 << 20,
            label="4-bit g128",
        )

    def count(self, prompt: Any, system: str | None = None, *, raw: bool = False) -> int:
        texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
        return sum(len(text.split()) for text in [*texts, system or ""])

    def stream(
        self,
        prompt: Any,
        params: SamplingParams,
        *,
        system: str | None = None,
        raw: bool = False,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Response]:
        messages = prompt if isinstance(prompt, str) else [(m.role, m.content) for m in prompt]
        self.asked.append({"prompt": messages, "system": system, "params": params, "raw": raw})
        answer = self.answers.pop(0)
        if isinstance(answer.error, InvalidRequestError):
            raise answer.error
        return self._responses(answer, on_prefill)

    def _responses(self, answer: Answer, on_prefill: Callable[[int, int], None] | None) -> Iterator[Response]:
        try:
            if on_prefill:
                on_prefill(512, 1024)
            for number, piece in enumerate(answer.pieces, 1):
                time.sleep(answer.pause)
                last = number == len(answer.pieces) and answer.error is None
                reason = answer.finish_reason if last else None
                yield Response(piece, reason, 7, 3, number, 0.25, 12.5, answer.dropped_turns)
            if answer.error is not None:
                raise answer.error
        finally:
            self.closed += 1
