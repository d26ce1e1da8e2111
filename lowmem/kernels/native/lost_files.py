"""Report a mapped file that was truncated, or whose disk was removed, in one line instead of crashing.

Weights are mapped from their files. Reading a page that is gone ends the process with SIGBUS, which Python
code cannot handle; the kernels' library can. This module does not import torch, since it is used before
anything is read.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

from lowmem.kernels.building.targets import library_name


def library_path() -> Path | None:
    """The compiled library of kernels, beside this file; None if it was not compiled."""
    path = Path(__file__).parent / library_name()
    return path if path.is_file() else None


@contextlib.contextmanager
def lost_files_told(line: str, exit_code: int) -> Iterator[None]:
    """While active, an unreadable page of a mapped file restores the terminal to its present state, prints
    `line` to standard error and ends the process with `exit_code`.

    Has no effect if the library was not compiled, or is of another version.
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
