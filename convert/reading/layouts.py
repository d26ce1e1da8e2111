"""The layouts of a row: which of its fields make a dialogue or a text.

docs/convert.md has a table of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowmem.models.dialogue import Message
from lowmem.models.turns import Call, Turn, plain

Document = str | tuple[Message, ...]
"""A plain text, or the messages of a dialogue."""

DIALOGUES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
"""Fields with a list of messages."""
ANSWERS = ("response", "completion", "output", "answer", "chosen")
PAIRS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("prompt", (), ANSWERS),
    ("instruction", ("context", "input"), ANSWERS),
    ("question", ("context",), ANSWERS),
    ("query", (), ANSWERS),
    ("problem", (), ("solution", *ANSWERS)),
    ("input", (), ANSWERS),
    ("inputs", (), ("targets",)),
    ("user", (), ("assistant",)),
)
"""Fields of one question and one answer: (question, what is added to it, answers)."""
SYSTEMS = ("system", "system_prompt", "system_message")
"""Fields with the system message of the row's dialogue."""
HISTORY = "history"
"""A field with earlier pairs of question and answer."""
TEXTS = ("text", "content", "code", "raw_content", "document", "article")
"""Fields with a plain text."""
FIELDS = frozenset(
    [*DIALOGUES, *SYSTEMS, HISTORY, *TEXTS]
    + [field for question, extra, answers in PAIRS for field in (question, *extra, *answers)]
)
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "bot", "model", "ai", "chatgpt", "bing", "bard", "function_call"), "assistant"
    ),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
}
"""A role as files spell it → the role."""
KNOWN = (
    "Known fields are text, content or code; prompt, instruction or question with response, completion, "
    "output or answer; messages; conversations; docs/convert.md lists all"
)
_SPEAKERS = ("role", "from", "speaker")
_SAYINGS = ("content", "value", "text")


def document_of_row(row: Any) -> tuple[Document | None, str]:
    """The document of a row, None if its text is empty, and the field that it comes from.

    row: an object, a text, or a list of messages. Raises ValueError for unknown fields and other types.
    """
    if isinstance(row, str):
        return _nonempty(_unicode(row)), "a list of texts"
    if is_dialogue(row):
        return _dialogue(row, {}), "lists of messages"
    if not isinstance(row, Mapping):
        raise ValueError("not a JSON object" if not isinstance(row, list) else "a list, but not of messages")
    row = {str(key).strip().lower(): value for key, value in [*row.items()][::-1]}
    for field in DIALOGUES:
        if row.get(field) is not None:
            return _dialogue(row[field], row), f"`{field}`"
    for question, extra, answers in PAIRS:
        answer = next((field for field in answers if row.get(field) is not None), None)
        if row.get(question) is not None and answer is not None:
            return _pair(row, (question, *extra), answer), f"`{question}` and `{answer}`"
    if is_message(row):
        raise ValueError("one message, not a dialogue: put the messages of a dialogue into a list `messages`")
    for field in TEXTS:
        if row.get(field) is not None:
            return _nonempty(_text(row, field)), f"`{field}`"
    names = [name[:40] for name in list(row)[::-1][:8]]
    raise ValueError(f"no known field among {', '.join(names) or 'none'}")


def is_message(value: Any) -> bool:
    """Whether a value is one message, such as {role, content} or {from, value}."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get(_key(value, _SPEAKERS)), str)
        and ("tool_calls" in value or any(name in value for name in _SAYINGS))
        and not any(isinstance(value.get(name), (list, tuple)) for name in DIALOGUES)
    )


def is_dialogue(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(is_message, value))


def _nonempty(text: str) -> str | None:
    return text if text.strip() else None


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("not valid UTF-8 text") from None
    return text


def _text(row: Mapping[str, Any], field: str) -> str:
    """A field's text, empty if it is missing. Raises ValueError for other types and invalid text."""
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"`{field}` is not text")
    return _unicode(value or "")


def _pair(row: Mapping[str, Any], questions: tuple[str, ...], answer: str) -> tuple[Message, ...] | None:
    """The dialogue of one question, and of the earlier ones in `history`."""
    if is_dialogue(row[questions[0]]) or is_dialogue(row[answer]):
        asking, answering = (
            list(part) if is_dialogue(part) else [{"role": role, "content": part}]
            for part, role in ((row[questions[0]], "user"), (row[answer], "assistant"))
        )
        begins = ROLES.get(str(answering[0].get(_key(answering[0], _SPEAKERS))).lower()) != "assistant"
        return _dialogue(answering if begins else [*asking, *answering], row)  # `chosen` may hold all of it
    turns = []
    for pair in row.get(HISTORY) or ():
        if not isinstance(pair, (list, tuple)) or [type(text) for text in pair] != [str, str]:
            raise ValueError(f"`{HISTORY}` is not a list of pairs of texts")
        turns += [Turn("user", _unicode(pair[0])), Turn("assistant", _unicode(pair[1]))]
    asked = "\n\n".join(part for field in questions if (part := _text(row, field)).strip())
    answered = _text(row, answer)
    if not asked or not answered.strip():
        return None
    return _finished([*turns, Turn("user", asked), Turn("assistant", answered)], row)


def _dialogue(value: Any, row: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """The messages of a list, or None if all are empty."""
    if isinstance(value, str):  # a column of CSV holds the list as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError("a conversation is not a list of messages")
    return _finished([_turn(turn, at) for at, turn in enumerate(value, start=1)], row)


def _finished(turns: list[Turn], row: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """The turns as messages with the system message of the row; a tool's turns are written out."""
    system = next((_text(row, field) for field in SYSTEMS if _text(row, field).strip()), None)
    if system is not None and not (turns and turns[0].role == "system"):
        turns = [Turn("system", system), *turns]
    while len(turns) > 1 and turns[0].role == turns[1].role == "system":
        turns[:2] = [Turn("system", f"{turns[0].content}\n\n{turns[1].content}")]
    messages = tuple(plain(turns))
    said = any(message.content.strip() for message in messages if message.role != "system")
    return messages if said else None


def _turn(message: Mapping[str, Any], at: int) -> Turn:
    """One message. Raises ValueError for an unknown role and for content that is not text."""
    spelled = message.get(_key(message, _SPEAKERS))
    role = ROLES.get(spelled.strip().lower()) if isinstance(spelled, str) else None
    if role is None:
        raise ValueError(f"message {at} has the role {str(spelled)[:40]!r}")
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"the tool calls of message {at} are not a list")
    name = message.get("name") if isinstance(message.get("name"), str) else None
    if not calls and not any(key in message for key in _SAYINGS):
        raise ValueError(f"message {at} has no content")
    content = _content(message.get(_key(message, _SAYINGS)), at)
    return Turn(
        role, content, tuple(_call(call, at) for call in calls), name if isinstance(name, str) else None
    )


def _key(message: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in message), names[0])


def _content(content: Any, at: int) -> str:
    """The text of a message's content: a string, null, or parts. Raises ValueError for pictures and sound."""
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, (list, tuple)):
        texts = []
        for part in content:
            text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str):
                kind = str(part.get("type", "nothing known"))[:40] if isinstance(part, Mapping) else "no text"
                raise ValueError(f"message {at} holds {kind!r}, not text")
            texts.append(text)
        content = "".join(texts)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"the content of message {at} is not text")
    return _unicode(content or "")


def _call(call: Any, at: int) -> Call:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if function is None or not isinstance(name, str):
        raise ValueError(f"a tool call of message {at} has no name")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    return Call(_unicode(name), _unicode(arguments))
