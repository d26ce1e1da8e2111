"""Lock files that keep other processes out of a folder; released when their process ends. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from lowmem.errors import OutputError
from lowmem.platform import system

_ATTEMPTS = 50
"""An attempt fails only when another process finishes between two of its steps."""


def take(path: Path, busy: str, *, create: bool = True) -> IO[bytes]:
    """Take the lock file `path`; it is released when the returned file is closed.

    create: create the file and its folder. After locking, the file is compared with the one that has this
    name now, since the process that held the lock before may have renamed or removed the folder. Does not
    wait. Raises OutputError with the message `busy` when another process holds the lock, or when the file
    cannot be locked; OSError when it cannot be opened.
    """
    for attempt in range(_ATTEMPTS):
        try:
            if create:
                path.parent.mkdir(exist_ok=True)
            lock = os.fdopen(system.open_shared(path, create=create), "r+b", 0)
        except FileNotFoundError:
            if create and path.parent.parent.is_dir() and attempt + 1 < _ATTEMPTS:
                continue  # removed in between
            raise
        try:
            system.lock(lock.fileno(), wait=False)
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
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
