"""Excerpts of source packages for the calibration text: dialogues about code, and stretches of text.

Each of MAKERS takes (language, text of a file, random generator) and yields (prompt, response) or (text,).
"""

from __future__ import annotations

import ast
import doctest
import html
import random
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = {"python": "Python", "javascript": "JavaScript", "typescript": "TypeScript", "c": "C", "cpp": "C++",
         "rust": "Rust", "go": "Go", "java": "Java", "shell": "shell", "sql": "SQL"}  # fmt: skip


@dataclass(frozen=True)
class Function:
    """A documented function: `code` without its documentation, `documented` with it."""

    name: str
    doc: str
    code: str
    documented: str


def python_functions(text: str) -> Iterator[Function]:
    """Functions and classes with a docstring, from the syntax tree."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        doc = ast.get_docstring(node)
        if not doc or len(node.body) < 2 or node.name.startswith("__"):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        docstring = node.body[0]
        whole = lines[first : node.end_lineno]
        bare = lines[first : docstring.lineno - 1] + lines[docstring.end_lineno or 0 : node.end_lineno]
        yield Function(node.name, doc, textwrap.dedent("\n".join(bare)), textwrap.dedent("\n".join(whole)))


HEADS = {
    "go": re.compile(r"func\b"),
    "rust": re.compile(r"(?:#\[.*\]\s*)*(?:pub(?:\(\w+\))?\s+)?(?:const\s+|unsafe\s+)*fn\b"),
    "shell": re.compile(r"(?:function\s+)?\w+\s*\(\)"),
}
NAME = {
    "go": re.compile(r"func\s+(?:\([^)]*\)\s*)?(\w+)"),
    "rust": re.compile(r"\bfn\s+(\w+)"),
    "c": re.compile(r"([A-Za-z_]\w*)\s*(?:<[^()]*>)?\s*(?:=\s*(?:async\s+)?function\s*\w*\s*)?\("),
}
NOT_A_HEAD = (
    r"(?:if|else|for|while|switch|do|try|catch|return|case|describe|it|test|\w*ForEach|.*\boperator)\b"
)
ASSIGNMENT = r"[^(]*[^=!<>]=[^=>](?!.*(?:function|=>))"
OTHER_HEAD = re.compile(rf"(?!\}}|{NOT_A_HEAD}|{ASSIGNMENT})")


def commented_functions(language: str, text: str) -> Iterator[Function]:
    """Functions of a language with braces (or of the shell) that a comment stands right above.

    The end is found by layout: the first line after the opening brace that closes it at the same indent.
    """
    lines = text.splitlines()
    comment = re.compile(r"\s*(///?!?|/\*|\*|#(?![!\[])(?!include|define|if|endif|else|pragma))")
    is_function = HEADS.get(language, OTHER_HEAD)
    start = 0
    while start < len(lines):
        if not comment.match(lines[start]):
            start += 1
            continue
        top = start
        while start < len(lines) and comment.match(lines[start]):
            start += 1
        head_ends = (i for i in range(start, min(start + 7, len(lines)))
                     if not lines[i].strip() or lines[i].rstrip()[-1] in "{;}")  # fmt: skip
        opening = next(head_ends, None)
        if opening is None or not lines[opening].rstrip().endswith("{"):
            continue
        head = re.sub(r"@\w+(?:\([^()]*\))?\s*", "", " ".join(lines[start : opening + 1])).strip()
        name = NAME.get(language, NAME["c"]).search(head)
        indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
        end = next((i for i in range(opening + 1, min(opening + 60, len(lines)))
                    if lines[i].startswith(indent + "}")), None)  # fmt: skip
        if end is None or name is None or not is_function.match(head):
            continue
        doc = clean_comment("\n".join(lines[top:start]))
        code = textwrap.dedent("\n".join(lines[start : end + 1]))
        yield Function(name[1], doc, code, textwrap.dedent("\n".join(lines[top : end + 1])))
        start = end + 1


def clean_comment(comment: str) -> str:
    """The words of a comment block, without its marks and without Javadoc's markup."""
    lines = [re.sub(r"^\s*(///?!?|/\*+!?|\*+/|\*+|#)\s?", "", line).rstrip() for line in comment.splitlines()]
    text = textwrap.dedent("\n".join(line.removesuffix("*/").rstrip() for line in lines)).strip("\n -=")
    text = re.sub(r"\{@(?:code|link|linkplain)\s+([^{}]*)\}", r"`\1`", text)
    return html.unescape(re.sub(r"</?(p|ul|li|code|i|b|em|pre|tt)>", "", text)).strip()


def function_dialogues(language: str, text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Questions and answers about documented functions, in both directions and in varied words."""
    found = list(python_functions(text) if language == "python" else commented_functions(language, text))
    rng.shuffle(found)
    for item in found:
        if (
            item.doc.startswith("@")
            or len(item.doc.split()) < 6
            or not (40 <= len(item.doc) <= 1200 and 3 <= item.code.count("\n") + 1 <= 45)
        ):
            continue
        tongue, mark = NAMES[language], "bash" if language == "shell" else language
        code, whole = f"```{mark}\n{item.code}\n```", f"```{mark}\n{item.documented}\n```"
        summary = " ".join(
            re.split(r"\n\s*\n|\n\s*[@:]|\n\s*(?:Args|Parameters|Returns)\b", item.doc)[0].split()
        )
        summary = summary if summary.endswith((".", "!", ":")) else summary + "."
        yield rng.choice(
            (
                (f"Write a {tongue} function that does the following: {summary}", code),
                (f"Implement `{item.name}` in {tongue}. {summary}", whole),
                (f"I need a {tongue} function called `{item.name}`. {summary}", f"{code}\n\n{item.doc}"),
                (f"How would you implement this in {tongue}?\n\n{summary}", code),
                (f"What does this {tongue} code do?\n\n{code}", item.doc),
                (f"Explain the following {tongue} code.\n\n{code}", item.doc),
                (f"{code}\n\nDescribe what `{item.name}` is for.", item.doc),
                (f"Document this {tongue} code.\n\n{code}", whole),
            )
        )


def doctest_dialogues(language: str, text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """What an interactive session of a docstring prints."""
    for item in python_functions(text):
        try:
            examples = doctest.DocTestParser().get_examples(item.doc)
        except ValueError:
            continue
        source = "".join(example.source for example in examples)
        shown = "".join(example.want for example in examples)
        if len(source) > 60 and 5 < len(shown) < 800:
            yield f"What does this Python code print?\n\n```python\n{source}```", f"```\n{shown}```"


REWRITES = (
    "Rewrite this SQL query without needless subqueries.",
    "Optimize this SQL query.",
    "Simplify the following query, and qualify every column.",
)


def rewrite_dialogues(language: str, text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """sqlglot's fixtures: a title, a query, and the query that its optimizer makes of it."""
    for case in re.split(r"\n\s*\n|\n(?=--)", text):
        body = re.sub(r"(?m)^(#|--).*$", "", case).strip()
        parts = [part.strip() for part in body.split(";") if part.strip()]
        if len(parts) == 2 and len(parts[0]) > 60 and len(parts[1]) < 2500:
            ask = rng.choice(REWRITES)
            yield f"{ask}\n\n```sql\n{parts[0]};\n```", f"```sql\n{parts[1]};\n```"


def rst_sections(text: str) -> list[tuple[str, str]]:
    """(title, body) of every section of a reStructuredText page, the bodies as Markdown."""
    parts = re.split(r"(?m)^(?:[=*#]{4,}\n)?(\S.*)\n([=\-*~^\"']{4,})\n", text)
    return [(markdown(parts[i]).strip(), markdown(parts[i + 2])) for i in range(1, len(parts) - 2, 3)]


DROPPED = re.compile(
    r"(?m)^ *\.\. (_|\[|index|only|versionadded|versionchanged|deprecated|sectionauthor|moduleauthor|rubric"
    r"|currentmodule|module|toctree|contents|testsetup)[^\n]*\n((?: +[^\n]*)?\n)*"
)
CODE_DIRECTIVE = re.compile(
    r"\s*\.\. (?:code-block|sourcecode|highlight|doctest|testcode)::\s*(\w*)(?:\n +:.*)*(?:\n[ \t]*)?"
)


def markdown(rst: str) -> str:
    """Markdown of a piece of reStructuredText: roles, links, directives and literal blocks."""
    rst = DROPPED.sub("", rst)
    rst = re.sub(r"(?m)^( *)\.\. (note|seealso|warning|tip)::[ \n]*", r"\1Note: ", rst)
    rst = re.sub(r":[\w:-]+:`[~!]?([^`<]*?)(?:\s*<[^`>]*>)?`", r"`\1`", rst)
    rst = re.sub(r"`([^`<]+?)\s*<[^`>]+>`_+", r"\1", rst).replace("``", "`")
    rst = re.sub(r"\b([A-Z][\w-]*[a-z])_(?=[\s,.;)])", r"\1", rst)
    blocks: list[str] = []
    fence = margin = ""
    for block in re.split(r"\n[ \t]*\n", rst.strip("\n")):
        directive = CODE_DIRECTIVE.fullmatch(block)
        if directive:
            fence, margin = directive[1] or "python", ""
        elif fence and block.startswith(" "):
            margin = margin or re.match(r" *", block)[0]  # type: ignore[index]
            code = re.sub(rf"(?m)^{margin}", "", block)
            if blocks and blocks[-1].endswith("\n```") and blocks[-1].startswith(f"```{fence}"):
                blocks[-1] = blocks[-1].removesuffix("\n```") + f"\n\n{code}\n```"
            else:
                blocks.append(f"```{fence}\n{code}\n```")
        else:
            fence, margin = "python" if block.rstrip().endswith("::") else "", ""
            block = re.sub(r"\s?::$", ":", block.rstrip())
            is_session = block.lstrip().startswith(">>>")
            blocks.append(f"```python\n{textwrap.dedent(block)}\n```" if is_session else block)
    return "\n\n".join(block for block in blocks if block.strip(": \n"))


def faq_dialogues(language: str, text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """The questions of a FAQ and their answers."""
    for title, body in rst_sections(text):
        if title.endswith("?") and 80 < len(body) < 4500:
            yield title, body


def html_text(page: str) -> str:
    """The words of a piece of HTML, paragraphs apart, preformatted code in fences."""
    page = re.sub(r"(?s)<(script|style|svg|table)\b.*?</\1>", "", page)
    page = re.sub(
        r"(?s)<pre[^>]*>(.*?)</pre>", lambda m: "\n\n```sql\n" + m[1].strip("\n") + "\n```\n\n", page
    )
    pieces = re.split(r"(?s)(```.*?```)", page)
    for i in range(0, len(pieces), 2):
        paragraphs = re.split(
            r"(?i)</?(?:p|h\d|ol|ul|dl|dd|dt|blockquote|div|center)\b[^>]*>|<br>|\n\s*\n", pieces[i]
        )
        listed = (re.sub(r"(?i)<li\b[^>]*>", "\n- ", paragraph) for paragraph in paragraphs)
        lines = (
            "\n".join(" ".join(line.split()) for line in paragraph.split("\n- ")) for paragraph in listed
        )
        pieces[i] = "\n\n" + "\n\n".join(line.strip() for line in lines if line.strip()) + "\n\n"
    words = re.sub(r"<[^>]*>", "", "".join(pieces))
    return re.sub(r"\n{3,}", "\n\n", html.unescape(words)).strip()


def html_faq_dialogues(language: str, page: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """SQLite's FAQ: a bold question in a list, its answer in a quotation."""
    for match in re.finditer(r"(?s)<p><b>\(\d+\) (.*?)</b></p>\s*<blockquote>(.*?)</blockquote></li>", page):
        yield " ".join(html_text(match[1]).split()), html_text(match[2])


def excerpts(text: str, rng: random.Random, least: int = 900, most: int = 3600) -> Iterator[tuple[str]]:
    """One stretch of a text, begun and ended at an empty line before something unindented."""
    pieces = re.split(r"\n\n+(?=[^\s)}\]])", text.expandtabs(4) if "\t" not in text[:20000] else text)
    start, length = rng.randrange(len(pieces)), rng.randrange(least, most)
    taken: list[str] = []
    for piece in pieces[start:]:
        if taken and sum(map(len, taken)) + len(piece) > length:
            break
        taken.append(piece.strip("\n"))
    stretch = "\n\n".join(taken)
    if 500 <= len(stretch) <= 5000:
        yield (stretch + "\n",)


def prose_excerpts(language: str, text: str, rng: random.Random) -> Iterator[tuple[str]]:
    """One stretch of a manual's page."""
    titled = "\n\n".join(f"## {title}\n\n{body}" for title, body in rst_sections(text))
    yield from excerpts(titled, rng, 1500, 4500)


Maker = Callable[[str, str, random.Random], Iterator[tuple[str, ...]]]  # (text,) or (prompt, response)
MAKERS: dict[str, Maker] = {
    "functions": function_dialogues,
    "examples": doctest_dialogues,
    "rewrites": rewrite_dialogues,
    "faq": faq_dialogues,
    "html_faq": html_faq_dialogues,
    "prose": prose_excerpts,
    "html_prose": lambda _, page, rng: excerpts(html_text(page.split("</h1>", 1)[-1]), rng, 1500, 4500),
    "text": lambda _, text, rng: excerpts(text, rng),
}
