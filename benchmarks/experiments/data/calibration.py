"""Make `lowmem/data/calibration/` from the source packages named in its `sources.json`.

    python benchmarks/experiments/data/calibration.py SOURCES

SOURCES holds one unpacked folder a package, named as in `sources.json`: Debian binary packages
(`apt-get download NAME`, then `dpkg-deb -x`), the original tarballs of Debian source packages (`apt-get
source --download-only NAME`), npm packages (`npm pack NAME@VERSION`), wheels and sdists (`pip download
--no-deps NAME==VERSION`), and CPython's standard library as `cpython-3.11.7/Lib`. The same folders give
the same bytes: every draw is made by a generator seeded with the package's name.

No excerpt is taken that shares text with the held-out evaluation text of tiny-starchat (`HeldOut`), that
names an author, a licence or an e-mail address, or that is a table of numbers.
"""

from __future__ import annotations

import argparse
import ast
import doctest
import html
import json
import random
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parents[3] / "lowmem" / "data"


@dataclass(frozen=True)
class Take:
    """At most `chars` characters of `language` from the files of `globs`, made into records by `how`."""

    language: str
    how: str  # a key of MAKERS
    chars: int
    globs: tuple[str, ...]


@dataclass(frozen=True)
class Package:
    """A source package: its folder under SOURCES, what is taken of it, and under which licence."""

    name: str
    folder: str
    license: str  # SPDX
    copyright: str
    takes: tuple[Take, ...]


def read_packages() -> tuple[list[Package], dict[str, str]]:
    """The packages of sources.json, and for each licence the file that its text is copied from."""
    table = json.loads((DATA / "calibration" / "sources.json").read_text("utf-8"))
    packages = [
        Package(
            **{
                **entry,
                "takes": tuple(Take(**{**take, "globs": tuple(take["globs"])}) for take in entry["takes"]),
            }
        )
        for entry in table["packages"]
    ]
    return packages, table["license_texts"]


NAMES = {"python": "Python", "javascript": "JavaScript", "typescript": "TypeScript", "c": "C", "cpp": "C++",
         "rust": "Rust", "go": "Go", "java": "Java", "shell": "shell", "sql": "SQL"}  # fmt: skip
UNWANTED = re.compile(
    r"[\w.+-]+@[\w-]+\.\w|copyright|licen[sc]e|SPDX|\bauthors?\b\s*[:=(]|written by|<\|\w+\|>|<fim_", re.I
)


class HeldOut:
    """The evaluation text that no calibration excerpt may share.

    Two things count as shared: five successive lines (stripped; those under 20 characters are passed
    over), and a sentence of 60 characters or more.
    """

    def __init__(self, folder: Path) -> None:
        texts = [(folder / "heldout.txt").read_text("utf-8")]
        for dialogue in json.loads((folder / "dialogues_heldout.json").read_text("utf-8")):
            texts += [dialogue["prompt"], dialogue["response"]]
        self.runs = {run for text in texts for run in self.line_runs(text)}
        self.sentences = {sentence for text in texts for sentence in self.long_sentences(text)}

    @staticmethod
    def line_runs(text: str) -> set[tuple[str, ...]]:
        """Every run of five successive lines of 20 characters or more."""
        lines = [line for line in map(str.strip, text.splitlines()) if len(line) >= 20]
        return {tuple(lines[i : i + 5]) for i in range(len(lines) - 4)}

    @staticmethod
    def long_sentences(text: str) -> set[str]:
        """Sentences of 60 characters or more, split at full stops, quotes and empty lines."""
        pieces = re.split(r"[.!?:;]\s|\"\"\"|'''|\n[\s#*/]*\n|```", text)
        cleaned = (re.sub(r"[\s#*/]+", " ", piece).strip(" .!?:;") for piece in pieces)
        return {piece for piece in cleaned if len(piece) >= 60}

    def shares(self, text: str) -> bool:
        """Whether `text` has something in common with the evaluation text."""
        return bool(self.line_runs(text) & self.runs or self.long_sentences(text) & self.sentences)


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


def wanted(text: str, language: str, held_out: HeldOut) -> bool:
    """Whether an excerpt may be taken: clean words, no table of numbers, not evaluation text."""
    lines = text.splitlines()
    digits = sum(character.isdigit() for character in text)
    ascii_enough = sum(ord(character) > 0x2FF for character in text) < 0.02 * len(text)
    plain = (
        ascii_enough
        and digits < 0.12 * len(text)
        and max(map(len, lines), default=0) <= (2000 if language == "english" else 300)
    )
    return plain and not UNWANTED.search(text) and not held_out.shares(text)


def take(package: Package, wish: Take, root: Path, held_out: HeldOut,
         runs: set[tuple[str, ...]]) -> list[dict[str, str]]:  # fmt: skip
    """The records of one `Take`, drawn file by file in a seeded order until its characters are reached.

    `runs` collects the line runs of everything taken so far, so that nothing is taken twice.
    """
    rng = random.Random(f"{package.name} {wish.language} {wish.how}")
    files = sorted(
        {
            path
            for pattern in wish.globs
            for path in root.glob(pattern)
            if path.is_file() and not re.search(r"_test\.|\.test\.|/tests?/", str(path.relative_to(root)))
        }
    )
    if not files:
        raise SystemExit(f"{root}: nothing matches {wish.globs}")
    texts = {path: path.read_text("utf-8", "replace") for path in files}
    records: list[dict[str, str]] = []
    seen: set[str] = set()
    total = 0
    many = "faq" in wish.how or wish.how == "rewrites"
    for _ in range(6):  # rounds of a few records a file, so that many files have a share
        rng.shuffle(files)
        for path in files:
            if total > 0.97 * wish.chars:
                return records
            for item in list(MAKERS[wish.how](wish.language, texts[path], rng))[: 200 if many else 3]:
                content = "\n".join(item)
                fences = re.findall(r"(?s)```(.*?)```", content)
                key = " ".join((fences[-1] if fences else content).split()[-12:])  # how the code ends
                mine = HeldOut.line_runs(content)
                if total + len(content) > wish.chars or key in seen or mine & runs:
                    continue
                if not wanted(content, wish.language, held_out):
                    continue
                seen.add(key)
                runs |= mine
                total += len(content)
                record = {"kind": "text" if len(item) == 1 else "dialogue", "language": wish.language}
                record |= {"text": item[0]} if len(item) == 1 else {"prompt": item[0], "response": item[1]}
                record["source"] = f"{package.name} {path.relative_to(root).as_posix()}"
                records.append({**record, "license": package.license})
    return records


def licenses(sources: Path, packages: list[Package], texts: dict[str, str]) -> str:
    """The notices that the licences ask for: whose work, under which licence, and the licences' texts."""
    parts = [
        "builtin.jsonl holds excerpts of the works below, each under its own licence. The licences' texts\n"
        "follow; the copyright notice that they speak of is the one here.\n"
    ]
    parts += [f"{p.name} ({p.license})\n    {p.copyright}" for p in packages]
    for spdx, path in texts.items():
        text = (sources / path).read_text("utf-8")
        if spdx == "PSF-2.0":
            text = text[text.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2") :]
        elif spdx != "Apache-2.0":
            text = re.sub(r"(?m)^\s*Copyright (\(c\) )?\d.*\n|^.*@.*\n", "", text)
        parts.append(f"{'=' * 100}\n{spdx}\n{'=' * 100}\n\n{text.strip()}")
    blessing = "SQLite's documentation is in the public domain; no licence is asked for."
    return "\n\n".join([*parts, f"{'=' * 100}\nblessing\n{'=' * 100}\n\n{blessing}"]) + "\n"


def main() -> None:
    """Write builtin.jsonl and LICENSES.txt, and print the table of the README."""
    parser = argparse.ArgumentParser(description="Make the built-in calibration text.")
    parser.add_argument("sources", type=Path, help="the folder of unpacked source packages")
    parser.add_argument("--out", type=Path, default=DATA / "calibration")
    args = parser.parse_args()
    held_out = HeldOut(DATA / "tiny-starchat")
    records = []
    runs: set[tuple[str, ...]] = set()
    packages, texts = read_packages()
    for package in packages:
        for wish in package.takes:
            found = take(package, wish, args.sources / package.folder, held_out, runs)
            chars = sum(map(size, found))
            print(
                f"{package.name:32} {wish.language:11} {wish.how:10} {len(found):4} {chars:6} of {wish.chars}"
            )
            records += found
    args.out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (args.out / "builtin.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (args.out / "LICENSES.txt").write_text(licenses(args.sources, packages, texts), "utf-8")
    print(f"\n| language | dialogues | text | characters |\n|---|---|---|---|\n{table(records)}")


def size(record: dict[str, str]) -> int:
    """Characters of a record's text."""
    return sum(len(record.get(field, "")) for field in ("text", "prompt", "response"))


def table(records: list[dict[str, str]]) -> str:
    """Rows of a Markdown table: language, dialogues, texts, characters."""
    rows = []
    for language in dict.fromkeys(record["language"] for record in records):
        mine = [record for record in records if record["language"] == language]
        dialogues = [size(record) for record in mine if record["kind"] == "dialogue"]
        texts = [size(record) for record in mine if record["kind"] == "text"]
        share = sum(dialogues + texts) / sum(map(size, records))
        rows.append((share, f"| {language} | {len(dialogues)} ({sum(dialogues):,}) | {len(texts)} "
                            f"({sum(texts):,}) | {sum(dialogues + texts):,} ({share:.0%}) |"))  # fmt: skip
    return "\n".join(row for _, row in sorted(rows, reverse=True))


if __name__ == "__main__":
    main()
