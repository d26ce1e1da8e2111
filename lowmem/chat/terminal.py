"""Control of the terminal: echo, Ctrl-C, and restoring its modes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

from lowmem.errors import OutputError
from lowmem.text.standard import ReaderGone

try:
    import termios
except ImportError:  # Windows, where the console echoes only during a read
    termios = None  # type: ignore[assignment]

TERMINATED = 143  # the exit code that a shell reports for SIGTERM
_INPUT_FLAGS, _LOCAL_FLAGS, _CONTROL_CHARACTERS = 0, 3, 6  # indexes into termios' list of attributes
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
    try:
        handle = sys.stdin.fileno()
        before = termios.tcgetattr(handle) if termios else None
    except (OSError, ValueError, AttributeError):
        before = None
    if before is None:
        yield
        return
    quiet: list[Any] = [list(part) if isinstance(part, list) else part for part in before]
    quiet[_LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
    quiet[_LOCAL_FLAGS] |= termios.NOFLSH  # or Ctrl-C would discard pending output
    quiet[_INPUT_FLAGS] &= ~termios.ICRNL
    quiet[_CONTROL_CHARACTERS][termios.VSUSP] = b"\0"  # or the answer would be drawn over the shell
    try:
        termios.tcsetattr(handle, termios.TCSANOW, quiet)
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSANOW, before)


def forget_typed() -> None:
    """Discard keys that were typed ahead, as Ctrl-C does in a shell."""
    try:
        if termios:
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
    except (OSError, ValueError, AttributeError):
        pass  # no terminal


@contextmanager
def restored_terminal() -> Iterator[None]:
    """Restore the terminal's modes after the block, however it ends. SIGTERM raises SystemExit inside."""
    handle, before = None, None
    try:
        handle = sys.stdin.fileno()
        before = termios.tcgetattr(handle) if termios and os.isatty(handle) else None
    except (OSError, ValueError, AttributeError):
        pass
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
        if handle is not None and before is not None:
            try:
                termios.tcsetattr(handle, termios.TCSANOW, before)
            except OSError:
                pass


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)
