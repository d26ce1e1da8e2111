"""The words after a slash: one function each, on the chat they change."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.chat.conversation import Conversation
from lowmem.chat.figures import describe, dropped_note, memory_now
from lowmem.chat.settings import NAMES, show_settings, with_setting
from lowmem.chat.store import load, save
from lowmem.chat.text import one_line
from lowmem.errors import InvalidRequestError
from lowmem.text.units import format_bytes

if TYPE_CHECKING:
    from lowmem.chat.repl import Chat

# A path such as /etc/hosts has a second slash, so it is text.
_COMMAND = re.compile(r"/([A-Za-z]+|\?)(?:\s+(.*))?", re.DOTALL)
_KEYS = (
    ("Enter", "send"),
    ("Alt+Enter, Ctrl+J", "a new line; so does \\ at the end of one"),
    ("Up, Ctrl+R", "earlier messages"),
    ("Ctrl+C", "stop the answer, or clear the line; twice: leave"),
    ("Ctrl+D", "leave"),
)


@dataclass(frozen=True)
class Command:
    """What to type, what it does, and whether it takes no, a possible or a necessary argument."""

    name: str
    run: Callable[[Chat, str], None]
    help: str
    argument: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def needs_argument(self) -> bool:
        """True where the argument is not in brackets."""
        return bool(self.argument) and not self.argument.startswith("[")


@dataclass(frozen=True)
class Typed:
    """A line that names a command, known or not."""

    name: str
    argument: str


def parse(text: str) -> Typed | str:
    """A command, or the message that the model gets.

    A slash and letters up to a blank or the end are a command; a second slash in front makes them text.
    """
    stripped = text.strip()
    if stripped.startswith("//") and _COMMAND.fullmatch(stripped[1:]):
        return stripped[1:]
    match = _COMMAND.fullmatch(stripped)
    return Typed(match[1].lower(), (match[2] or "").strip()) if match else text


def obey(chat: Chat, typed: Typed) -> None:
    """Run the command; LowmemError for one that is unknown or asked for in a wrong way."""
    command = _BY_NAME.get(typed.name)
    if command is None:
        near = difflib.get_close_matches(typed.name, _BY_NAME, n=1, cutoff=0.5)
        hint = f"Did you mean /{near[0]}?" if near else "See /help"
        raise InvalidRequestError(
            f"there is no command /{typed.name}", f"{hint} //{typed.name} is sent as a message"
        )
    if command.needs_argument and not typed.argument:
        raise InvalidRequestError(f"/{command.name} needs {command.argument}", f"It is to {command.help}")
    if typed.argument and not command.argument:
        raise InvalidRequestError(f"/{command.name} takes nothing behind it", f"Type /{command.name} alone")
    command.run(chat, typed.argument)


def names() -> Mapping[str, str]:
    """`/name` → help, for completion."""
    return {f"/{command.name}": command.help for command in COMMANDS}


def choices() -> Mapping[str, tuple[str, ...]]:
    """What may follow a command."""
    return {"/set": NAMES, "/system": ("none",)}


def _help(chat: Chat, argument: str) -> None:
    lines = [f"{'/' + c.name + (' ' + c.argument if c.argument else ''):<26}{c.help}" for c in COMMANDS]
    lines += ["//word".ljust(26) + "send /word as a message; a path with two slashes is one", ""]
    lines += [f"{key:<26}{what}" for key, what in _KEYS]
    chat.say(*lines)


def _reset(chat: Chat, argument: str) -> None:
    count = len(chat.conversation.exchanges)
    chat.conversation = Conversation(chat.conversation.system)
    chat.note(f"forgotten: {_exchanges(count)}; the system text and the settings stay")


def _system(chat: Chat, argument: str) -> None:
    if not argument:
        system = chat.conversation.system
        chat.say(system if system else "there is no system text; set it with /system TEXT")
        return
    if not chat.templated:
        raise InvalidRequestError("this model has no dialogue template that a system text could go into")
    text = None if argument.lower() == "none" else argument
    chat.conversation = Conversation(text, chat.conversation.exchanges)
    chat.note("the system text is gone" if text is None else "the system text holds from the next turn on")


def _undo(chat: Chat, argument: str) -> None:
    last = chat.last_exchange()
    chat.conversation = chat.conversation.without_last()
    left = _exchanges(len(chat.conversation.exchanges))
    chat.note(f'taken back: "{one_line(last.question)}"; {left} left')


def _retry(chat: Chat, argument: str) -> None:
    last = chat.last_exchange()
    if chat.params.temperature == 0:
        chat.note("temperature is 0, so the answer is the same; /set temperature 0.7 makes others possible")
    before = chat.conversation
    chat.conversation = before.without_last()
    try:
        answered = chat.answer(last.question, again=True)
    except BaseException:
        chat.conversation = before
        raise
    if not answered:
        chat.conversation = before
        chat.note("the answer before stays")


def _save(chat: Chat, argument: str) -> None:
    path = save(argument, chat.conversation, chat.params, chat.model_name)
    chat.note(f"saved: {_exchanges(len(chat.conversation.exchanges))} in {path}")


def _load(chat: Chat, argument: str) -> None:
    saved = load(argument, chat.params)
    chat.conversation, chat.params = saved.conversation, saved.params
    chat.show_loaded()


def _stats(chat: Chat, argument: str) -> None:
    chat.say(describe(chat.session.loaded, chat.session.context))
    plan = chat.session.loaded.plan
    if plan is not None:
        chat.say(plan.reason)
    memory = memory_now(chat.session.loaded)
    lines = [f"{'memory':<14}{format_bytes(memory.host)}, at most {format_bytes(memory.host_peak)}"]
    if memory.card:
        lines.append(f"{'card':<14}{format_bytes(memory.card)}, at most {format_bytes(memory.card_peak)}")
    lines.append(f"{'answers':<14}{chat.answers}, {chat.new_tokens:,} tokens")
    last = chat.last
    if last is not None:
        lines += [
            f"{'last prompt':<14}{last.prompt_tokens:,} tokens, {last.cached_tokens:,} of them known already",
            f"{'last answer':<14}{last.new_tokens:,} tokens ({last.finish_reason or 'stopped'})",
            f"{'TTFT':<14}{last.ttft_seconds:.2f} s",
            f"{'speed':<14}{last.tokens_per_second:.1f} tokens/s",
        ]
        if last.drafted_tokens:
            share = last.accepted_tokens / last.drafted_tokens
            drafted = f"{last.drafted_tokens:,} tokens drafted, {last.accepted_tokens:,} right ({share:.0%})"
            lines.append(f"{'speculation':<14}{drafted}")
    chat.say(*lines)


def _context(chat: Chat, argument: str) -> None:
    session, conversation = chat.session, chat.conversation
    messages, system = conversation.messages(), conversation.system
    if not chat.templated:
        chat.say(f"each message is on its own, in a context of {session.context:,} tokens")
        return
    if not messages:
        used = session.count("", system=system) if system else 0
        chat.say(f"nothing is said yet; system text {used:,} of {session.context:,} tokens")
        return
    with chat.interrupts.armed():  # a long conversation takes its time
        totals = [session.count(messages[: 2 * n], system=system) for n in range(1, len(messages) // 2 + 1)]
        first = session.count(messages[:2])
    lines = [f"{totals[-1]:,} of {session.context:,} tokens"]
    if system:
        lines.append(f"{totals[0] - first:>8,}  system: {one_line(system)}")
    dropped = chat.dropped if chat.dropped < len(totals) else 0
    for number, (total, exchange) in enumerate(zip(totals, conversation.exchanges, strict=True)):
        part = total - totals[number - 1] if number else first
        out = " (left out)" if number < dropped else ""
        lines.append(f"{part:>8,}  {one_line(exchange.question)}{out}")
    if dropped:
        lines.append(f"in the last answer {dropped_note(dropped)}")
    chat.say(*lines)


def _set(chat: Chat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if value.strip():
        chat.params = with_setting(chat.params, name, value.strip())
        chat.note("from the next answer on")
    elif argument:
        raise InvalidRequestError(f"/set {name} needs a value", "Type /set alone to see them all")
    else:
        chat.say(*show_settings(chat.params))


def _exit(chat: Chat, argument: str) -> None:
    raise EOFError


def _exchanges(count: int) -> str:
    return f"{count} exchange{'s' * (count != 1)}"


COMMANDS = (
    Command("help", _help, "show the commands and keys", aliases=("?",)),
    Command("reset", _reset, "start over; the system text and the settings stay", aliases=("clear", "new")),
    Command("system", _system, "show or set the system text (none: without)", "[TEXT]"),
    Command("undo", _undo, "take the last exchange back"),
    Command("retry", _retry, "answer the last question again, with another seed"),
    Command("save", _save, "keep the conversation in a file", "FILE"),
    Command("load", _load, "go on with a conversation that was kept", "FILE"),
    Command("set", _set, "show the settings, or change one: /set temperature 0.7", "[NAME VALUE]"),
    Command("stats", _stats, "show the model, memory and speed"),
    Command("context", _context, "show how full the context is, and of what"),
    Command("exit", _exit, "leave", aliases=("quit", "bye")),
)
_BY_NAME = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}
