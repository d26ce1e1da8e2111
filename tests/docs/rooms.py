"""Writes the list of files in ARCHITECTURE.md from the first sentences of the files.

python -m tests.docs.rooms
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- files: begin -->", "<!-- files: end -->"
FOLDERS = ("lowmem", "convert", "benchmarks")
_SUFFIXES = (".py", ".c", ".h", ".js")


def rooms() -> str:
    """The section: a table of files and what they do, a table per folder."""
    tables = []
    for top in FOLDERS:
        folders = sorted({path.parent for path in (ROOT / top).rglob("*") if path.suffix in _SUFFIXES})
        tables += [table for folder in folders if (table := _table(folder))]
    return "\n\n".join(tables)


def document() -> str:
    """ARCHITECTURE.md with the section renewed."""
    text = FILE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{rooms()}\n\n{END}{rest.split(END)[1]}"


def _table(folder: Path) -> str:
    rows = []
    for path in sorted(folder.iterdir()):
        if path.suffix in _SUFFIXES and (path.name != "__init__.py" or folder.name in FOLDERS):
            rows.append(f"| `{path.name}` | {_summary(path)} |")
    if not rows:
        return ""
    name = folder.relative_to(ROOT)
    return "\n".join([f"**{name}/**", "", "| file | |", "|---|---|", *rows])


def _summary(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        found = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = re.search(r"/\*+(.*?)\*/|//([^\n]*)", text, re.DOTALL)
        found = re.sub(r"^\s*\* ?", "", comment[1] or comment[2], flags=re.MULTILINE) if comment else ""
    paragraph = " ".join(found.strip().split("\n\n")[0].split())
    sentence = re.match(r"(.*?[.:])(?: [A-Z`]|$)", paragraph)
    return (sentence[1] if sentence else paragraph).rstrip(".:").replace("|", "\\|")


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
    print(f"wrote {FILE}")
