"""Standard streams that may be closed, full, or of an encoding that lacks characters.

A command line has no say in what its shell connects it to. Inside `standard_streams`:

- a closed stream is replaced before any file is opened, or that file would get the stream's number and
  messages would be written into it;
- a failed write to standard output raises StandardOutputError, or ReaderGone if its reader has exited;
- standard error never fails: a message that cannot be written is dropped, and the work goes on;
- a character that the encoding of standard output lacks is written as "?" and counted.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from lowmem.errors import OutputError
from lowmem.platform import system

_HANDLER = "lowmem_count"
_lost = 0  # characters that were replaced, since `standard_streams` was entered


class StandardOutputError(OutputError):
    """Standard output is closed, full, or broken."""


class ReaderGone(Exception):
    """The program that reads our standard output has exited, which is not an error."""


def print_json(value: object, *, indent: int | None = None) -> None:
    """Print a value as JSON: characters as they are if the output's encoding has them all, or escaped."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-")
    ascii_only = not encoding.startswith("utf")
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    if not ascii_only:
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")  # names may hold half a pair
    print(text, flush=True)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Make the standard streams safe for the block, and flush them at its end.

    Raises StandardOutputError and ReaderGone, also for text that is still buffered at the end.
    """
    global _lost
    _lost = 0
    closed = sys.stdout is None
    _reopen_closed()
    codecs.register_error(_HANDLER, _replace)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream of a test, or a notebook's
        sys.stdout.reconfigure(errors=_HANDLER)  # type: ignore[union-attr]
    with contextlib.suppress(AttributeError, OSError, ValueError):
        system.set_blocking(sys.stdout.fileno())  # a parent may have left it non-blocking
    inner = sys.stdout, sys.stderr
    sys.stdout = cast("TextIO", _Output(sys.stdout, closed=closed))
    sys.stderr = cast("TextIO", _Messages(sys.stderr))
    try:
        yield
        sys.stdout.flush()
    except SystemExit:
        sys.stdout.flush()
        raise
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = inner


def require_output() -> None:
    """Raise StandardOutputError if standard output was closed from the start: the result would be lost."""
    if getattr(sys.stdout, "closed_from_start", False):
        raise StandardOutputError("standard output is closed", "Redirect it to a file, or to /dev/null")


def lost_characters() -> str:
    """A line about characters that standard output's encoding lacks, or "" if none was replaced."""
    if not _lost:
        return ""
    encoding = getattr(sys.stdout, "encoding", "")
    return (
        f"{_lost} character{'s are' if _lost > 1 else ' is'} not in the encoding of standard output, "
        f"{encoding}, and replaced by ?. Set PYTHONIOENCODING=utf-8 to keep such characters"
    )


def silence_output() -> None:
    """Discard what standard output still buffers; it would fail again when Python exits."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        sys.stdout.flush()


class _Stream:
    """A text stream whose writes are guarded; everything else is the stream's own."""

    def __init__(self, stream: TextIO, *, closed: bool = False) -> None:
        self.stream = stream
        self.closed_from_start = closed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stream)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def write(self, text: str) -> int:
        """Write `text`."""
        raise NotImplementedError


class _Output(_Stream):
    """Standard output, with the errors of this module."""

    def write(self, text: str) -> int:
        """Write `text`. Raises StandardOutputError or ReaderGone."""
        with _told():
            return self.stream.write(text)

    def flush(self) -> None:
        """Write what is buffered. Raises StandardOutputError or ReaderGone."""
        with _told():
            self.stream.flush()


class _Messages(_Stream):
    """Standard error, which never fails."""

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        silence_output()
        raise ReaderGone from error
    except OSError as error:
        silence_output()
        raise StandardOutputError(
            f"standard output cannot be written: {error.strerror or error}",
            "Redirect it to a file on a disk with space",
        ) from error


def _replace(error: UnicodeError) -> tuple[str, int]:
    """The error handler of standard output: "?" for each character that has no encoding."""
    global _lost
    if not isinstance(error, UnicodeEncodeError):
        raise error
    _lost += error.end - error.start
    return "?" * (error.end - error.start), error.end


def _reopen_closed() -> None:
    """Open the null device in place of closed standard streams, in the order of their numbers."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    with contextlib.suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
