"""Make `lowmem/data/calibration/` from the source packages named in its `sources.json`.

    python -m lowmem.benchmarks.experiments.data.calibration SOURCES

SOURCES holds one unpacked folder per package, named as in `sources.json`: Debian binary packages
(`apt-get download NAME`, then `dpkg-deb -x`), the original tarballs of Debian source packages (`apt-get
source --download-only NAME`), npm packages (`npm pack NAME@VERSION`), wheels and sdists (`pip download
--no-deps NAME==VERSION`), and CPython's standard library as `cpython-3.11.7/Lib`. The same folders give
the same bytes: every draw is made by a generator seeded with the package's name.

Excerpts that share text with tiny-starchat's held-out evaluation text (`HeldOut`), that name an author, a
licence or an e-mail address, and tables of numbers are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from lowmem.benchmarks.experiments.data.excerpts import MAKERS

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
    """A source package: its folder under SOURCES, its licence, and what is taken."""

    name: str
    folder: str
    license: str  # SPDX
    copyright: str
    takes: tuple[Take, ...]


def read_packages() -> tuple[list[Package], dict[str, str]]:
    """The packages of sources.json, and the file with the text of each licence."""
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


UNWANTED = re.compile(
    r"[\w.+-]+@[\w-]+\.\w|copyright|licen[sc]e|SPDX|\bauthors?\b\s*[:=(]|written by|<\|\w+\|>|<fim_", re.I
)


class HeldOut:
    """The evaluation text that calibration excerpts must not share.

    Shared are five successive lines (stripped, without lines under 20 characters), or a sentence of 60
    characters or more.
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


def wanted(text: str, language: str, held_out: HeldOut) -> bool:
    """Whether an excerpt may be taken: plain text, no table of numbers, not evaluation text."""
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
    """The records of one `Take`, drawn file by file in a seeded order until it has enough characters.

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
    """The notices that the licences require: authors, licences and the licences' texts."""
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
