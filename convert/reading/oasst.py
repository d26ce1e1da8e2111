"""Dialogues of OpenAssistant's message trees, one message a row or one tree a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lowmem.convert.reading.layouts import ROLES, Document

from lowmem.models.dialogue import Message

COLUMNS = ("message_id", "parent_id", "role", "lang", "rank", "deleted", "tree_state", "message_tree_id")


def is_message_row(row: Any) -> bool:
    """Whether a row is one message of a tree. Other types than the data set's are refused as bad rows."""
    return (
        isinstance(row, Mapping)
        and isinstance(row.get("message_id"), str)
        and "parent_id" in row
        and isinstance(row["parent_id"], str | None)
        and isinstance(row.get("text"), str)
        and isinstance(row.get("role"), str)
        and isinstance(row.get("rank"), int | float | None)
    )


def is_tree(row: Any) -> bool:
    """Whether a row is a whole tree: its root message in `prompt`, answers in `replies`."""
    return isinstance(row, Mapping) and isinstance(row.get("prompt"), Mapping) and "replies" in row["prompt"]


def messages_of_tree(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The messages of a tree as rows. Raises ValueError for a tree that is not one."""
    waiting: list[tuple[Any, str | None]] = [(row["prompt"], None)]
    while waiting:
        node, parent = waiting.pop()
        message = {**node, "parent_id": parent} if isinstance(node, Mapping) else node
        if not is_message_row(message):
            raise ValueError("a tree of messages with something else in it")
        message.setdefault("tree_state", row.get("tree_state", "ready_for_export"))
        replies = message.pop("replies", None) or []
        if not isinstance(replies, list):
            raise ValueError("a tree whose replies are not a list")
        waiting += [(reply, message["message_id"]) for reply in reversed(replies)]
        yield message


def oasst_dialogues(rows: Iterable[Mapping[str, Any]], language: str | None = "en") -> list[Document]:
    """The best conversation of each message tree of OpenAssistant's data.

    A row is one message: `message_id`, `parent_id` (None at a tree's root), `text`, `role` ("prompter" or
    "assistant"), `lang`, `rank` (0 is the best among siblings; None is unranked), `deleted`, `tree_state`.
    language: messages in others are left out; None is all of them. A conversation follows the best-ranked
    replies from the root to the last answer of the assistant.
    """
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in rows:
        ready = (row.get("tree_state") or "ready_for_export") == "ready_for_export"
        if (language is None or row["lang"] == language) and not row.get("deleted") and ready:
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


def _rank(row: Mapping[str, Any]) -> tuple[bool, float, str]:
    """Sort key: the best rank first, unranked replies last; the id breaks ties."""
    return row.get("rank") is None, row.get("rank") or 0, row["message_id"]
