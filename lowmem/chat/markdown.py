"""Markdown as styled lines, one top-level block at a time and independent of the others.

markdown-it parses with the rules of `lowmem.text.markup`, rich lays out. Links and images appear as source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markdown_it.token import Token
from rich import box, markdown
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from lowmem.text.markup import make_parser

CODE_THEME = "ansi_dark"  # the terminal's own 16 colours, which suit light and dark backgrounds
THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.code_block": "none",
        "markdown.block_quote": "italic",
        "markdown.item.bullet": "bold",
        "markdown.item.number": "bold",
        "markdown.hr": "dim",
        "markdown.table.border": "dim",
        "markdown.table.header": "bold",
        **{f"markdown.h{level}": "bold" for level in range(1, 7)},
    }
)
"""rich's theme without backgrounds and colours that only suit dark terminals."""
_TAB = 4
_DEEPEST = 12  # levels of tokens; markdown-it drops those deeper than 20
_NARROWEST = 16 + 2 * _DEEPEST  # columns that the deepest level needs; a narrower terminal wraps

Line = list[Segment]
"""A line of output. Lines of code may be wider than the terminal, which wraps them but copies them whole."""


@dataclass(frozen=True)
class Block:
    """A top-level block: its tokens, and its lines `start` to `stop` (exclusive) of the source."""

    tokens: tuple[Token, ...]
    start: int
    stop: int

    @property
    def kind(self) -> str:
        """markdown-it's type of the first token, such as `fence` or `bullet_list_open`."""
        return self.tokens[0].type

    def item_starts(self) -> list[int]:
        """The first lines of the top-level items of a list."""
        return [t.map[0] for t in self.tokens if t.type == "list_item_open" and t.level == 1 and t.map]


def parse(source: str) -> list[Block]:
    """The top-level blocks. Only the last can change when lines are added to the source."""
    blocks: list[Block] = []
    tokens: list[Token] = []
    for token in _PARSER.parse(source):
        tokens.append(token)
        if token.level == 0 and token.nesting <= 0:
            start, stop = tokens[0].map or (0, 0)
            blocks.append(Block(tuple(tokens), start, stop))
            tokens = []
    return blocks


def render_block(
    block: Block, source: str, console: Console, width: int, number: int | None = None
) -> list[Line]:
    """The block's lines, at most `width` cells wide, except for code and very narrow terminals.

    number: of the first item, where the source continues an ordered list.
    """
    first = block.tokens[0]
    if first.type == "fence":
        return highlight(first.content, first.info)
    depth = max(token.level for token in block.tokens)
    width = max(width, _NARROWEST)
    verbatim = first.type == "code_block" or depth > _DEEPEST
    if not verbatim and first.type == "table_open":
        verbatim = sum(token.type == "th_open" for token in block.tokens) * 6 > width
    if verbatim:
        lines = source.split("\n")[block.start : block.stop]
        return _trim([_line(Text(line.expandtabs(_TAB).rstrip())) for line in lines])
    if number is not None and first.type == "ordered_list_open":
        first.attrs["start"] = number
    options = console.options.update(width=width, height=None, highlight=False, markup=False)
    rendered = console.render_lines(_Blocks(block.tokens), options, pad=False)
    return _trim([_strip(line) for line in rendered])


def render(source: str, console: Console, width: int) -> list[Line]:
    """The lines of all blocks, separated by empty lines."""
    lines: list[Line] = []
    for block in parse(source):
        rendered = render_block(block, source, console, width)
        if lines and rendered:
            lines.append([])
        lines += rendered
    return lines


def highlight(code: str, info: str) -> list[Line]:
    """The lines of a code block, coloured for the language that `info` names."""
    lines = [line.expandtabs(_TAB).rstrip() for line in code.split("\n")]
    if lines and not lines[-1]:
        lines.pop()  # the code ends with a line feed
    plain = "\n".join(lines)
    language = info.split()[0] if info.split() else "text"
    # Most lexers recognize a comment only when it is closed.
    open_comment = plain.rfind("/*") > plain.rfind("*/")
    try:
        syntax = Syntax("", language, theme=CODE_THEME, background_color="default")
        text = syntax.highlight(plain + "\n*/" * open_comment)
    except Exception:  # a failing lexer costs the colours, not the code
        text = Text(plain)
    styled = text.split("\n", allow_blank=True)[: len(lines)]
    if [line.plain for line in styled] != lines:  # some lexers drop a byte order mark or an empty line
        styled = type(styled)(Text(line) for line in lines)
    return [_line(line) for line in styled]


def plain_text(line: Line) -> str:
    """The line without its styles."""
    return "".join(segment.text for segment in line)


def fold(line: Line, width: int) -> list[Line]:
    """Break a line where a terminal of `width` columns would."""
    if cell_len(plain_text(line)) <= width:
        return [line]
    rows: list[Line] = [[]]
    used = 0
    for text, style, _ in line:
        run = ""
        for character in text:
            cells = cell_len(character)
            if used + cells > width and used:
                rows[-1].append(Segment(run, style))
                rows.append([])
                run, used = "", 0
            run += character
            used += cells
        if run:
            rows[-1].append(Segment(run, style))
    return rows


def _line(text: Text) -> Line:
    """A one-line text as segments."""
    console = _PLAIN
    return [segment for segment in text.render(console, end="") if segment.text]


def _strip(line: Line) -> Line:
    """Without rich's padding, which would be copied, and would wrap in a narrower window."""
    line = [segment for segment in line if segment.text and not segment.control]
    while line and (line[-1].style is None or line[-1].style.bgcolor is None):
        text = line[-1].text.rstrip()
        if text:
            line[-1] = Segment(text, line[-1].style)
            break
        line.pop()
    return line


def _trim(lines: list[Line]) -> list[Line]:
    """Without empty lines at either end."""
    while lines and not plain_text(lines[0]).strip():
        del lines[0]
    while lines and not plain_text(lines[-1]).strip():
        lines.pop()
    return lines


class _Heading(markdown.Heading):
    """Flush left, with its # marks: in unfenced code they are comments."""

    def on_enter(self, context: markdown.MarkdownContext) -> None:
        super().on_enter(context)
        self.text.append("#" * int(self.tag[1:]) + " ", context.current_style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _CodeBlock(markdown.CodeBlock):
    """Code within a list or a quotation, without background and frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in highlight(str(self.text), self.lexer_name):
            for row in fold(line, options.max_width):
                yield from row
                yield Segment.line()


class _ListItem(markdown.ListItem):
    """Numbers are at least as wide as two digits.

    rich makes all as wide as the last, so the tenth item would shift the nine before it.
    """

    def render_number(
        self, console: Console, options: ConsoleOptions, number: int, last_number: int
    ) -> RenderResult:
        label = f"{number}.".rjust(3) + " "
        style = console.get_style("markdown.item.number", default="none")
        lines = console.render_lines(
            self.elements, options.update(width=options.max_width - len(label)), style=self.style
        )
        for position, line in enumerate(lines or [[]]):
            yield Segment(" " * len(label) if position else label, style)
            yield from line
            yield Segment.line()


class _Table(markdown.TableElement):
    """Folds long words, which rich cuts off."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE, pad_edge=False, style="markdown.table.border", collapse_padding=True)
        for cell in self.header.row.cells if self.header and self.header.row else ():
            table.add_column(cell.content, header_style="markdown.table.header", overflow="fold")
        for row in self.body.rows if self.body else ():
            table.add_row(*(cell.content for cell in row.cells))
        yield table


class _Rule(markdown.HorizontalRule):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("─" * min(options.max_width, 40), style="markdown.hr")


class _Blocks(markdown.Markdown):
    """rich's renderer for parsed tokens."""

    elements: ClassVar[dict[str, type[markdown.MarkdownElement]]] = {
        **markdown.Markdown.elements,
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
        "hr": _Rule,
        "list_item_open": _ListItem,
        "table_open": _Table,
    }

    def __init__(self, tokens: Sequence[Token]) -> None:
        super().__init__("", code_theme=CODE_THEME, hyperlinks=False)
        self.parsed = list(tokens)


_PARSER = make_parser(links=False)
_PLAIN = Console(file=None, force_terminal=False, width=80)
