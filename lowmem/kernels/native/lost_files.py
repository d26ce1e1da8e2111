"""A file that is cut short, or whose disk goes, while it is mapped: one line in place of a crash.

Weights are read where the system has mapped them from their files. A page that is there no more ends a
process with SIGBUS, which no Python code sees. So the kernels' library is asked to say something then; this
module needs no torch, for it is there before anything is read.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
from collections.abc import Iterator
from pathlib import Path


def library_path() -> Path | None:
    """The kernels' compiled library, beside this file; None where it was not compiled."""
    folder = Path(__file__).parent
    names = (folder / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in names if path.is_file()), None)


@contextlib.contextmanager
def lost_files_told(line: str, exit_code: int) -> Iterator[None]:
    """Inside, a page of a mapped file that cannot be read prints `line` to standard error and ends the
    process with `exit_code`, the terminal as it is now. Nothing where the library is not compiled, or is of
    another version.
    """
    path, tell = library_path(), None
    if path is not None:
        with contextlib.suppress(OSError, AttributeError):
            tell = ctypes.CDLL(str(path)).lm_tell_bus_errors
            tell.argtypes = (ctypes.c_char_p, ctypes.c_int)
    if tell is None or tell((line + "\n").encode(), exit_code):
        yield
        return
    try:
        yield
    finally:
        tell(None, 0)
