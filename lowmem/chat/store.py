"""Saved conversations: JSON files, written completely or not at all.

{"format": "lowmem-chat", "version": 1, "model": "…", "system": null | "…",
 "settings": {"temperature": 0.2, …},
 "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…", "stopped": true}, …]}
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from lowmem.chat.conversation import ChatState, Conversation, Exchange
from lowmem.chat.settings import settings_from, settings_record
from lowmem.checkpoint.files.home import typed_path, user_folder
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, LowmemError, OutputError
from lowmem.platform import system

FORMAT, VERSION = "lowmem-chat", 1
LARGEST = 16 << 20  # bytes; no context holds as much text


class ConversationError(LowmemError):
    """A file of a conversation cannot be read or written."""


def save(name: str, state: ChatState) -> Path:
    """Write the conversation to a file that only its owner can read. Returns the path.

    Overwrites a saved conversation, and no other file. Raises ConversationError.
    """
    path = _path(name)
    if _exists(path):
        try:
            _read(path)
        except ConversationError as error:
            raise ConversationError(
                f"{path} exists and is not a conversation saved by lowmem", "Name another file"
            ) from error
    messages: list[dict[str, Any]] = []
    for exchange in state.conversation.exchanges:
        answer: dict[str, Any] = {"role": "assistant", "content": exchange.answer}
        if exchange.stopped:
            answer["stopped"] = True
        messages += [{"role": "user", "content": exchange.question}, answer]
    record = {
        "format": FORMAT,
        "version": VERSION,
        "model": state.model,
        "system": state.conversation.system,
        "settings": settings_record(state.params),
        "messages": messages,
    }
    data = (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "replace")
    if len(data) > LARGEST:
        raise ConversationError(
            f"the conversation is larger than {LARGEST >> 20} MiB, the largest that can be loaded again"
        )
    try:
        _write(path, data)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ConversationError(
            f"cannot write {path}: {reason}", "Name a file in a writable folder"
        ) from error
    return path


def load(name: str, params: SamplingParams) -> ChatState:
    """Read a saved conversation. `params` supplies the settings that the file lacks.

    Raises ConversationError for a wrong path, and for any file that `save` would not write.
    """
    path = _path(name)
    record = _read(path)
    text = record.get("system")
    if text is not None and not _is_text(text):
        raise ConversationError(f"{path}: the system text is not a string")
    settings = record.get("settings", {})
    try:
        if not isinstance(settings, dict):
            raise InvalidRequestError("its settings are not an object")
        params = settings_from(settings, params)
    except InvalidRequestError as error:
        raise ConversationError(f"{path}: {error}", "Correct or remove it in the file") from error
    return ChatState(Conversation(text, _exchanges(record.get("messages"), path)), params)


def _path(name: str) -> Path:
    """A typed name as a path: expands ~, and resolves links, so that saving keeps them."""
    try:
        return typed_path(name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConversationError(f"{name!r} is not a path: {error}", "Name a file") from error


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # not a valid name: writing reports it
        return False


def _read(path: Path) -> dict[str, Any]:
    """The JSON object of a saved conversation."""
    try:
        # Opening a pipe must not block: check the type before reading.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode):
                what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
                raise ConversationError(f"{path} is {what}", "Name a file that /save wrote")
            with open(handle, "rb", closefd=False) as file:
                data = file.read(LARGEST + 1)
        finally:
            os.close(handle)
    except FileNotFoundError as error:
        raise ConversationError(f"{path} does not exist", "Name a file that /save wrote") from error
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ConversationError(f"cannot read {path}: {reason}", "Name a file that /save wrote") from error
    if len(data) > LARGEST:
        raise ConversationError(
            f"{path} is larger than {LARGEST >> 20} MiB, the limit of a saved conversation"
        )
    try:
        record = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{path} is not JSON", "Name a file that /save wrote") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConversationError(
            f"{path} is JSON, but not a conversation saved by lowmem", "Name a file that /save wrote"
        )
    if type(record.get("version")) is not int or not 1 <= record["version"] <= VERSION:
        raise ConversationError(
            f"{path} was saved by a newer or unknown version of lowmem", "Update lowmem to read it"
        )
    return record


def _exchanges(messages: object, path: Path) -> tuple[Exchange, ...]:
    """The exchanges. Raises ConversationError with the number of a wrong message."""
    if not isinstance(messages, list) or len(messages) % 2:
        raise ConversationError(f"{path}: the messages are not a list of questions and answers")
    found: list[str] = []
    stopped: list[bool] = []
    for position, message in enumerate(messages):
        role = "assistant" if position % 2 else "user"
        good = isinstance(message, dict) and message.get("role") == role and _is_text(message.get("content"))
        if not good:
            raise ConversationError(
                f"{path}: message {position + 1} is not one of role {role!r} with a string"
            )
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
        system.replace_file(Path(temporary), path)
    except BaseException:
        os.unlink(temporary)
        raise


def state_folder() -> Path:
    """The folder of history and rescued conversations: $XDG_STATE_HOME or ~/.local/state, lowmem.

    Raises OutputError for a user without a home folder.
    """
    folder = user_folder("XDG_STATE_HOME", ".local/state")
    if folder is None:
        raise OutputError("there is no home folder", "Set XDG_STATE_HOME to a folder")
    return folder
