"""The first message of a chat, typed while the model loads.

The prompt runs in a thread of its own. The model is loaded by the main thread, which owns it from then on.
"""

from __future__ import annotations

import _thread
import threading
from contextlib import ExitStack

from prompt_toolkit.patch_stdout import patch_stdout

from lowmem.chat import commands
from lowmem.chat.input import Prompt
from lowmem.chat.loading import Loading
from lowmem.chat.terminal import quiet_keyboard


class FirstMessage:
    """A Reader whose first message is read while the block loads the model.

    with FirstMessage(prompt, Loading(model)) as reader:
        session = load(reader.progress)
        reader.loaded()
        talk(Chat(session, ...), reader)

    While the prompt is shown, standard output and error print above it. Until `loaded` is called, Ctrl-C at
    the empty prompt, Ctrl-D and /exit interrupt the block; `left` is true for the last two.
    """

    def __init__(self, prompt: Prompt, loading: Loading) -> None:
        self.left = False
        self._prompt, self._loading = prompt, loading
        self._lock = threading.Lock()
        self._busy = True  # the model is not loaded yet
        self._text: str | BaseException = ""
        self._waiting = ExitStack()  # what a terminal shows from Enter until the model is loaded
        self._printing = ExitStack()
        self._thread: threading.Thread | None = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> FirstMessage:
        assert self._thread is not None
        self._printing.enter_context(patch_stdout(raw=True))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._busy = False
            self._waiting.close()
        if self._thread is not None:
            self._prompt.abort()
            self._thread.join()

    def progress(self, done: int, total: int) -> None:
        """Show how many bytes of the model are read."""
        self._loading.update(done, total)

    def loaded(self) -> None:
        """The model is loaded: an entered message may be answered now."""
        with self._lock:
            self._busy = False
            self._waiting.close()
        self._prompt.hide_status()

    def read(self) -> str:
        """The next message, as `Prompt.read`."""
        if self._thread is None:
            return self._prompt.read()
        self._thread.join()
        self._thread = None
        if isinstance(self._text, BaseException):
            raise self._text
        return self._text

    def _read(self) -> None:
        try:
            self._text = self._prompt.read(status=lambda: self._loading.text)
            if commands.is_exit(self._text):
                self._text = EOFError()
        except BaseException as error:
            self._text = error
        self._printing.close()
        with self._lock:
            if not self._busy:
                return
            if isinstance(self._text, BaseException):
                self.left = isinstance(self._text, EOFError)
                _thread.interrupt_main()
                return
            self._waiting.enter_context(quiet_keyboard())
            self._waiting.enter_context(self._loading.shown())
