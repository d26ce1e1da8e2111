"""Locks that hold a folder against other processes; they end with the process that holds them. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from lowmem.errors import OutputError

_ATTEMPTS = 50
"""Each needs another process to finish just between two of our steps."""


def take(path: Path, busy: str, *, create: bool = True) -> IO[bytes]:
    """The lock file `path`, held until it is closed; made, and the folder around it, unless it must be there.

    What is held is the file that has this name now: the folder may be renamed or removed by the process that
    held it before, and a lock on a file without a name would hold nothing. Raises OutputError, at once,
    saying `busy` where another process holds it, or that the file cannot be locked; OSError where it cannot
    be opened.
    """
    import fcntl

    for attempt in range(_ATTEMPTS):
        try:
            if create:
                path.parent.mkdir(exist_ok=True)
            lock = os.fdopen(os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666), "r+b", 0)
        except FileNotFoundError:
            if create and path.parent.parent.is_dir() and attempt + 1 < _ATTEMPTS:
                continue  # removed between the two
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(lock, path):
                return lock
            lock.close()
        except BlockingIOError:
            lock.close()
            raise OutputError(busy, "Wait for it, or stop it") from None
        except OSError as error:
            lock.close()
            raise OutputError(
                f"{path} cannot be locked: {error.strerror or error}", "Choose a folder on another disk"
            ) from error
    raise OutputError(busy, "Wait for it, or stop it")


def _is_still(lock: IO[bytes], path: Path) -> bool:
    """Whether the open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
