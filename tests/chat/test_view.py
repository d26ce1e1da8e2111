"""The screen after an answer shows its markdown, for any pieces and window sizes."""

from __future__ import annotations

import io
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from lowmem.chat.markdown import fold, plain_text, render
from lowmem.chat.stream import MarkdownStream
from lowmem.chat.text import clean
from lowmem.chat.view import PlainView, TerminalView, is_plain, make_view
from tests.chat.chat_helpers import Terminal, terminal_console

WORDS = st.sampled_from(
    [
        *(
            "word",
            "`code`",
            "**bold text**",
            "*it*",
            "self.__init__(x)",
            "2*3*4",
            "List<int>",
            "日本語の文",
            "a😀b",
        ),
        *(
            "naïve",
            "**open",
            "`open",
            "&lt;",
            "[a](b)",
            "![i](u)",
            "_u_",
            "~~gone~~",
            "\\*",
            "#",
            "-",
            "1.",
            "|",
        ),
        *(">>> f(x)", "x" * 70),
    ]
)
PROSE = st.lists(WORDS, min_size=1, max_size=14).map(" ".join)
CODE_LINES = st.lists(
    st.sampled_from(
        ["def f(x):", "    return x", "", 'text = """', "# note", "\tindented", "```", "x = " + "y" * 80]
    ),
    max_size=14,
)


@st.composite
def code_blocks(draw: Any) -> str:
    lines = [line for line in draw(CODE_LINES) if line != "```"]
    language = draw(st.sampled_from(["python", "", "c", "nonsense", "text title=a"]))
    end = draw(st.sampled_from(["\n```", "\n```", "\n```", ""]))  # some are never closed
    return f"```{language}\n" + "\n".join(lines) + end


@st.composite
def lists(draw: Any) -> str:
    numbered, loose = draw(st.booleans()), draw(st.booleans())
    first = draw(st.sampled_from([1, 1, 7, 98]))
    items = []
    for number in range(draw(st.integers(1, 13))):
        mark = f"{first + number}." if numbered else "-"
        text = draw(PROSE).replace("\n", " ")
        if draw(st.integers(0, 4)) == 0:
            text += "\n\n    ```python\n    x = 1\n\n    y = 2\n    ```"
        if draw(st.integers(0, 4)) == 0:
            text += "\n    - nested\n    - more"
        items.append(f"{mark} {text}")
    return ("\n\n" if loose else "\n").join(items)


TABLE = st.lists(PROSE.map(lambda text: text.replace("|", "/")), min_size=1, max_size=6).map(
    lambda cells: "| a | b |\n|---|:-:|\n" + "\n".join(f"| {cell} | 1 |" for cell in cells)
)
QUOTE = PROSE.map(lambda text: "> " + text)
HEADING = PROSE.map(lambda text: "## " + text)
BLOCK = st.one_of(
    PROSE,
    lists(),
    code_blocks(),
    TABLE,
    QUOTE,
    HEADING,
    st.sampled_from(["---", "a\n---", "def f():\n    pass"]),
)
DOCUMENT = st.lists(BLOCK, max_size=6).flatmap(
    lambda blocks: st.lists(st.sampled_from(["\n\n", "\n\n", "\n", "\n\n\n"]), min_size=6, max_size=6).map(
        lambda ends: "".join(block + end for block, end in zip(blocks, ends, strict=False))
    )
)


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


def wrapped(text: str, columns: int) -> list[str]:
    """The rows of the whole text on a terminal."""
    console, _ = terminal_console(columns)
    lines = render(clean(text), console, columns)
    return [plain_text(row).rstrip() for line in lines for row in fold(line, columns)]


def stream(text: str, cuts: list[int], columns: int, rows: int) -> Terminal:
    console, terminal = terminal_console(columns, rows)
    terminal.write("before\n")
    view = TerminalView(console, threaded=False)
    for piece in pieces(text, cuts):
        view.push(piece)
        view.draw()
    view.__exit__(None, None, None)
    return terminal


CUTS = st.lists(st.integers(0, 10_000), max_size=60)


@settings(deadline=None, max_examples=150)
@given(text=DOCUMENT, cuts=CUTS, columns=st.integers(24, 90), rows=st.integers(3, 30))
def test_the_screen_holds_the_whole_answer_once(text: str, cuts: list[int], columns: int, rows: int) -> None:
    """Nothing is lost or repeated in the window and its scrollback."""
    terminal = stream(text, cuts, columns, rows)
    assert terminal.lines() == ["before", *wrapped(text, columns), ""]


@settings(deadline=None, max_examples=60)
@given(
    text=DOCUMENT, cuts=CUTS, sizes=st.lists(st.tuples(st.integers(30, 90), st.integers(4, 30)), min_size=1)
)
def test_no_size_of_the_window_loses_a_word(text: str, cuts: list[int], sizes: list[tuple[int, int]]) -> None:
    """The window may change between drawings; their final lines are the whole answer."""
    console, _ = terminal_console(90)
    answer = MarkdownStream(console)
    final = []
    for position, piece in enumerate(pieces(text, cuts)):
        answer.push(piece)
        columns, rows = sizes[position % len(sizes)]
        shown = answer.show(columns, rows)
        assert len(shown.tail) <= rows
        assert all(len(fold(row, columns)) == 1 for row in shown.tail)
        final += shown.final
    final += answer.show(90, 20, done=True).final
    # Lines break elsewhere, so only the non-blank characters are compared.
    whole = "".join(plain_text(line) for line in render(clean(text), console, 90))
    strip = str.maketrans("", "", " ─▌•")
    assert Counter("".join(map(plain_text, final)).translate(strip)) == Counter(whole.translate(strip))


@settings(deadline=None, max_examples=100)
@given(text=DOCUMENT)
def test_no_character_of_prose_and_code_is_lost(text: str) -> None:
    """Text that CommonMark would parse as tags or references stays visible."""
    assume("|---|" not in text)  # cells are folded, so words of theirs are not in one piece
    console, _ = terminal_console(90)
    shown = "".join(plain_text(line) for line in render(clean(text), console, 90)).replace(" ", "")
    for word in ("self.__init__(x)", "List<int>", "2*3*4", "&lt;", "[a](b)", "![i](u)", "_u_", "日本語の文"):
        assert shown.count(word) == text.count(word)


def shown(text: str, columns: int = 60) -> list[str]:
    console, _ = terminal_console(columns)
    return [plain_text(line) for line in render(text, console, columns)]


def test_code_without_a_fence_can_be_copied() -> None:
    """Small models forget the fence; Python's marks must survive the markdown parser."""
    code = "def __init__(self, *args, **kwargs):\n    x = a*b*c\n\n    return x[0](1) > 2 and y<z>1"
    assert shown(code) == code.split("\n")
    assert shown(">>> f(2)\n4") == [">>> f(2)", "4"]
    assert shown("# a comment\nx = 1") == ["# a comment", "", "x = 1"]
    assert shown("[x]: y\n\n[x] <b>") == ["[x]: y", "", "[x] <b>"]


def test_marks_become_styles() -> None:
    console, _ = terminal_console()
    lines = render("**bold** *slanted* `code`\n\n```python\ndef f(): pass\n```", console, 60)
    styles = {segment.text: segment.style for line in lines for segment in line}
    assert styles["bold"] and styles["bold"].bold
    assert styles["slanted"] and styles["slanted"].italic
    assert styles["code"] and styles["code"].color
    assert styles["def"] and styles["def"].color and styles["def"].bgcolor.is_default


def test_an_unclosed_comment_is_coloured_as_one() -> None:
    console, _ = terminal_console()
    whole = render("```java\n/** Sorts\n * numbers.\n */\nint x;\n```", console, 60)
    assert render("```java\n/** Sorts\n * numbers.\n", console, 60) == whole[:2]


def test_a_lists_numbers_do_not_shift_when_it_grows() -> None:
    assert shown("\n".join(f"{n}. x" for n in range(1, 11)))[:1] == shown("1. x") == [" 1. x"]


def test_long_lines_of_code_are_left_to_the_terminal() -> None:
    """Copies of them thereby contain no extra line ends."""
    code = "x = " + "y" * 200
    assert shown(f"```\n{code}\n```") == [code]


@given(st.text())
def test_cleaned_text_has_no_control_characters(text: str) -> None:
    cleaned = clean(text)
    assert all(c in "\n\t" or (ord(c) >= 0x20 and not 0x7F <= ord(c) < 0xA0) for c in cleaned)
    cleaned.encode("utf-8")
    assert clean(text[:3]) + clean(text[3:]) == cleaned


EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m \x1b[1;1Hcode\x08\x08 \r\u202etxt.exe &#27;[2J [bold]no markup[/bold]"


@pytest.mark.parametrize(
    "frame", ["{}", "```\n{}\n```", "- {}", "`{}`", "| {} |\n|---|\n| {} |", "```{}\n```"]
)
def test_an_answers_escape_codes_do_not_reach_the_terminal(frame: str) -> None:
    """The Terminal of these tests raises for any unexpected code."""
    terminal = stream(frame.replace("{}", EVIL), [3, 5, 9, 11, 20], 60, 10)
    if "```{" not in frame:
        assert "[bold]nomarkup[/bold]" in "".join(terminal.text().split())
        assert "]0;owned" in terminal.text()


def test_a_half_written_mark_does_not_flicker() -> None:
    """In a growing text `**bo` is already bold, and `-` not yet the underline of a heading."""
    console, _ = terminal_console()
    answer = MarkdownStream(console)
    answer.push("Some **bo")
    assert [plain_text(row) for row in answer.show(60, 10).tail] == ["Some bo"]
    answer.push("ld** and `co")
    assert [plain_text(row) for row in answer.show(60, 10).tail] == ["Some bold and co"]
    answer.push("de`\n-")
    assert [plain_text(row) for row in answer.show(60, 10).tail] == ["Some bold and code"]
    answer.push(" item")
    assert [plain_text(row) for row in answer.show(60, 10).tail] == ["Some bold and code", "", " • item"]


def test_finished_blocks_are_not_drawn_again() -> None:
    """Only the tail is redrawn: lines above may be in the scrollback."""
    console, terminal = terminal_console()
    written: list[str] = []
    real = terminal.write
    terminal.write = lambda text: (written.append(text), real(text))[1]  # type: ignore[method-assign]
    view = TerminalView(console, threaded=False)
    view.push("First paragraph.\n\nSecond")
    view.draw()
    view.draw()
    view.push(" one")
    view.draw()
    written = [text for text in written if text]
    assert len(written) == 2 and "First" in written[0] and "First" not in written[1]


def test_the_spinner_turns_and_goes() -> None:
    console, terminal = terminal_console()
    view = TerminalView(console)
    with view:
        view.waiting("reading 512/1,024 tokens")
        deadline = time.monotonic() + 20
        while "reading 512/1,024 tokens" not in terminal.text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "reading 512/1,024 tokens" in terminal.text()
        view.push("\n")
        view.push("Answer")
        while "Answer" not in terminal.text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert terminal.lines() == ["Answer"]
    assert terminal.lines() == ["Answer", ""]


def test_an_empty_answer_leaves_nothing() -> None:
    console, terminal = terminal_console()
    view = TerminalView(console, threaded=False)
    view.waiting("reading")
    view.draw()
    view.__exit__(None, None, None)
    assert terminal.lines() == [""]


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}])
def test_plain_terminals_get_the_text_as_it_is(environment: dict[str, str]) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, _environ=environment)
    assert is_plain(console)
    with make_view(console) as view:
        assert isinstance(view, PlainView)
        view.waiting("reading")
        for piece in ("\n", "# T", "itle\n\n**bold** \x1b[2J[red]x", "[/red]"):
            view.push(piece)
    assert file.getvalue() == "# Title\n\n**bold** [2J[red]x[/red]\n"
