"""Locks that hold a folder against other processes; they end with the process that holds them. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import IO, Any

from lowmem.errors import OutputError


@contextlib.contextmanager
def locked(lock: IO[Any], busy: str) -> Iterator[None]:
    """Hold an open file's lock, and close the file. Raises OutputError, at once: saying `busy` where another
    process holds it, or that the file cannot be locked."""
    import fcntl

    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(busy, "Wait for it, or stop it") from None
        except OSError as error:
            raise OutputError(
                f"{lock.name} cannot be locked: {error.strerror or error}", "Choose a folder on another disk"
            ) from error
        yield
