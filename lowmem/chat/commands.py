"""The commands of the chat, such as /reset: one function each."""

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
    from lowmem.chat.chat import Chat

# A path such as /etc/hosts has a second slash, so it is a message.
_COMMAND = re.compile(r"/([A-Za-z]+|\?)(?:\s+(.*))?", re.DOTALL)
_KEYS = (
    ("Enter", "send"),
    ("Alt+Enter, Ctrl+J", "start a new line; so does Enter after a \\"),
    ("Up, Ctrl+R", "earlier messages"),
    ("Ctrl+C", "stop the answer, or clear the line; twice: leave"),
    ("Ctrl+D", "leave"),
)


@dataclass(frozen=True)
class Command:
    """A command: `argument` is empty if it takes none, and in brackets if optional."""

    name: str
    run: Callable[[Chat, str], None]
    help: str
    argument: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def needs_argument(self) -> bool:
        """Whether the argument is required."""
        return bool(self.argument) and not self.argument.startswith("[")


@dataclass(frozen=True)
class Typed:
    """A line that starts with a command name, known or not."""

    name: str
    argument: str


def parse(text: str) -> Typed | str:
    """A command, or the message for the model.

    A command is a slash and letters up to a space or the end. With a second slash in front it is a message.
    """
    stripped = text.strip()
    if stripped.startswith("//") and _COMMAND.fullmatch(stripped[1:]):
        return stripped[1:]
    match = _COMMAND.fullmatch(stripped)
    return Typed(match[1].lower(), (match[2] or "").strip()) if match else text


def obey(chat: Chat, typed: Typed) -> None:
    """Run the command. Raises InvalidRequestError for an unknown command or a wrong argument."""
    command = _BY_NAME.get(typed.name)
    if command is None:
        near = difflib.get_close_matches(typed.name, _BY_NAME, n=1, cutoff=0.5)
        hint = f"Did you mean /{near[0]}?" if near else "See /help."
        raise InvalidRequestError(
            f"unknown command /{typed.name}", f"{hint} Type //{typed.name} to send it as a message"
        )
    if command.needs_argument and not typed.argument:
        raise InvalidRequestError(f"/{command.name} needs {command.argument}", f"It will {command.help}")
    if typed.argument and not command.argument:
        raise InvalidRequestError(f"/{command.name} takes no argument", f"Type /{command.name} alone")
    command.run(chat, typed.argument)


def names() -> Mapping[str, str]:
    """`/name` → help, for completion."""
    return {f"/{command.name}": command.help for command in COMMANDS}


def choices() -> Mapping[str, tuple[str, ...]]:
    """Command → the words that may follow it, for completion."""
    return {"/set": NAMES, "/system": ("none",)}


def _help(chat: Chat, argument: str) -> None:
    lines = [f"{'/' + c.name + (' ' + c.argument if c.argument else ''):<26}{c.help}" for c in COMMANDS]
    lines += ["//word".ljust(26) + "send /word as a message", ""]
    lines += [f"{key:<26}{what}" for key, what in _KEYS]
    chat.say(*lines)


def _reset(chat: Chat, argument: str) -> None:
    count = len(chat.conversation.exchanges)
    chat.conversation = Conversation(chat.conversation.system)
    chat.note(f"forgotten: {_exchanges(count)}; the system text and the settings are kept")


def _system(chat: Chat, argument: str) -> None:
    if not argument:
        system = chat.conversation.system
        chat.say(system if system else "no system text is set; set it with /system TEXT")
        return
    if not chat.templated:
        raise InvalidRequestError("a system text needs a dialogue template, which this model lacks")
    text = None if argument.lower() == "none" else argument
    chat.conversation = Conversation(text, chat.conversation.exchanges)
    chat.note("system text removed" if text is None else "system text set, from the next answer on")


def _undo(chat: Chat, argument: str) -> None:
    last = chat.last_exchange()
    chat.conversation = chat.conversation.without_last()
    left = _exchanges(len(chat.conversation.exchanges))
    chat.note(f'removed: "{one_line(last.question)}"; {left} left')


def _retry(chat: Chat, argument: str) -> None:
    last = chat.last_exchange()
    if chat.params.temperature == 0:
        chat.note("temperature is 0, so the answer will be the same; /set temperature 0.7 allows others")
    before = chat.conversation
    chat.conversation = before.without_last()
    try:
        answered = chat.answer(last.question, again=True)
    except BaseException:
        chat.conversation = before
        raise
    if not answered:
        chat.conversation = before
        chat.note("the previous answer is kept")


def _save(chat: Chat, argument: str) -> None:
    path = save(argument, chat.state)
    chat.note(f"saved: {_exchanges(len(chat.conversation.exchanges))} in {path}")


def _load(chat: Chat, argument: str) -> None:
    chat.resume(load(argument, chat.params))


def _stats(chat: Chat, argument: str) -> None:
    chat.say(describe(chat.session.loaded, chat.session.context))
    plan = chat.session.loaded.plan
    if plan is not None:
        chat.say(plan.reason)
    memory = memory_now(chat.session.loaded)
    lines = [f"{'memory':<14}{format_bytes(memory.host)}, peak {format_bytes(memory.host_peak)}"]
    if memory.card:
        lines.append(f"{'card':<14}{format_bytes(memory.card)}, peak {format_bytes(memory.card_peak)}")
    lines.append(f"{'answers':<14}{chat.answers}, {chat.new_tokens:,} tokens")
    last = chat.last
    if last is not None:
        lines += [
            f"{'last prompt':<14}{last.prompt_tokens:,} tokens, {last.cached_tokens:,} of them cached",
            f"{'last answer':<14}{last.new_tokens:,} tokens ({last.finish_reason or 'stopped'})",
            f"{'TTFT':<14}{last.ttft_seconds:.2f} s",
            f"{'speed':<14}{last.tokens_per_second:.1f} tokens/s",
        ]
        if last.drafted_tokens:
            share = last.accepted_tokens / last.drafted_tokens
            drafted = (
                f"{last.drafted_tokens:,} tokens drafted, {last.accepted_tokens:,} accepted ({share:.0%})"
            )
            lines.append(f"{'speculation':<14}{drafted}")
    if chat.session.engine.drafting.why_not:
        lines.append(f"{'no drafts':<14}{chat.session.engine.drafting.why_not}")
    chat.say(*lines)


def _context(chat: Chat, argument: str) -> None:
    session, conversation = chat.session, chat.conversation
    messages, system = conversation.messages(), conversation.system
    if not chat.templated:
        chat.say(f"each message stands alone, in a context of {session.context:,} tokens")
        return
    if not messages:
        used = session.count("", system=system) if system else 0
        chat.say(f"the conversation is empty; system text {used:,} of {session.context:,} tokens")
        return
    with chat.interrupts.armed():  # a long conversation takes a while
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
        lines.append(f"last answer: {dropped_note(dropped)}")
    chat.say(*lines)


def _set(chat: Chat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if value.strip():
        chat.params = with_setting(chat.params, name, value.strip())
        chat.note("set, from the next answer on")
    elif argument:
        raise InvalidRequestError(f"/set {name} needs a value", "Type /set alone to see the settings")
    else:
        chat.say(*show_settings(chat.params))


def _exit(chat: Chat, argument: str) -> None:
    raise EOFError


def is_exit(text: str) -> bool:
    """Whether a typed line is the command that leaves the chat."""
    typed = parse(text)
    if isinstance(typed, str) or typed.argument:
        return False
    command = _BY_NAME.get(typed.name)
    return command is not None and command.run is _exit


def _exchanges(count: int) -> str:
    return f"{count} exchange{'s' * (count != 1)}"


COMMANDS = (
    Command("help", _help, "show the commands and keys", aliases=("?",)),
    Command("reset", _reset, "start over; keeps the system text and the settings", aliases=("clear", "new")),
    Command("system", _system, "show or set the system text; none removes it", "[TEXT]"),
    Command("undo", _undo, "remove the last question and answer"),
    Command("retry", _retry, "answer the last question again, with another seed"),
    Command("save", _save, "save the conversation to a file", "FILE"),
    Command("load", _load, "resume a saved conversation", "FILE"),
    Command("set", _set, "show the settings, or change one: /set temperature 0.7", "[NAME VALUE]"),
    Command("stats", _stats, "show the model, memory and speed"),
    Command("context", _context, "show what fills the context"),
    Command("exit", _exit, "leave", aliases=("quit", "bye")),
)
_BY_NAME = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}
