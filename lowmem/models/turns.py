"""Turns of any dialogue, also an agent's: calls of tools, their results, system texts between other turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem.models.dialogue import Message


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: str
    """JSON."""
    id: str | None = None


@dataclass(frozen=True)
class Turn:
    """One message of a request: `role` is "system", "user", "assistant" or "tool"."""

    role: str
    content: str
    calls: tuple[Call, ...] = ()
    """Calls of an assistant."""
    name: str | None = None
    """The tool that answers, or the speaker."""
    call_id: str | None = None
    """The call that a tool answers."""
    reasoning: str | None = None
    """The reasoning before an assistant's answer."""
    bare: bool = False
    """The message has no content, not even an empty one."""

    @property
    def needs_template(self) -> bool:
        """Whether the turn has more than a role and a text."""
        return self.role == "tool" or bool(self.calls or self.name or self.reasoning)

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: arguments are an object, absent fields are left out."""
        found: dict[str, Any] = {"role": self.role}
        if not self.bare:
            found["content"] = self.content
        if self.calls:
            found["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": call.name, "arguments": _arguments(call.arguments)},
                    **({"id": call.id} if call.id is not None else {}),
                }
                for call in self.calls
            ]
        rest = {"name": self.name, "tool_call_id": self.call_id, "reasoning_content": self.reasoning}
        return found | {name: value for name, value in rest.items() if value is not None}


def plain(turns: Sequence[Turn]) -> list[Message]:
    """The turns with the roles that every dialogue has: one system message at the start, user, assistant.

    A tool's result and a late system text join the user's messages beside them, so that turns alternate.
    """
    found: list[Message] = []
    joins = False  # the last message is the user's, and may be added to
    for at, turn in enumerate(turns):
        written = Message("user" if turn.role == "tool" else turn.role, _written(turn))
        moved = turn.role == "tool"
        if turn.role == "system" and at:
            written, moved = replace(written, role="user"), True
        last = found[-1] if found else None
        if last is not None and last.role == written.role == "user" and (moved or joins):
            found[-1] = replace(last, content=f"{last.content}\n\n{written.content}")
        else:
            found.append(written)
        joins = moved
    return found


def _written(turn: Turn) -> str:
    """What a turn says, in words."""
    if turn.role == "tool":
        return f"Result of {turn.name or 'the tool'}:\n{turn.content}"
    calls = [f"Call {call.name} with {call.arguments}" for call in turn.calls]
    return "\n\n".join([*([turn.content] if turn.content or not calls else []), *calls])


def _arguments(text: str) -> Any:
    """Arguments as an object, which templates expect; a text that is not JSON stays one."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
