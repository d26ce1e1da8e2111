"""Make `lowmem/data/prose/`, the English text of `lowmem bench quality`, from the packages in `sources.json`.

    python -m lowmem.benchmarks.experiments.data.prose SOURCES

SOURCES holds one unpacked Debian package per folder, named as in `sources.json` (`apt-get download NAME`,
then `dpkg-deb -x`). The same folders give the same bytes. Headings, paragraphs and lists are taken, code
blocks and tables are not. Pages of the works alternate. A paragraph that shares thirteen successive words,
or fifty characters, with the built-in calibration text is left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from lowmem.benchmarks.experiments.data.excerpts import html_text

DATA = Path(__file__).resolve().parents[3] / "lowmem" / "data"
WORDS, CHARACTERS = 13, 50
LEAST = 600
"""The fewest characters of a page."""


@dataclass(frozen=True)
class Work:
    """A work in a package: its folder under SOURCES, its pages, and the marks around a page's text."""

    name: str
    folder: str
    license: str  # SPDX
    copyright: str
    chars: int
    begins: str
    ends: str
    globs: tuple[str, ...]


def read_works() -> list[Work]:
    """The works of sources.json."""
    table = json.loads((DATA / "prose" / "sources.json").read_text("utf-8"))
    return [Work(**{**entry, "globs": tuple(entry["globs"])}) for entry in table["works"]]


def shingles(text: str) -> tuple[set[str], set[str]]:
    """(every run of thirteen words, every run of fifty characters with spaces joined) of a text."""
    words = text.split()
    joined = " ".join(words)
    return (
        {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)},
        {joined[i : i + CHARACTERS] for i in range(len(joined) - CHARACTERS + 1)},
    )


def calibration_texts() -> Iterator[str]:
    """Every text, question and answer of the built-in calibration text."""
    with (DATA / "calibration" / "builtin.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield from (record[field] for field in ("text", "prompt", "response") if field in record)


def paragraphs(page: str, work: Work) -> list[str]:
    """The headings, paragraphs and lists of an HTML page, each on one line."""
    body = page.partition(work.begins)[2].partition(work.ends)[0]
    body = re.sub(r"(?s)<(pre|table|footer|nav|aside)\b.*?</\1>", "", body)
    body = re.sub(r"</dt>|</dd>|</div>|</li>", "\n\n", body)
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", html_text(body)))
    return [part for part in found if part and not re.fullmatch(r"[\W\d]*|Table of Contents.*", part)]


def pages(work: Work, sources: Path, taken: tuple[set[str], set[str]]) -> Iterator[str]:
    """The work's pages in order, at most `chars` characters in all."""
    root, total = sources / work.folder, 0
    for path in sorted(path for pattern in work.globs for path in root.glob(pattern)):
        kept = []
        for paragraph in paragraphs(path.read_text("utf-8"), work):
            words, runs = shingles(paragraph)
            if not (words & taken[0] or runs & taken[1]):
                kept.append(paragraph)
        page = "\n\n".join(kept)
        if len(page) >= LEAST and total + len(page) <= work.chars:
            total += len(page)
            yield page


def notices(sources: Path, works: list[Work]) -> str:
    """Whose works these are, and the text of each licence."""
    table = json.loads((DATA / "prose" / "sources.json").read_text("utf-8"))
    parts = ["prose.txt holds excerpts of the works below, each under its own licence."]
    parts += [f"{work.name} ({work.license})\n    {work.copyright}" for work in works]
    for spdx, (path, heading) in table["license_texts"].items():
        lines = (sources / path).read_text("utf-8").splitlines()
        starts = [i for i, line in enumerate(lines) if line == heading]
        body = []
        for line in lines[starts[-1] + 1 :]:
            if line and not line.startswith(" "):
                break
            body.append("" if line.strip() == "." else line[1:])
        parts.append(f"{'=' * 100}\n{spdx}\n{'=' * 100}\n\n" + "\n".join(body).strip())
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write prose.txt and LICENSES.txt."""
    parser = argparse.ArgumentParser(description="Make the prose that quality is measured on.")
    parser.add_argument("sources", type=Path, help="the folder of unpacked packages")
    parser.add_argument("--out", type=Path, default=DATA / "prose")
    args = parser.parse_args()
    works = read_works()
    calibration = [shingles(text) for text in calibration_texts()]
    taken = (set().union(*(w for w, _ in calibration)), set().union(*(c for _, c in calibration)))
    both = zip_longest(*(pages(work, args.sources, taken) for work in works))
    text = "\n\n".join(page for pair in both for page in pair if page) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "prose.txt").write_text(text, "utf-8")
    (args.out / "LICENSES.txt").write_text(notices(args.sources, works), "utf-8")
    print(f"{len(text):,} characters")


if __name__ == "__main__":
    main()
