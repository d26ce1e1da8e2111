"""Markdown → a tree of a closed set of nodes, of which the page makes elements: no HTML anywhere on the way.

A node is a text (str) or `[kind, detail, children]`: kind is one of KINDS, detail a text whose meaning
depends on the kind, children a list of nodes. What a detail may be is decided here and checked again by the
page: the level of a heading, the first number of a list, an address of the web, a language, a span's class.
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
"""A text, or a list [kind, detail, children] of two texts and a list of nodes."""

LONGEST_TEXT = 200_000
"""Characters of a text that are rendered; a longer one is refused."""
MOST_NODES = 20_000
"""Nodes of a tree; a text that makes more is shown as it was written."""
DEEPEST = 32
"""Levels of tokens; a block that nests deeper is shown as it was written."""
_LONGEST_CODE = 30_000  # characters of a code block that are coloured
_LONGEST_LINE = 2_000  # of its longest line: some lexers take time quadratic in that
_COLOURING_SECONDS = 0.25  # for all code of a text; what comes later stays plain
_MOST_BRACKETS = 1_000  # where links are looked for: that takes time quadratic in their number

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
"""All kinds. code: inline; block: a code block, its detail the language; span: coloured text inside it."""

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
"""pygments' token types → classes of spans; a type that is not here has its nearest ancestor's."""

# Lexers are chosen, not looked for: some of pygments' five hundred take very long on made-up input.
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
    """A text's blocks as nodes. settled: the line (from 0) from which on they may change when text is added.

    Blocks that begin before that line are `settled_blocks` many, and stay as they are.
    """

    blocks: list[Node]
    settled: int
    settled_blocks: int


def render(text: str) -> Rendered:
    """The tree of a markdown text of at most LONGEST_TEXT characters; ValueError for a longer one.

    Lines are those that "\\n" ends: the caller sends no other line ends where it counts them.
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
    # What is written in the last line may still become something else.
    whole = [index for index, start in enumerate(starts) if start < len(lines) - 1]
    last = whole[-1] if whole else 0
    return Rendered(blocks, starts[last] if starts else 0, last)


def language_label(info: str) -> tuple[str, str]:
    """What stands behind a fence's marks → (the lexer's name or "", the label to be shown)."""
    first = clean(info).strip().split(maxsplit=1)[:1]
    name = first[0].strip("{}.,:") if first else ""
    alias = _OTHER_NAMES.get(name.lower(), name.lower())
    if alias in _LANGUAGES:
        return alias, _lexer(alias).name
    return "", name[:24]


class _TooManyNodes(Exception):
    """The tree would have more than MOST_NODES."""


class _Room:
    """How many nodes a tree may still have."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes

    def take(self, count: int = 1) -> None:
        self.nodes -= count
        if self.nodes < 0:
            raise _TooManyNodes


def _top_level(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of one top-level block at a time."""
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
    """Append the tokens' nodes to `root`; opening and closing tokens are in balance."""
    stack: list[list[Node]] = [root]
    for token in tokens:
        if token.nesting < 0:
            if not token.hidden:
                stack.pop()
            continue
        if token.hidden:  # the paragraph of a tight list's item
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
        elif token.type == "image":  # nothing is fetched unless someone follows it
            address = str(token.attrs.get("src", ""))
            stack[-1].append(["link", address, [token.content or address]])
        elif token.content:
            stack[-1].append(token.content)


def _detail(token: Token) -> str:
    """What an opening token says beside its type."""
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
    """Colours the code blocks of one text, as long as there is time for it."""

    def __init__(self) -> None:
        self._until = time.monotonic() + _COLOURING_SECONDS

    def spans(self, code: str, language: str) -> list[Node]:
        """The code as texts and spans, whose joined text is the code."""
        if not code:
            return []
        long = len(code) > _LONGEST_CODE or max(map(len, code.split("\n"))) > _LONGEST_LINE
        if language in ("", "text") or long:
            return [code]
        found = _known_spans(code, language, self._until)
        return found if found is not None else [code]


_KNOWN: dict[tuple[str, str], list[Node]] = {}  # the last ones, oldest first: a growing answer asks again
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
    """The code's spans, or None when the lexer chokes, changes the text or takes too long."""
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
    except Exception:  # a lexer that chokes costs the colours, never the code
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
