"""Control of the terminal: echo, Ctrl-C, and restoring its modes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

from lowmem.errors import OutputError
from lowmem.platform import system
from lowmem.text.standard import ReaderGone

TERMINATED = 143  # the exit code that a shell reports for SIGTERM
_SHOW_CURSOR, _NO_BRACKETED_PASTE, _WRAP, _NO_COLOUR = "\x1b[?25h", "\x1b[?2004l", "\x1b[?7h", "\x1b[0m"


class Interrupts:
    """Raises Ctrl-C inside of `armed`, and remembers it in `requested` everywhere else.

    Ctrl-C thereby stops the model at once, and never interrupts drawing or saving.
    """

    def __init__(self) -> None:
        self.requested = False
        self._armed = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def armed(self) -> Iterator[None]:
        """KeyboardInterrupt may be raised inside; at once if Ctrl-C was pressed before."""
        self._armed = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._armed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._armed:
            self._armed = False  # raise once
            raise KeyboardInterrupt


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Keys are not echoed but kept for the next prompt. Ctrl-C works, Ctrl-Z does not."""
    handle, before = _console()
    if before is None:
        yield
        return
    try:
        system.quiet_console(handle, before)
        yield
    finally:
        system.set_console(handle, before)


def forget_typed() -> None:
    """Discard keys that were typed ahead, as Ctrl-C does in a shell."""
    handle, modes = _console()
    if modes is not None:
        system.discard_typed(handle)


def _console() -> tuple[int, Any]:
    """The handle of standard input and the modes of its terminal, None if it is none."""
    try:
        handle = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):
        return -1, None
    return handle, system.console_modes(handle)


@contextmanager
def restored_terminal() -> Iterator[None]:
    """Restore the terminal's modes after the block, however it ends. SIGTERM raises SystemExit inside."""
    handle, before = _console()
    old = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    except BaseException:
        if before is not None and sys.stdout.isatty():
            try:
                sys.stdout.write(_SHOW_CURSOR + _NO_BRACKETED_PASTE + _WRAP + _NO_COLOUR)
                sys.stdout.flush()
            except (OSError, OutputError, ReaderGone):
                pass  # the terminal was closed
        raise
    finally:
        signal.signal(signal.SIGTERM, old)
        if before is not None:
            system.set_console(handle, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)
