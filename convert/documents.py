"""Calibration documents: plain texts and dialogues from the built-in text, files and hub data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from lowmem.errors import CalibrationError
from lowmem.models.dialogue import Message

Document = str | tuple[Message, ...]
"""A plain text, or the messages of a dialogue."""

BUILTIN = "lowmem's built-in text (source code in twelve languages, English, questions and answers)"
HUB_NAMES = {"oasst1": "OpenAssistant/oasst1", "dolly": "databricks/databricks-dolly-15k"}
HUB_LICENSES = {"oasst1": "Apache-2.0", "dolly": "CC-BY-SA-3.0"}
HUB_ROWS = 20_000  # rows that are read from a hub data set of any size
FILE_LIMIT = 1 << 28  # bytes: far more than calibration needs, and small enough for memory
ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "bot": "assistant"}  # fmt: skip
USE_LOCAL = "Use --calibration builtin, or a local .jsonl or .txt file"


def read_documents(source: str) -> tuple[list[Document], str]:
    """Read the documents of a source (see `CalibrationSpec.source`); also returns their description.

    Raises CalibrationError for a source that cannot be read, is empty, or has unknown fields.
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
        raise CalibrationError(f"the calibration file {source} does not exist", "Check the path")
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
    """Read a UTF-8 text file. Raises CalibrationError if it cannot be read, is too large or is not UTF-8."""
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise CalibrationError(
                f"{path} is larger than {FILE_LIMIT >> 20} MiB", "Calibrate with a part of it"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}", "Check its permissions") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CalibrationError(f"{path} is not UTF-8 text (line {line})", "Convert it to UTF-8") from error


def documents_of_lines(text: str, name: str) -> list[Document]:
    """Parse the documents of a JSON Lines text; empty lines are skipped."""

    def rows() -> Iterator[Any]:
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                yield json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise CalibrationError(
                    f"{name}, line {number} is not JSON: {error}",
                    "A .jsonl file has one JSON object per line",
                ) from error

    return documents_of_rows(rows(), name)


def documents_of_rows(rows: Iterable[Any], name: str) -> list[Document]:
    """Yield the documents of JSON objects or data set rows; None and empty texts are skipped."""
    documents = []
    for number, row in enumerate(rows, start=1):
        try:
            document = None if row is None else document_of_row(row)
        except ValueError as error:
            raise CalibrationError(
                f"{name}, line {number}: {error}",
                "Known fields are text; prompt with response or completion; instruction (and context or "
                "input) with response or output; messages; conversations",
            ) from error
        if document is not None:
            documents.append(document)
    return documents


def document_of_row(row: Any) -> Document | None:
    """Convert one JSON object to a document; None if its text is empty. Raises ValueError for unknown
    fields.
    """
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
    """A field's text, empty if it is missing. Raises ValueError for other types and lone surrogates."""
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{field} is not text")
    (value or "").encode("utf-8")  # raises UnicodeEncodeError, a ValueError
    return value or ""


def _checked_turns(value: Any) -> tuple[Message, ...] | None:
    """The messages of a list of {role, content} or {from, value}, or None if all are empty."""
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
    """Yield the best English conversation of each message tree of OpenAssistant's data.

    A row is one message: `message_id`, `parent_id` (None at a tree's root), `text`, `role` ("prompter" or
    "assistant"), `lang`, `rank` (0 is the best among siblings; None is unranked), `deleted`, `tree_state`.
    A conversation follows the best-ranked replies from the root to the last answer of the assistant.
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
            # A reply is used once (pop), so that parents that form a cycle end as well.
            replies = children.pop(node["message_id"], [])
            node = min(replies, key=_rank, default=None)
        turns = turns[: len(turns) - len(turns) % 2]  # an unanswered question
        if turns:
            dialogues.append(tuple(turns))
    return dialogues


def _rank(row: Mapping[str, Any]) -> tuple[bool, int, str]:
    """Sort key: the best rank first, unranked replies last; the id breaks ties."""
    return row.get("rank") is None, row.get("rank") or 0, row["message_id"]


def hub_rows(name: str, limit: int | None) -> list[Mapping[str, Any]]:
    """Read the first rows of a hub data set's training split, read as data only.

    Raises CalibrationError if there is no network connection or the data set does not exist.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise CalibrationError(
            "the package datasets is not installed",
            f"Install it with: pip install 'lowmem[datasets]'. {USE_LOCAL}",
        ) from error
    try:
        return list(islice(load_dataset(name, split="train", streaming=True), limit))
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CalibrationError(f"the data set {name} cannot be read ({reason})", USE_LOCAL) from error
