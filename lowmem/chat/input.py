"""What the user types: prompt_toolkit with the keys of a chat."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth, Output
from prompt_toolkit.styles import Style

from lowmem.chat.store import state_folder

_PROMPT, _CONTINUATION = "> ", "  "
_LARGEST_ENTRY = 20_000  # characters: a pasted file is not looked for with the arrow key
_LARGEST_HISTORY = 4 << 20  # bytes
_STYLE = Style.from_dict(
    {
        "prompt": "bold",
        "completion-menu.completion.current": "reverse",
        "completion-menu": "bg:default fg:default",
    }
)


class Prompt:
    """Reads one message at a time.

    Enter sends, Alt+Enter or Ctrl-J starts a new line, and so does Enter behind a backslash. What is pasted
    is text, whatever lines it has. Up and Ctrl-R reach the messages of earlier runs.
    """

    def __init__(
        self,
        history: History,
        commands: Mapping[str, str],
        choices: Mapping[str, Iterable[str]],
        *,
        plain: bool = False,
        source: Input | None = None,
        target: Output | None = None,
    ) -> None:
        """`commands`: name → help. `choices`: what may follow a command. source, target: for tests."""
        slash = Condition(lambda: self._session.default_buffer.text.startswith("/"))
        self._session: PromptSession[str] = PromptSession(
            FormattedText([("class:prompt", _PROMPT)]),
            multiline=True,
            prompt_continuation=_CONTINUATION,
            history=history,
            completer=CommandCompleter(commands, choices),
            # The menu takes room below the line, which is only spent when a command is typed.
            complete_while_typing=slash,
            reserve_space_for_menu=6,
            key_bindings=_keys(),
            style=_STYLE,
            color_depth=ColorDepth.DEPTH_1_BIT if plain else None,
            enable_suspend=True,
            include_default_pygments_style=False,
            input=source,
            output=target,
        )

    def read(self) -> str:
        """The next message; KeyboardInterrupt for Ctrl-C at an empty prompt, EOFError for Ctrl-D."""
        return self._session.prompt()


class CommandCompleter(Completer):
    """The names of commands, then what belongs behind them."""

    def __init__(self, commands: Mapping[str, str], choices: Mapping[str, Iterable[str]]) -> None:
        self._commands, self._choices = commands, choices
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Completions for the text before the cursor, which must be a command on one line."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in document.text:
            return
        name, blank, rest = text.partition(" ")
        if not blank:
            for command, help in self._commands.items():
                if command.startswith(name):
                    yield Completion(command, start_position=-len(name), display_meta=help)
        elif name in ("/save", "/load"):
            path = Document(rest.lstrip(), len(rest.lstrip()))
            yield from self._paths.get_completions(path, complete_event)
        else:
            for choice in self._choices.get(name, ()):
                if choice.startswith(rest.lstrip()) and " " not in rest.lstrip():
                    yield Completion(choice, start_position=-len(rest.lstrip()))


def _keys() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus("DEFAULT_BUFFER")

    @keys.add("enter", filter=typing)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif buffer.text.strip():
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("c-j", filter=typing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    def _clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


class _ChatHistory(FileHistory):
    """prompt_toolkit's, which must not end the chat when the disk is full."""

    def store_string(self, string: str) -> None:
        if len(string) > _LARGEST_ENTRY:
            return
        try:
            super().store_string(string)
        except OSError:
            pass


def open_history(notify: Callable[[str], None]) -> History:
    """The messages of earlier runs, in a file that only its owner can read; else those of this run."""
    path = state_folder() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0), 0o600)
        try:
            if os.fstat(handle).st_mode & 0o077:
                os.fchmod(handle, 0o600)
            if os.fstat(handle).st_size > _LARGEST_HISTORY:
                _keep_newest(handle)
        finally:
            os.close(handle)
    except OSError as error:
        notify(f"the history cannot be kept in {path}: {error.strerror or error}")
        return InMemoryHistory()
    return _ChatHistory(path)


def _keep_newest(handle: int) -> None:
    """Cut the older half off, at the start of an entry (`\\n# date`)."""
    size = os.fstat(handle).st_size
    data = os.pread(handle, size, size // 2)
    start = data.find(b"\n# ")
    os.ftruncate(handle, 0)
    os.write(handle, data[start:] if start >= 0 else b"")
