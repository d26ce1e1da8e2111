"""Conversations in files: JSON that says what it is, written whole or not at all.

{"format": "lowmem-chat", "version": 1, "model": "…", "system": null | "…",
 "settings": {"temperature": 0.2, …},
 "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…", "stopped": true}, …]}
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.chat.conversation import Conversation, Exchange
from lowmem.chat.settings import settings_from, settings_record
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, LowmemError

FORMAT, VERSION = "lowmem-chat", 1
LARGEST = 16 << 20  # bytes; no context holds as much text


class ConversationError(LowmemError):
    """A file of a conversation cannot be read or written."""


@dataclass(frozen=True)
class Saved:
    """What a file holds."""

    conversation: Conversation
    params: SamplingParams


def save(name: str, conversation: Conversation, params: SamplingParams, model: str = "") -> Path:
    """Write the conversation to a file, readable by its owner alone; the file's path.

    Another conversation is replaced, anything else is left alone. Raises ConversationError.
    """
    path = _path(name)
    if _exists(path):
        try:
            _read(path)
        except ConversationError as error:
            raise ConversationError(
                f"{path} is there, and is no conversation of lowmem's", "Name another file"
            ) from error
    messages: list[dict[str, Any]] = []
    for exchange in conversation.exchanges:
        answer: dict[str, Any] = {"role": "assistant", "content": exchange.answer}
        if exchange.stopped:
            answer["stopped"] = True
        messages += [{"role": "user", "content": exchange.question}, answer]
    record = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "system": conversation.system,
        "settings": settings_record(params),
        "messages": messages,
    }
    data = (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "replace")
    if len(data) > LARGEST:
        raise ConversationError(
            f"the conversation is larger than {LARGEST >> 20} MiB, and could not be loaded again"
        )
    try:
        _write(path, data)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ConversationError(
            f"cannot write {path}: {reason}", "Name a file in a folder that you can write to"
        ) from error
    return path


def load(name: str, params: SamplingParams) -> Saved:
    """Read a conversation; settings that the file does not have are those of `params`.

    Raises ConversationError for a path that is wrong, and for anything that `save` would not write.
    """
    path = _path(name)
    record = _read(path)
    system = record.get("system")
    if system is not None and not _is_text(system):
        raise ConversationError(f"{path}: its system text is no text")
    settings = record.get("settings", {})
    try:
        if not isinstance(settings, dict):
            raise InvalidRequestError("its settings are no object")
        params = settings_from(settings, params)
    except InvalidRequestError as error:
        raise ConversationError(f"{path}: {error}", "Mend or remove it in the file") from error
    return Saved(Conversation(system, _exchanges(record.get("messages"), path)), params)


def _path(name: str) -> Path:
    """A typed name as a path: ~ is the home, and a link is followed, so that it stays a link."""
    try:
        return Path(name).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConversationError(f"{name!r} is no path: {error}", "Name a file") from error


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # a name that no file can have: writing will say so
        return False


def _read(path: Path) -> dict[str, Any]:
    """The object in a file that says it is a conversation of ours."""
    try:
        # A pipe that nobody writes to must not block: what it is is asked before anything is read.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode):
                what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
                raise ConversationError(f"{path} is {what}", "Name a file that /save wrote")
            with open(handle, "rb", closefd=False) as file:
                data = file.read(LARGEST + 1)
        finally:
            os.close(handle)
    except FileNotFoundError as error:
        raise ConversationError(f"there is no {path}", "Name a file that /save wrote") from error
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ConversationError(f"cannot read {path}: {reason}", "Name a file that /save wrote") from error
    if len(data) > LARGEST:
        raise ConversationError(f"{path} is larger than {LARGEST >> 20} MiB, which no conversation is")
    try:
        record = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{path} is not JSON", "Name a file that /save wrote") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConversationError(
            f"{path} is JSON, but no conversation of lowmem's", "Name a file that /save wrote"
        )
    if type(record.get("version")) is not int or not 1 <= record["version"] <= VERSION:
        raise ConversationError(
            f"{path} was written by another version of lowmem", "Update lowmem to read it"
        )
    return record


def _exchanges(messages: object, path: Path) -> tuple[Exchange, ...]:
    """Pairs of a user's and an assistant's message; anything else is refused by its number."""
    if not isinstance(messages, list) or len(messages) % 2:
        raise ConversationError(f"{path}: its messages are no list of questions and answers")
    found: list[str] = []
    stopped: list[bool] = []
    for position, message in enumerate(messages):
        role = "assistant" if position % 2 else "user"
        good = isinstance(message, dict) and message.get("role") == role and _is_text(message.get("content"))
        if not good:
            raise ConversationError(f"{path}: message {position + 1} is not one of role {role!r} with a text")
        found.append(message["content"])
        stopped.append(message.get("stopped") is True)
    return tuple(
        Exchange(question, answer, end)
        for question, answer, end in zip(found[::2], found[1::2], stopped[1::2], strict=True)
    )


def _is_text(value: object) -> bool:
    """Whether it is a string that has an encoding: JSON can hold half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _write(path: Path, data: bytes) -> None:
    """Beside the file first, flushed, then in its place: a reader never sees half of it."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def state_folder() -> Path:
    """Where what a user would miss is kept: $XDG_STATE_HOME/lowmem, or ~/.local/state/lowmem."""
    named = os.environ.get("XDG_STATE_HOME", "")
    # The base directory specification: a path that is not absolute is to be ignored.
    base = Path(named) if os.path.isabs(named) else Path.home() / ".local" / "state"
    return base / "lowmem"
