"""Markdown to the page's tree: a closed set of nodes, no lost text, nothing executable, bounded size."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowmem.server.page_render import (
    CLASSES,
    DEEPEST,
    KINDS,
    LONGEST_TEXT,
    MOST_NODES,
    language_label,
    render,
)
from lowmem.server.page_routes import load_page

PAGE = load_page()


def text_of(node) -> str:
    """The text of a node, with a newline for each break."""
    if isinstance(node, str):
        return node
    return "\n" if node[0] == "break" else "".join(map(text_of, node[2]))


def texts_of(source: str) -> list[str]:
    return [text_of(block) for block in render(source).blocks]


def walk(nodes, depth=0):
    for node in nodes:
        yield node, depth
        if not isinstance(node, str):
            yield from walk(node[2], depth + 1)


def check_tree(nodes) -> None:
    """Check the invariants that the page relies on."""
    for node, depth in walk(nodes):
        assert depth <= 2 * DEEPEST
        if isinstance(node, str):
            assert node and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", node)
            continue
        kind, detail, children = node
        assert kind in KINDS and isinstance(detail, str) and isinstance(children, list)
        if kind == "link":
            assert re.match(r"(https?://|mailto:)", detail, re.IGNORECASE)
        if kind == "span":
            assert detail in CLASSES.values()
        if kind == "heading":
            assert detail in set("123456")
        if kind == "numbered":
            assert detail.isdecimal()
        if kind in ("header", "cell"):
            assert detail in ("", "left", "right", "center")
        if kind == "block":
            assert len(detail) <= 40 and all(isinstance(c, str) or c[0] == "span" for c in children)


def test_nodes_of_an_answer():
    source = (
        "# Title\n\nSome *soft* and **loud** and ~~gone~~ `code`\n\n3. c\n4. d\n   - e\n\n> said\n\n---\n\n"
        "| a | b |\n|:-:|--:|\n| 1 | 2 |\n\n[here](https://example.org/x) <https://example.org>\n"
    )
    blocks = render(source).blocks
    check_tree(blocks)
    assert blocks == [
        ["heading", "1", ["Title"]],
        [
            "paragraph",
            "",
            [
                "Some ",
                ["emphasis", "", ["soft"]],
                " and ",
                ["strong", "", ["loud"]],
                " and ",
                ["deleted", "", ["gone"]],
                " ",
                ["code", "", ["code"]],
            ],
        ],
        ["numbered", "3", [["item", "", ["c"]], ["item", "", ["d", ["list", "", [["item", "", ["e"]]]]]]]],
        ["quotation", "", [["paragraph", "", ["said"]]]],
        ["rule", "", []],
        [
            "table",
            "",
            [
                ["head", "", [["row", "", [["header", "center", ["a"]], ["header", "right", ["b"]]]]]],
                ["body", "", [["row", "", [["cell", "center", ["1"]], ["cell", "right", ["2"]]]]]],
            ],
        ],
        [
            "paragraph",
            "",
            [
                ["link", "https://example.org/x", ["here"]],
                " ",
                ["link", "https://example.org", ["https://example.org"]],
            ],
        ],
    ]


def test_code_is_highlighted_and_its_text_unchanged():
    code = 'def f(x: int) -> str:\n    """Doc."""\n    return "a" + str(1)  # why\n'
    [block] = render(f"```python title=x\n{code}```\n").blocks
    check_tree([block])
    assert block[:2] == ["block", "Python"]
    assert text_of(block) == code.rstrip("\n")
    classes = {node[2][0].strip(): node[1] for node in block[2] if not isinstance(node, str)}
    assert classes["def"] == "keyword" and classes["f"] == "function" and classes["# why"] == "comment"
    assert classes['"a"'] == "string" and classes["1"] == "number" and classes["str"] == "builtin"


@pytest.mark.parametrize(
    ("info", "found"),
    [
        ("py", ("python", "Python")),
        ("C++", ("cpp", "C++")),
        ("", ("", "")),
        ("{.rust}", ("rust", "Rust")),
        ("nolanguage more words", ("", "nolanguage")),
        ("<script>", ("", "<script>")),
        ("\x1b[31m" + "x" * 99, ("", ("[31m" + "x" * 99)[:24])),
    ],
)
def test_language_names(info, found):
    assert language_label(info) == found


def test_highlighting_never_changes_code():
    draw = random.Random(1)
    for language in ("python", "c", "html", "bash", "json", "diff", "yaml", "latex"):
        for _ in range(10):
            code = "".join(draw.choice("ab01 (){}[]<>\"'\\/#*=:;,.\n\t$%&|!~-") for _ in range(300)).strip(
                "\n"
            )
            [block] = render(f"~~~~~~~~~{language}\n{code}\n~~~~~~~~~\n").blocks
            assert text_of(block) == code


@pytest.mark.parametrize(
    "source",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "a <b onclick=x>b</b> &amp; &lt;",
        "<!-- hidden -->",
        "std::vector<int> v; if (a < b && c > d)",
        "__init__ and 2*3*4 and a_b_c",
        ">>> x = 1\n>>> x",
        "first\n    second, indented",
        "[x](javascript:alert(1))",
        "[x](JaVaScRiPt:alert(1))",
        "[x](data:text/html,hi)",
        "[x](vbscript:x) and [y](file:///etc/passwd)",
        "![x](data:image/svg+xml;base64,AAAA)",
        "<javascript:alert(1)>",
        "a[0](x) and [1] and [a]: b",
        "handlers[name]() and ![x]( ) and [](<>) and []()",
        "[x]: https://example.org",
    ],
)
def test_text_that_is_not_markup_is_unchanged(source):
    blocks = render(source).blocks
    check_tree(blocks)
    assert [text_of(block) for block in blocks] == [source]
    assert not [node for node, _ in walk(blocks) if node[0] == "link"]


def test_images_become_links():
    [block] = render("![a cat](https://example.org/cat.png)").blocks
    assert block == ["paragraph", "", [["link", "https://example.org/cat.png", ["a cat"]]]]


def test_control_characters_are_dropped_and_lone_surrogates_replaced():
    assert texts_of("a\x00b\x1b[31mc\u202ed \ud800 e\r") == ["ab[31mcd \ufffd e"]
    assert texts_of("`a\x07b`\n\n```\nx\x1by\n```") == ["ab", "xy"]


def test_nesting_beyond_the_limit_is_shown_as_text():
    deep = "> " * 100 + "heart"
    [block] = render(deep).blocks
    assert block == ["block", "", [deep]]
    lists = "\n".join("  " * level + "- a" for level in range(200))
    blocks = render(lists).blocks
    check_tree(blocks)
    assert sum(text_of(block).count("a") for block in blocks) == 200


def test_the_number_of_nodes_is_limited():
    many = "*a* b\n\n" * MOST_NODES
    many = many[:LONGEST_TEXT]
    rendered = render(many)
    assert rendered.blocks == [["block", "", [many]]]
    assert (rendered.settled, rendered.settled_blocks) == (0, 0)


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match=f"{LONGEST_TEXT + 1} characters"):
        render("a" * (LONGEST_TEXT + 1))


@pytest.mark.parametrize(
    "unit", ["[", "![", "[a](", "*a ", "**a *b ", "a`", "<", "<http://a", "~~a ", "\\", "a|"]
)
def test_pathological_texts_take_linear_time_and_lose_nothing(unit):
    """Each of these makes some Markdown parser quadratic; the pytest timeout fails a slow one."""
    text = unit * (20_000 // len(unit))
    blocks = render(text).blocks
    check_tree(blocks)
    letter = next((letter for letter in unit if letter.isalpha()), unit[0])
    kept = "".join(map(text_of, blocks)).count(letter)
    assert kept == text.count(letter) // (2 if unit == "\\" else 1)


MARKS = [
    "a",
    "*",
    "**",
    "_",
    "`",
    "```",
    "\n",
    "\n\n",
    "- ",
    "1. ",
    "> ",
    "# ",
    "| ",
    "|-|-|\n",
    "[",
    "](",
    ")",
]
OTHERS = [
    "https://a.b",
    "javascript:",
    "<b>",
    "  ",
    "    ",
    "\t",
    "\\",
    "~~",
    "~~~",
    "---\n",
    "é",
    "\x1b",
    "\ud800",
]
WORDS = st.sampled_from([*MARKS, *OTHERS])


@given(st.lists(WORDS, max_size=40).map("".join))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_a_valid_tree(text):
    rendered = render(text)
    check_tree(rendered.blocks)
    assert 0 <= rendered.settled <= text.count("\n")
    assert 0 <= rendered.settled_blocks <= len(rendered.blocks)


@example(["- a\n- - -", "b"], 9)  # one more letter turns a rule into an item of the list before it
@given(st.lists(WORDS, max_size=60), st.integers(0, 200))
@settings(max_examples=400, deadline=None)
def test_complete_blocks_stay_when_text_is_appended(words, length):
    """The page sends an answer from its last complete block on; earlier blocks must never change."""
    text = "".join(words)
    early = render(text[:length])
    kept = early.blocks[: early.settled_blocks]
    rest = render("\n".join(text.split("\n")[early.settled :])).blocks
    assert kept + rest == render(text).blocks


def test_the_page_knows_every_node_and_class():
    """The page has its own closed set of kinds, and shows unknown kinds as plain text."""
    script = PAGE["nodes.js"].content.decode()
    for kind in KINDS:
        assert re.search(rf'\b{kind}: "|case "{kind}"', script), kind
    known = set(re.findall(r'"(\w+)"', script[script.index("CLASSES = ") : script.index("SCHEMES")]))
    assert known == set(CLASSES.values())
    style = PAGE["prose.css"].content.decode()
    assert all(f".code-{name}" in style for name in known)


def test_the_page_loads_only_its_own_files_and_has_no_inline_script_or_style():
    index = PAGE["index.html"].content.decode()
    asked = set(re.findall(r'(?:src|href)="(/page/[^"]+)"', index))
    for name, file in PAGE.items():
        text = file.content.decode()
        asked |= {f"/page/{found}" for found in re.findall(r'from "\./([^"]+)"', text)}
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
        ), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
    assert asked == {f"/page/{name}" for name in PAGE} - {"/page/index.html"}
    assert not re.search(r"<script>|<style|\sstyle=|\son\w+=", index)
