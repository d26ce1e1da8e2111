"""The loop of `lowmem run MODEL` at a terminal: read a message, obey or answer it."""

from __future__ import annotations

from typing import Protocol

from lowmem.chat import commands
from lowmem.chat.chat import Chat
from lowmem.chat.store import save, state_folder
from lowmem.errors import LowmemError
from lowmem.plan.device import is_out_of_memory, trim_memory


class Reader(Protocol):
    """A source of messages: `Prompt`, `FirstMessage` or a script."""

    def read(self) -> str:
        """The next message. Raises KeyboardInterrupt for Ctrl-C at an empty prompt, EOFError at the end."""


def talk(chat: Chat, reader: Reader) -> int:
    """Answer messages until the user leaves. Returns the exit code."""
    # SIGINT stays handled between an answer and the next prompt, or Ctrl-C there would lose the conversation.
    with chat.interrupts:
        leaving = False  # Ctrl-C was pressed at an empty prompt
        while True:
            trim_memory()
            try:
                with chat.session.engine.repacking.in_background():
                    text = reader.read()
            except KeyboardInterrupt:
                if leaving:
                    return 0
                leaving = True
                chat.note("Ctrl-C again, Ctrl-D or /exit leaves")
                continue
            except EOFError:
                return 0
            leaving = False
            chat.interrupts.requested = False  # a Ctrl-C before the message does not stop its answer
            # A terminal that is not UTF-8 may send half a surrogate pair, which cannot be encoded.
            text = text.encode("utf-8", "replace").decode("utf-8")
            try:
                typed = commands.parse(text)
                if isinstance(typed, str):
                    chat.answer(typed)
                else:
                    commands.obey(chat, typed)
            except EOFError:
                return 0
            except KeyboardInterrupt:
                chat.note("stopped")
            except LowmemError as error:
                chat.error(str(error))
            except Exception as error:
                if not is_out_of_memory(error):
                    _rescue(chat)
                    raise
                chat.error("out of memory; the question is not kept. Shorten it, or /reset")


def _rescue(chat: Chat) -> None:
    """Save the conversation before a bug ends the chat."""
    if not chat.conversation.exchanges:
        return
    try:
        folder = state_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = save(str(folder / "rescued.json"), chat.state)
    except (LowmemError, OSError):
        return
    chat.note(f"the conversation is saved in {path}; resume it with --load")
