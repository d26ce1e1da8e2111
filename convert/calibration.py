"""Calibration rows: documents become token ids, and token ids rows of one length.

    source → documents (documents.py) → shuffled → token ids → rows

Half of the rows hold dialogues, packed one after another. Each such row begins at the start of a dialogue, so
that its first tokens are those of a prompt. The other half is cut from one stream of plain texts. Where a
source lacks one kind, the other fills its rows. The tokenizer's document separator stands between documents;
nothing is padded.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import torch
from lowmem.convert.documents import read_documents
from lowmem.convert.reading.layouts import Document

from lowmem.config import EFFORTS
from lowmem.errors import CalibrationError
from lowmem.models.dialogue import Dialogue, Message, encode_plain
from lowmem.models.template import apply_template
from lowmem.text.tokenizing import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CalibrationSpec:
    """The calibration text, and how many rows are drawn from it."""

    source: str = "builtin"
    """"builtin", "oasst1", "dolly", a path to a file or a folder (docs/convert.md lists the kinds), or a hub
    id "owner/name"."""
    rows: int = EFFORTS["default"].rows
    row_length: int = 512
    """Tokens in a row."""
    seed: int = 0
    """Of the random choice of documents."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.row_length < 2:
            raise CalibrationError(
                f"{self.rows} rows of {self.row_length} tokens are too few to calibrate with",
                "Use at least one row of two tokens; the default is 128 rows of 512",
            )


@dataclass(frozen=True)
class CalibrationRows:
    """The token rows that the converter runs through the model."""

    tokens: torch.Tensor
    """int64 [rows, row_length]."""
    description: str
    """One line for the model card: the text, its licence, the share of dialogue."""
    digest: str
    """sha256 of the tokens (64-bit little-endian), in hexadecimal."""
    notes: tuple[str, ...] = ()
    """Remarks for the user: which fields were taken, which rows were skipped."""


def load_rows(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue | None, vocab_size: int
) -> CalibrationRows:
    """Load rows of exactly `row_length` token ids below `vocab_size`; the same arguments give the same rows.

    Raises CalibrationError for a source that cannot be read or has too few tokens, and for a tokenizer whose
    ids exceed the vocabulary.
    """
    found = read_documents(spec.source)
    documents, label = found.documents, found.label
    draw = random.Random(spec.seed)
    dialogues: list[Document] = [document for document in documents if not isinstance(document, str)]
    texts: list[Document] = [
        piece
        for document in documents
        if isinstance(document, str)
        for piece in stretches(document, 8 * spec.row_length)
    ]
    draw.shuffle(dialogues)
    draw.shuffle(texts)

    encoder = Encoder.of(tokenizer, dialogue)
    wanted = 0 if not dialogues else spec.rows if not texts else (spec.rows + 1) // 2
    unread = map(encoder.encode, dialogues)
    from_starts, tails = pack_from_starts(unread, encoder.separator, spec.row_length, wanted)
    stream = chain(map(encoder.encode, texts), unread, tails)
    cut, left = cut_stream(stream, encoder.separator, spec.row_length, spec.rows - len(from_starts))
    made = len(from_starts) + len(cut)
    if made < spec.rows:
        tokens_there = made * spec.row_length + left
        raise CalibrationError(
            f"{label} has {tokens_there:,} tokens, and {spec.rows} rows of {spec.row_length} need "
            f"{spec.rows * spec.row_length:,}",
            f"Use --rows {made}, or a shorter --row-length" if made else "Use a shorter --row-length",
        )

    both = zip_longest(from_starts, cut)
    tokens = torch.tensor([row for pair in both for row in pair if row is not None], dtype=torch.int64)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"the tokenizer gives token ids {low} to {high}, and the model has {vocab_size} tokens",
            "The tokenizer files do not belong to this checkpoint",
        )
    share = f"{len(from_starts)} of them dialogues {encoder.form}" if wanted else "no dialogues"
    description = f"{label}: {spec.rows} rows of {spec.row_length} tokens, {share}; seed {spec.seed}"
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    return CalibrationRows(tokens, description, digest, found.notes)


@dataclass(frozen=True)
class Encoder:
    """Encodes documents with one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    dialogue: Dialogue | None
    lead: tuple[int, ...]
    """What the tokenizer puts before every text: a beginning-of-text token, or nothing."""
    separator: int | None
    """The id between two documents; None where `lead` separates them."""
    form: str
    """How dialogues are written, in words."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue | None) -> Encoder:
        """Create the encoder of a tokenizer. Dialogues use StarChat's template, its own, or plain text."""
        before = encode(tokenizer, "")[:1]
        lead = tuple(before) if before == [tokenizer.bos_token_id] else ()
        end_of_text = tokenizer.get_vocab().get("<|endoftext|>")  # also where eos is a turn's end
        choices = (end_of_text, tokenizer.eos_token_id, tokenizer.bos_token_id)
        separator = None if lead else next((token for token in choices if token is not None), None)
        own = getattr(tokenizer, "chat_template", None)
        form = "in the model's own template" if own else "as plain text"
        form = "in StarChat's template" if dialogue else form
        return cls(tokenizer, dialogue, lead, separator, form)

    def encode(self, document: Document) -> list[int]:
        """Encode one document to token ids."""
        ids = encode_plain(self.tokenizer, document) if isinstance(document, str) else self._turns(document)
        return ids if tuple(ids[: len(self.lead)]) == self.lead else [*self.lead, *ids]

    def _turns(self, messages: tuple[Message, ...]) -> list[int]:
        """Token ids of a dialogue, in the model's own template."""
        if self.dialogue is not None:
            return self.dialogue.encode(self.tokenizer, messages, add_generation_prompt=False)
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{"role": message.role, "content": message.content} for message in messages]
            try:
                return apply_template(self.tokenizer, turns)
            except Exception:  # some templates refuse a system message, or turns that do not alternate
                pass
        return encode_plain(self.tokenizer, "\n\n".join(message.content for message in messages))


def stretches(text: str, size: int) -> list[str]:
    """Split a text at line ends into pieces of about `size` characters; a shorter text is one piece.

    Rows are then drawn from all parts of a long file, not only from its beginning.
    """
    pieces, start = [], 0
    while len(text) - start > 2 * size:
        end = text.find("\n", start + size, start + 2 * size) + 1 or start + 2 * size
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def pack_from_starts(
    documents: Iterator[list[int]], separator: int | None, length: int, rows: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Pack at most `rows` rows that each begin with a document; also returns the tails that were cut off.

    Consumes no more documents than the rows need.
    """
    made: list[list[int]] = []
    tails: list[list[int]] = []
    row: list[int] = []
    while len(made) < rows:
        ids = next(documents, None)
        if ids is None:
            break
        row += [separator, *ids] if row and separator is not None else ids
        if len(row) >= length:
            made.append(row[:length])
            tails.append(row[length:])
            row = []
    return made, [tail for tail in [*tails, row] if tail]


def cut_stream(
    documents: Iterable[list[int]], separator: int | None, length: int, rows: int
) -> tuple[list[list[int]], int]:
    """Cut at most `rows` rows from the concatenated documents; also returns the number of tokens left
    over.
    """
    made: list[list[int]] = []
    stream: list[int] = []
    for ids in documents if rows else ():
        stream += ids if separator is None else [*ids, separator]
        while len(stream) >= length and len(made) < rows:
            made.append(stream[:length])
            stream = stream[length:]
        if len(made) == rows:
            break
    return made, len(stream)
