"""A model's output as clean text, and as Markdown that loses none of it.

Where CommonMark would drop or change output of a coding assistant, it is kept: `<int>` is not an HTML tag,
`__init__` is not bold, `2*3*4` has no emphasis, `>>> x` is not a quotation, line breaks and indentation stay,
and entities are shown literally. So code outside of a fence can still be read and copied.
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
# C0, DEL and C1 controls; then marks that reorder the text around them, so that code reads other than it is.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_DELETED = {code: None for code in _CONTROLS if chr(code) not in _KEPT}
# Half a surrogate pair has no encoding: printing or saving it would fail.
_REPLACED = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
_TABLE: dict[int, str | None] = {**_DELETED, **_REPLACED}
_LINKED = ("http://", "https://", "mailto:")
_CALLED = re.compile(r"\(\s*\)")  # what stands behind handlers[name] in a program


def clean(text: str) -> str:
    """The text without control characters (line feed and tab stay), one character at a time.

    An escape sequence loses its escape character and stays as harmless text; since no character depends on
    another, a text cleaned in pieces is the same as one cleaned whole.
    """
    return text.translate(_TABLE)


class _Parser(MarkdownIt):
    """Links lead to the web or to a mail address; of any other the source is shown."""

    def validateLink(self, url: str) -> bool:  # markdown-it's name
        return url.lower().startswith(_LINKED)


def make_parser(*, links: bool, nesting: int = 20) -> MarkdownIt:
    """A markdown-it parser by the rules above: no HTML, no definitions of references.

    links: make tokens of links, autolinks and images, else show their source. nesting: levels of tokens;
    what lies deeper is dropped by markdown-it. Without definitions no block depends on a later one: when
    whole lines are added to a source, only its last top-level block can change.
    """
    parser = _Parser("commonmark", {"html": False, "maxNesting": nesting})
    parser.enable(["table", "strikethrough"])
    parser.disable(["reference", "html_block", "html_inline", "entity"])
    if not links:
        parser.disable(["autolink", "link", "image"])
    parser.inline.ruler.at("link", _link_but_no_call)
    parser.inline.ruler.at("image", _image_but_no_call)
    parser.inline.ruler.at("newline", _keep_line_ends)
    parser.inline.ruler.at("emphasis", _stars_between_words)
    parser.block.ruler.at(
        "blockquote",
        _quotation_but_no_doctest,
        {"alt": ["paragraph", "reference", "blockquote", "list"]},
    )
    return parser


def _keep_line_ends(state: StateInline, silent: bool) -> bool:
    """A line's end is a line's end, and the next line keeps its indentation."""
    if state.src[state.pos] != "\n":
        return False
    if not silent:
        state.pending = state.pending.rstrip(" ")
        state.push("hardbreak", "br", 0)
    state.pos += 1
    return True


def _stars_between_words(state: StateInline, silent: bool) -> bool:
    """Emphasis by stars that do not stand inside of a word or a product; never by underscores."""
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


def _link_but_no_call(state: StateInline, silent: bool) -> bool:
    """`handlers[name]()` leads nowhere."""
    return not _is_call(state, state.pos, "[") and link(state, silent)


def _image_but_no_call(state: StateInline, silent: bool) -> bool:
    return not _is_call(state, state.pos + 1, "![") and image(state, silent)


def _is_call(state: StateInline, bracket: int, mark: str) -> bool:
    """Whether empty parentheses follow what begins at `bracket`, if `mark` is what stands here at all."""
    if not state.src.startswith(mark, state.pos):
        return False
    end = state.md.helpers.parseLinkLabel(state, bracket, mark == "[")
    return end >= 0 and _CALLED.match(state.src, end + 1) is not None


def _is_ascii_word(character: str) -> bool:
    return character.isascii() and character.isalnum()


def _quotation_but_no_doctest(state: StateBlock, start: int, stop: int, silent: bool) -> bool:
    """`>>> x` is a Python prompt."""
    first = state.bMarks[start] + state.tShift[start]
    return not state.src.startswith(">>>", first) and blockquote(state, start, stop, silent)
