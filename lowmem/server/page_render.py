"""Renders Markdown as a tree of a closed set of nodes, from which the page creates elements without HTML.

A node is a text (str) or `[kind, detail, children]`: kind is one of KINDS, detail a text whose meaning
depends on the kind, children a list of nodes. This module restricts the details, and the page checks them
again: the level of a heading, the first number of a list, a web address, a language, the class of a span.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from markdown_it.token import Token
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import (
    Comment,
    Generic,
    Keyword,
    Name,
    Number,
    Operator,
    String,
    _TokenType,
)

from lowmem.text.markup import clean, make_parser

Node = Any
"""A text, or a list [kind, detail, children]."""

LONGEST_TEXT = 200_000
"""Most characters of a text; a longer text is refused."""
MOST_NODES = 20_000
"""Most nodes of a tree; a text that needs more is shown verbatim."""
DEEPEST = 32
"""Most levels of nesting; a deeper block is shown verbatim."""
_LONGEST_CODE = 30_000  # characters of a code block; longer ones are not coloured
_LONGEST_LINE = 2_000  # characters of a line of code: some lexers take quadratic time in it
_COLOURING_SECONDS = 0.25  # for all code of a text; the rest stays plain
_MOST_BRACKETS = 1_000  # with more, links are not parsed: that takes quadratic time

_CONTAINERS = {
    "paragraph_open": "paragraph",
    "blockquote_open": "quotation",
    "bullet_list_open": "list",
    "ordered_list_open": "numbered",
    "list_item_open": "item",
    "heading_open": "heading",
    "table_open": "table",
    "thead_open": "head",
    "tbody_open": "body",
    "tr_open": "row",
    "th_open": "header",
    "td_open": "cell",
    "em_open": "emphasis",
    "strong_open": "strong",
    "s_open": "deleted",
    "link_open": "link",
}
KINDS = frozenset({*_CONTAINERS.values(), "rule", "break", "code", "block", "span"})
"""All kinds. code: inline code; block: a code block with its language; span: coloured text in a block."""

CLASSES = {
    Comment: "comment",
    Comment.Preproc: "meta",
    Comment.PreprocFile: "string",
    Keyword: "keyword",
    Keyword.Constant: "constant",
    Keyword.Type: "type",
    Name.Attribute: "attribute",
    Name.Builtin: "builtin",
    Name.Builtin.Pseudo: "constant",
    Name.Class: "type",
    Name.Constant: "constant",
    Name.Decorator: "meta",
    Name.Entity: "escape",
    Name.Exception: "type",
    Name.Function: "function",
    Name.Tag: "keyword",
    Number: "number",
    Operator.Word: "keyword",
    String: "string",
    String.Affix: "keyword",
    String.Doc: "comment",
    String.Escape: "escape",
    String.Interpol: "escape",
    String.Regex: "escape",
    Generic.Deleted: "removed",
    Generic.Heading: "function",
    Generic.Inserted: "added",
    Generic.Prompt: "comment",
    Generic.Subheading: "function",
    Generic.Traceback: "removed",
}
"""Classes of spans by pygments' token types; other types use their nearest ancestor."""

# A fixed list, since some of pygments' five hundred lexers take very long on crafted input.
_NAMES = (
    "awk bash batch c cmake cpp csharp css cuda dart diff docker elixir erlang fortran fsharp go graphql "
    "groovy haskell html http ini java javascript json julia kotlin latex less lua make markdown nasm "
    "nginx nix objective-c ocaml perl php postgresql powershell protobuf pycon python r ruby rust sass "
    "scala scheme scss sql swift tcl terraform text toml tsx typescript vim xml yaml zig"
)
_LANGUAGES = frozenset(_NAMES.split())
_OTHER_NAMES = {
    "asm": "nasm",
    "assembly": "nasm",
    "c#": "csharp",
    "c++": "cpp",
    "console": "bash",
    "cs": "csharp",
    "cc": "cpp",
    "dockerfile": "docker",
    "f#": "fsharp",
    "f90": "fortran",
    "golang": "go",
    "h": "c",
    "hpp": "cpp",
    "hs": "haskell",
    "js": "javascript",
    "jsx": "javascript",
    "jsonc": "json",
    "kt": "kotlin",
    "makefile": "make",
    "md": "markdown",
    "node": "javascript",
    "objc": "objective-c",
    "patch": "diff",
    "pl": "perl",
    "postgres": "postgresql",
    "proto": "protobuf",
    "ps1": "powershell",
    "py": "python",
    "py3": "python",
    "python3": "python",
    "rb": "ruby",
    "rs": "rust",
    "sh": "bash",
    "shell": "bash",
    "tex": "latex",
    "tf": "terraform",
    "ts": "typescript",
    "txt": "text",
    "plaintext": "text",
    "vimscript": "vim",
    "yml": "yaml",
    "zsh": "bash",
}


@dataclass(frozen=True)
class Rendered:
    """The nodes of a text."""

    blocks: list[Node]
    settled: int
    """The line, from 0, from which blocks may still change when text is appended."""
    settled_blocks: int
    """Number of blocks before that line, which are final."""


def render(text: str) -> Rendered:
    """Render a Markdown text whose lines end with "\\n".

    Raises ValueError for more than LONGEST_TEXT characters.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"the text has {len(text)} characters, at most {LONGEST_TEXT} are rendered")
    source = clean(text)
    lines = source.split("\n")
    colours = _Colours()
    blocks: list[Node] = []
    starts: list[int] = []
    try:
        room = _Room(MOST_NODES)
        parser = _WITH_LINKS if source.count("[") <= _MOST_BRACKETS else _WITHOUT_LINKS
        for tokens in _top_level(parser.parse(source)):
            start, stop = tokens[0].map or (0, 0)
            starts.append(start)
            if max(token.level for token in tokens) > DEEPEST:
                blocks.append(_verbatim("\n".join(lines[start:stop])))
            else:
                blocks.append(_block(tokens, colours, room))
    except _TooManyNodes:
        return Rendered([_verbatim(source)], 0, 0)
    # The last line may still change its meaning when text is appended.
    whole = [index for index, start in enumerate(starts) if start < len(lines) - 1]
    last = whole[-1] if whole else 0
    return Rendered(blocks, starts[last] if starts else 0, last)


def language_label(info: str) -> tuple[str, str]:
    """The info string of a fence → (name of the lexer or "", label to show)."""
    first = clean(info).strip().split(maxsplit=1)[:1]
    name = first[0].strip("{}.,:") if first else ""
    alias = _OTHER_NAMES.get(name.lower(), name.lower())
    if alias in _LANGUAGES:
        return alias, _lexer(alias).name
    return "", name[:24]


class _TooManyNodes(Exception):
    """The tree needs more than MOST_NODES nodes."""


class _Room:
    """The number of nodes that a tree may still have."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes

    def take(self, count: int = 1) -> None:
        self.nodes -= count
        if self.nodes < 0:
            raise _TooManyNodes


def _top_level(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """Yield the tokens of each top-level block."""
    block: list[Token] = []
    for token in tokens:
        block.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield block
            block = []


def _block(tokens: Sequence[Token], colours: _Colours, room: _Room) -> Node:
    """The node of one top-level block."""
    root: list[Node] = []
    _build(tokens, root, colours, room)
    return root[0]


def _build(tokens: Sequence[Token], root: list[Node], colours: _Colours, room: _Room) -> None:
    """Append the nodes of balanced tokens to `root`."""
    stack: list[list[Node]] = [root]
    for token in tokens:
        if token.nesting < 0:
            if not token.hidden:
                stack.pop()
            continue
        if token.hidden:  # the paragraph of an item in a tight list
            continue
        room.take()
        if token.nesting > 0:
            node: Node = [_CONTAINERS[token.type], _detail(token), []]
            stack[-1].append(node)
            stack.append(node[2])
        elif token.type == "inline":
            _build(token.children or [], stack[-1], colours, room)
        elif token.type in ("fence", "code_block"):
            language, label = language_label(token.info)
            spans = colours.spans(token.content.removesuffix("\n"), language)
            room.take(len(spans))
            stack[-1].append(["block", label, spans])
        elif token.type == "code_inline":
            stack[-1].append(["code", "", [token.content]])
        elif token.type in ("hardbreak", "softbreak"):
            stack[-1].append(["break", "", []])
        elif token.type == "hr":
            stack[-1].append(["rule", "", []])
        elif token.type == "image":  # shown as a link, so that nothing is fetched
            address = str(token.attrs.get("src", ""))
            stack[-1].append(["link", address, [token.content or address]])
        elif token.content:
            stack[-1].append(token.content)


def _detail(token: Token) -> str:
    """The detail of an opening token."""
    if token.type == "heading_open":
        return token.tag[1:]
    if token.type == "ordered_list_open":
        return str(token.attrs.get("start", 1))
    if token.type == "link_open":
        return str(token.attrs.get("href", ""))
    if token.type in ("th_open", "td_open"):
        return str(token.attrs.get("style", "")).removeprefix("text-align:")
    return ""


def _verbatim(source: str) -> Node:
    return ["block", "", [source]]


class _Colours:
    """Colours the code blocks of one text within a time limit."""

    def __init__(self) -> None:
        self._until = time.monotonic() + _COLOURING_SECONDS

    def spans(self, code: str, language: str) -> list[Node]:
        """The code as texts and spans."""
        if not code:
            return []
        long = len(code) > _LONGEST_CODE or max(map(len, code.split("\n"))) > _LONGEST_LINE
        if language in ("", "text") or long:
            return [code]
        found = _known_spans(code, language, self._until)
        return found if found is not None else [code]


_KNOWN: dict[tuple[str, str], list[Node]] = {}  # oldest first; a growing answer asks again
_MOST_KNOWN = 32


def _known_spans(code: str, language: str, until: float) -> list[Node] | None:
    key = language, code
    found = _KNOWN.pop(key, None) or _coloured(code, language, until)
    if found is not None:
        _KNOWN[key] = found
        while len(_KNOWN) > _MOST_KNOWN:
            del _KNOWN[next(iter(_KNOWN))]
    return found


def _coloured(code: str, language: str, until: float) -> list[Node] | None:
    """The spans of the code, or None if the lexer fails, changes the text or takes too long."""
    pieces: list[tuple[str, str]] = []
    try:
        for _, kind, text in _lexer(language).get_tokens_unprocessed(code):
            if time.monotonic() > until:
                return None
            name = "" if text.isspace() else _class_of(kind)
            if pieces and (pieces[-1][0] == name or text.isspace()):
                pieces[-1] = pieces[-1][0], pieces[-1][1] + text
            else:
                pieces.append((name, text))
    except Exception:  # without a working lexer the code stays plain
        return None
    if "".join(text for _, text in pieces) != code:
        return None
    return [["span", name, [text]] if name else text for name, text in pieces]


@lru_cache(maxsize=256)
def _class_of(kind: _TokenType) -> str:
    ancestor: _TokenType | None = kind
    while ancestor is not None:
        if ancestor in CLASSES:
            return CLASSES[ancestor]
        ancestor = ancestor.parent
    return ""


@lru_cache(maxsize=len(_LANGUAGES))
def _lexer(alias: str) -> Lexer:
    return get_lexer_by_name(alias, stripnl=False, ensurenl=False)


_WITH_LINKS = make_parser(links=True, nesting=2 * DEEPEST)
_WITHOUT_LINKS = make_parser(links=False, nesting=2 * DEEPEST)
