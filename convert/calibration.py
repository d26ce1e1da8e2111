"""Calibration text: from a source of documents to rows of token ids.

    source → documents (plain texts, dialogues) → shuffled → token ids → rows of one length

Half of the rows hold dialogues, packed one after another and begun at a dialogue's start: there the first
tokens are the system marker's, as they are when the model is used. The other half is cut from one stream of
plain texts. Where a source has one kind only, or too little of one, the rest is made of the other.
Documents in a row are parted by the tokenizer's document separator; nothing is padded.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem.errors import CalibrationError
from lowmem.models.dialogue import Dialogue, Message, encode_plain
from lowmem.models.template import apply_template
from lowmem.text.tokenizing import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = str | tuple[Message, ...]
"""A plain text, or a dialogue."""

BUILTIN = "lowmem's built-in text (source code in twelve languages, English, questions and answers)"
HUB_NAMES = {"oasst1": "OpenAssistant/oasst1", "dolly": "databricks/databricks-dolly-15k"}
HUB_LICENSES = {"oasst1": "Apache-2.0", "dolly": "CC-BY-SA-3.0"}
HUB_ROWS = 20_000  # what is read of a hub data set of any size; the rows are drawn from these
FILE_LIMIT = 1 << 28  # bytes: far more than any calibration uses, and small enough to hold
ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "bot": "assistant"}  # fmt: skip
USE_LOCAL = "Use --calibration builtin, or a local .jsonl or .txt file"


@dataclass(frozen=True)
class CalibrationSpec:
    """What text, how many rows of how many tokens, drawn how.

    source: "builtin", "oasst1", "dolly", a path to a .jsonl or plain text file, or a hub id "owner/name".
    """

    source: str = "builtin"
    rows: int = 128
    row_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.row_length < 2:
            raise CalibrationError(
                f"{self.rows} rows of {self.row_length} tokens are no calibration",
                "Use at least one row of two tokens; 128 rows of 512 are the default",
            )


@dataclass(frozen=True)
class CalibrationRows:
    """What the converter runs through the model.

    tokens: int64 [rows, row_length].
    description: one line for the model card: what text, its licence, the share of dialogue.
    digest: sha256 of the tokens (64-bit little-endian), in hexadecimal.
    """

    tokens: torch.Tensor
    description: str
    digest: str


def load_rows(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue | None, vocab_size: int
) -> CalibrationRows:
    """Rows of exactly `row_length` token ids below `vocab_size`; the same arguments give the same rows.

    Raises CalibrationError for a source that cannot be read or has too few tokens, and for a tokenizer
    that gives ids which the model does not have.
    """
    documents, label = read_documents(spec.source)
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
            f"{label} gives {tokens_there:,} tokens, and {spec.rows} rows of {spec.row_length} need "
            f"{spec.rows * spec.row_length:,}",
            f"Use --rows {made}, or a shorter --row-length" if made else "Use a shorter --row-length",
        )

    both = zip_longest(from_starts, cut)
    tokens = torch.tensor([row for pair in both for row in pair if row is not None], dtype=torch.int64)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"the tokenizer gives tokens {low} to {high}, and the model has {vocab_size}",
            "The tokenizer files do not belong to this checkpoint",
        )
    share = f"{len(from_starts)} of them dialogues {encoder.form}" if wanted else "no dialogues"
    description = f"{label}: {spec.rows} rows of {spec.row_length} tokens, {share}; seed {spec.seed}"
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    return CalibrationRows(tokens, description, digest)


# --- from documents to rows -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """How documents become token ids for one tokenizer.

    lead: what the tokenizer puts before every text (a beginning-of-text token, or nothing).
    separator: the id between two documents; None where `lead` already parts them.
    form: in what form dialogues are written, in words.
    """

    tokenizer: PreTrainedTokenizerBase
    dialogue: Dialogue | None
    lead: tuple[int, ...]
    separator: int | None
    form: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue | None) -> Encoder:
        """The encoder of a tokenizer: StarChat's template, else the tokenizer's own, else plain text."""
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
        """Token ids of one document."""
        ids = encode_plain(self.tokenizer, document) if isinstance(document, str) else self._turns(document)
        return ids if tuple(ids[: len(self.lead)]) == self.lead else [*self.lead, *ids]

    def _turns(self, messages: tuple[Message, ...]) -> list[int]:
        """Token ids of a dialogue, in the model's own form."""
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
    """A text in pieces of about `size` characters, parted at line ends; a shorter text is one piece.

    So a long file is drawn from everywhere, not from its head alone.
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
    """(`rows` rows or as many as there are, the tails that were cut off); each row begins with a document.

    Takes no more documents than the rows need.
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
    """(`rows` rows cut from the documents end to end, or as many as there are; tokens left over)."""
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


# --- from a source to documents ---------------------------------------------------------------------------


def read_documents(source: str) -> tuple[list[Document], str]:
    """(documents, what they are in words) of a source as `CalibrationSpec` names it.

    Raises CalibrationError where it cannot be read, is empty, or has fields that are not known.
    """
    if source == "builtin":
        lines = resources.files("lowmem").joinpath("data/calibration/builtin.jsonl").read_text("utf-8")
        return documents_of_lines(lines, "builtin.jsonl"), BUILTIN
    path = Path(source)
    if source in HUB_NAMES:
        rows = hub_rows(HUB_NAMES[source], None)
        documents = oasst_dialogues(rows) if source == "oasst1" else documents_of_rows(rows, source)
        label = f"{HUB_NAMES[source]} ({HUB_LICENSES[source]})"
    elif path.exists():
        text, label = read_text(path), f"the file {path.name}"
        documents = documents_of_lines(text, path.name) if path.suffix == ".jsonl" else [text]
        documents = [document for document in documents if not isinstance(document, str) or document.strip()]
    elif path.suffix in (".jsonl", ".txt"):
        raise CalibrationError(f"there is no calibration file {source}", "Check the path")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        documents = documents_of_rows(hub_rows(source, HUB_ROWS), source)
        label = f"the data set {source} (under its own licence)"
    else:
        raise CalibrationError(
            f"{source!r} is neither a file nor a data set",
            "Use builtin, oasst1, dolly, a file, or owner/name",
        )
    if not documents:
        raise CalibrationError(f"{label} holds no text", USE_LOCAL)
    return documents, label


def read_text(path: Path) -> str:
    """A UTF-8 text file; CalibrationError where it cannot be read, is too large or is something else."""
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise CalibrationError(
                f"{path} is larger than {FILE_LIMIT >> 20} MiB", "Calibrate with a part of it"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}", "Name a readable file") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CalibrationError(f"{path} is not UTF-8 text (line {line})", "Convert it to UTF-8") from error


def documents_of_lines(text: str, name: str) -> list[Document]:
    """The documents of JSON Lines, one object a line; empty lines are passed over."""

    def rows() -> Iterator[Any]:
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                yield json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise CalibrationError(
                    f"{name}, line {number} is not JSON: {error}", "A .jsonl file has one JSON object a line"
                ) from error

    return documents_of_rows(rows(), name)


def documents_of_rows(rows: Iterable[Any], name: str) -> list[Document]:
    """The documents of JSON objects or data set rows; None and rows of empty text are passed over."""
    documents = []
    for number, row in enumerate(rows, start=1):
        try:
            document = None if row is None else document_of_row(row)
        except ValueError as error:
            raise CalibrationError(
                f"{name}, line {number}: {error}",
                "Known are text; prompt with response or completion; instruction (and context or input) "
                "with response or output; messages; conversations",
            ) from error
        if document is not None:
            documents.append(document)
    return documents


def document_of_row(row: Any) -> Document | None:
    """The document of one object with known fields; None where its text is empty. ValueError otherwise."""
    if not isinstance(row, Mapping):
        raise ValueError("not a JSON object")
    for field in ("messages", "conversations"):
        if row.get(field) is not None:
            return _checked_turns(row[field])
    for question, extra, answers in (
        ("prompt", (), ("response", "completion")),
        ("instruction", ("context", "input"), ("response", "output")),
    ):
        answer = next((field for field in answers if row.get(field) is not None), None)
        if row.get(question) is not None and answer is not None:
            asked = [part for field in (question, *extra) if (part := _text(row, field)).strip()]
            turns = (Message("user", "\n\n".join(asked)), Message("assistant", _text(row, answer)))
            return turns if all(turn.content.strip() for turn in turns) else None
    if row.get("text") is not None:
        return _text(row, "text") if _text(row, "text").strip() else None
    raise ValueError(f"no known field among {', '.join(map(str, list(row)[:8])) or 'none'}")


def _text(row: Mapping[str, Any], field: str) -> str:
    """A field's text, empty where it is missing. ValueError for what is no text, or has lone surrogates."""
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{field} is not text")
    (value or "").encode("utf-8")  # raises UnicodeEncodeError, a ValueError
    return value or ""


def _checked_turns(value: Any) -> tuple[Message, ...] | None:
    """Messages of a list of {role, content} or {from, value}."""
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError("a conversation is not a list of messages")
    messages = []
    for position, turn in enumerate(value):
        keys = ("role", "content") if "role" in turn else ("from", "value")
        role = ROLES.get(_text(turn, keys[0]))
        if role is None or (role == "system" and position):
            raise ValueError(f"message {position + 1} has the role {turn.get(keys[0])!r}")
        messages.append(Message(role, _text(turn, keys[1])))
    return tuple(messages) if any(message.content.strip() for message in messages) else None


def oasst_dialogues(rows: Iterable[Mapping[str, Any]]) -> list[Document]:
    """The best English conversation of each message tree of OpenAssistant's data.

    A row is one message: `message_id`, `parent_id` (None at a tree's root), `text`, `role` ("prompter" or
    "assistant"), `lang`, `rank` (0 is the best among siblings; None where nobody ranked), `deleted`,
    `tree_state`. From each root the best-ranked reply is followed, down to the last answer of the assistant.
    """
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in rows:
        ready = row.get("tree_state", "ready_for_export") == "ready_for_export"
        if row["lang"] == "en" and not row.get("deleted") and ready:
            children.setdefault(row["parent_id"], []).append(row)
    dialogues: list[Document] = []
    for root in children.pop(None, []):
        turns: list[Message] = []
        node: Mapping[str, Any] | None = root
        while node is not None and ROLES.get(node["role"]) == ("assistant" if len(turns) % 2 else "user"):
            turns.append(Message(ROLES[node["role"]], node["text"]))
            # A reply is taken once (pop), so that rows whose parents form a circle end too.
            replies = children.pop(node["message_id"], [])
            node = min(replies, key=_rank, default=None)
        turns = turns[: len(turns) - len(turns) % 2]  # a question that nobody answered
        if turns:
            dialogues.append(tuple(turns))
    return dialogues


def _rank(row: Mapping[str, Any]) -> tuple[bool, int, str]:
    """Ranked replies first, the best of them first; the id decides between equals."""
    return row.get("rank") is None, row.get("rank") or 0, row["message_id"]


def hub_rows(name: str, limit: int | None) -> list[Mapping[str, Any]]:
    """The first rows of the training split of a data set on the hub, read as data only.

    Raises CalibrationError without a network, or where there is no such data set.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise CalibrationError("the package datasets is not installed", USE_LOCAL) from error
    try:
        return list(islice(load_dataset(name, split="train", streaming=True), limit))
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CalibrationError(f"the data set {name} cannot be read ({reason})", USE_LOCAL) from error
