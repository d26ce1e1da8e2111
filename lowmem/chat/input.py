"""The prompt of the chat: prompt_toolkit with the chat's keys, completion and history."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

from prompt_toolkit import PromptSession, utils
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
from lowmem.errors import OutputError
from lowmem.platform import system

_PROMPT, _CONTINUATION = "> ", "  "
_LARGEST_ENTRY = 20_000  # characters; longer messages, such as pasted files, are not kept
_LARGEST_HISTORY = 4 << 20  # bytes
_MOST_ENTRIES = 1000  # messages in memory
_MOST_CHARACTERS = 1 << 20  # of all messages in memory
_MOST_WIDTHS = 5000  # entries in prompt_toolkit's cache of widths
_REFRESH = 0.2  # seconds between two drawings of the status
_STYLE = Style.from_dict(
    {
        "prompt": "bold",
        "completion-menu.completion.current": "reverse",
        "completion-menu": "bg:default fg:default",
        "bottom-toolbar": "noreverse dim",
    }
)


class Prompt:
    """Reads one message at a time.

    Enter sends; Alt+Enter, Ctrl-J, and Enter after a backslash start a new line. Pasted text may have several
    lines. Up and Ctrl-R recall messages, also those of earlier runs.
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
        """commands: name → help. choices: words that may follow a command. source, target: for tests."""
        self._aborted = False
        slash = Condition(lambda: self._session.default_buffer.text.startswith("/"))
        self._session: PromptSession[str] = PromptSession(
            FormattedText([("class:prompt", _PROMPT)]),
            multiline=True,
            prompt_continuation=_CONTINUATION,
            history=history,
            completer=CommandCompleter(commands, choices),
            # The menu takes rows below the line, so it is shown for commands only.
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

    def read(self, status: Callable[[], str] | None = None) -> str:
        """The next message. Raises KeyboardInterrupt for Ctrl-C at an empty prompt, EOFError for Ctrl-D.

        status: text below the prompt, until `hide_status`. May run in any thread.
        """
        _limit_widths()
        if status is not None:
            self._session.bottom_toolbar = lambda: status()
            self._session.refresh_interval = _REFRESH
        try:
            return self._session.prompt(pre_run=self._leave_if_aborted)
        finally:
            self._session.bottom_toolbar, self._session.refresh_interval = None, 0

    def hide_status(self) -> None:
        """Remove the text below the prompt."""
        self._session.bottom_toolbar = None
        self._session.app.invalidate()

    def abort(self) -> None:
        """Have `read`, this call or the next, raise EOFError."""
        self._aborted = True
        loop = self._session.app.loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._leave_if_aborted)

    def _leave_if_aborted(self) -> None:
        app = self._session.app
        if self._aborted and app.is_running and not app.is_done:
            app.exit(exception=EOFError)


class CommandCompleter(Completer):
    """Completes the names of commands, and then their arguments."""

    def __init__(self, commands: Mapping[str, str], choices: Mapping[str, Iterable[str]]) -> None:
        self._commands, self._choices = commands, choices
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Completions of a one-line command before the cursor."""
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


class _Newest(History):
    """Keeps only the newest messages in memory.

    prompt_toolkit's histories keep all, and each prompt iterates over them.
    """

    def load_history_strings(self) -> Iterable[str]:
        """The messages of earlier runs, newest first."""
        return _newest(super().load_history_strings())  # type: ignore[safe-super]

    def append_string(self, string: str) -> None:
        """Add a message."""
        super().append_string(string)
        self._loaded_strings = _newest(self._loaded_strings)


class _ChatHistory(_Newest, FileHistory):
    """In a file of bounded size. A full disk does not end the chat."""

    def store_string(self, string: str) -> None:
        if len(string) > _LARGEST_ENTRY:
            return
        try:
            super().store_string(string)
            with open(self.filename, "r+b") as file:
                _keep_newest(file.fileno())
        except OSError:
            pass


class _RunHistory(_Newest, InMemoryHistory):
    """Of this run only."""

    def store_string(self, string: str) -> None:
        """Do nothing: append_string keeps the message in memory."""


def open_history(notify: Callable[[str], None]) -> History:
    """The history in a file that only its owner can read, or else of this run only."""
    try:
        path = state_folder() / "history"
    except OutputError as error:
        notify(f"the history cannot be saved: {error}")
        return _RunHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(
            path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o600
        )
        try:
            system.keep_private(handle)
            _keep_newest(handle)
        finally:
            os.close(handle)
    except OSError as error:
        notify(f"the history cannot be saved in {path}: {error.strerror or error}")
        return _RunHistory()
    return _ChatHistory(path)


def _limit_widths() -> None:
    """Bound prompt_toolkit's cache of the widths of all texts that it has shown."""
    widths = getattr(utils, "_CHAR_SIZES_CACHE", None)
    if isinstance(widths, dict) and len(widths) > _MOST_WIDTHS:
        widths.clear()


def _newest(strings: Iterable[str]) -> list[str]:
    """The first of `strings` within the limits of memory; at least one."""
    kept: list[str] = []
    left = _MOST_CHARACTERS
    for string in islice(strings, _MOST_ENTRIES):
        left -= len(string)
        if left < 0 and kept:
            break
        kept.append(string)
    return kept


def _keep_newest(handle: int) -> None:
    """Remove the older half of a file that is too large, at the start of an entry (`\\n# date`).

    The newer half overwrites the older before the file is truncated, so an interruption loses none of it.
    """
    size = os.fstat(handle).st_size
    if size <= _LARGEST_HISTORY:
        return
    data = system.read_at(handle, size, size // 2)
    start = data.find(b"\n# ")
    kept = data[start:] if start >= 0 else b""
    system.write_at(handle, kept, 0)
    os.ftruncate(handle, len(kept))
