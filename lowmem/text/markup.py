"""A model's output as clean text, and as markdown that loses none of it.

CommonMark would drop parts of what a coding assistant writes. Here `<int>` is not an HTML tag, `__init__` is
not bold, `2*3*4` has no emphasis, `>>> x` is not a quotation, line ends and indentation stay, and entities
are shown as written. Code without a fence can therefore still be read and copied.
"""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_block.blockquote import blockquote
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline import emphasis as emphasis_rule
from markdown_it.rules_inline.image import image
from markdown_it.rules_inline.link import link

_KEPT = "\n\t"
# C0, DEL and C1 controls; then bidirectional marks, which make code look different from what it is.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_DELETED = {code: None for code in _CONTROLS if chr(code) not in _KEPT}
# A lone surrogate cannot be encoded: printing or saving it would fail.
_REPLACED = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
_TABLE: dict[int, str | None] = {**_DELETED, **_REPLACED}
_LINKED = ("http://", "https://", "mailto:")
_CALLED = re.compile(r"\(\s*\)")  # follows handlers[name] in a program


def clean(text: str) -> str:
    """Remove control characters other than line feed and tab.

    An escape sequence loses its escape character and remains as harmless text. Characters are handled one by
    one, so a text may be cleaned in pieces.
    """
    return text.translate(_TABLE)


class _Parser(MarkdownIt):
    """Links lead to the web or to a mail address; the source of any other link is shown."""

    def validateLink(self, url: str) -> bool:  # markdown-it's name
        return url.lower().startswith(_LINKED)


def make_parser(*, links: bool, nesting: int = 20) -> MarkdownIt:
    """A markdown-it parser with the rules above, without HTML and reference definitions.

    links: produce tokens for links, autolinks and images; otherwise their source is shown. nesting: the depth
    below which markdown-it drops tokens. Without reference definitions no block depends on a later one: when
    whole lines are added to a source, only its last top-level block can change.
    """
    parser = _Parser("commonmark", {"html": False, "maxNesting": nesting})
    parser.enable(["table", "strikethrough"])
    parser.disable(["reference", "html_block", "html_inline", "entity"])
    if not links:
        parser.disable(["autolink", "link", "image"])
    parser.inline.ruler.at("link", _link_unless_call)
    parser.inline.ruler.at("image", _image_unless_call)
    parser.inline.ruler.at("newline", _keep_line_ends)
    parser.inline.ruler.at("emphasis", _emphasis_by_stars)
    parser.block.ruler.at(
        "blockquote",
        _quotation_unless_doctest,
        {"alt": ["paragraph", "reference", "blockquote", "list"]},
    )
    return parser


def _keep_line_ends(state: StateInline, silent: bool) -> bool:
    """Every line end is a break, and the next line keeps its indentation."""
    if state.src[state.pos] != "\n":
        return False
    if not silent:
        state.pending = state.pending.rstrip(" ")
        state.push("hardbreak", "br", 0)
    state.pos += 1
    return True


def _emphasis_by_stars(state: StateInline, silent: bool) -> bool:
    """Emphasis by stars outside words and products; never by underscores."""
    source, start = state.src, state.pos
    if source[start] != "*" or (start and source[start - 1] == "*"):
        return False
    stop = start
    while stop < state.posMax and source[stop] == "*":
        stop += 1
    before, after = source[start - 1 : start], source[stop : stop + 1]
    if _is_ascii_word(before) and _is_ascii_word(after):
        return False
    return emphasis_rule.tokenize(state, silent)


def _link_unless_call(state: StateInline, silent: bool) -> bool:
    """`handlers[name]()` is not a link."""
    return not _is_call(state, state.pos, "[") and link(state, silent)


def _image_unless_call(state: StateInline, silent: bool) -> bool:
    return not _is_call(state, state.pos + 1, "![") and image(state, silent)


def _is_call(state: StateInline, bracket: int, mark: str) -> bool:
    """Whether `mark` is here, and empty parentheses follow the label that begins at `bracket`."""
    if not state.src.startswith(mark, state.pos):
        return False
    end = state.md.helpers.parseLinkLabel(state, bracket, mark == "[")
    return end >= 0 and _CALLED.match(state.src, end + 1) is not None


def _is_ascii_word(character: str) -> bool:
    return character.isascii() and character.isalnum()


def _quotation_unless_doctest(state: StateBlock, start: int, stop: int, silent: bool) -> bool:
    """`>>> x` is a Python prompt."""
    first = state.bMarks[start] + state.tShift[start]
    return not state.src.startswith(">>>", first) and blockquote(state, start, stop, silent)
