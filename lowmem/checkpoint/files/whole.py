"""Files that a reader never sees half of: staged beside their place, flushed to disk, renamed. No torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from lowmem.checkpoint.manifest import FileDigest
from lowmem.errors import OutputError
from lowmem.text.units import format_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(OutputError):
    """A file could not be written for want of room."""


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed for want of room: on the disk, of a quota, or under a limit on a file's size."""
    return error.errno in _FULL


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written where `folder` is, or is going to be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(folder: Path, needed: int, work: str, otherwise: str) -> None:
    """DiskFullError where `folder` has no room for `needed` bytes: said before hours of work.

    work: what needs them, as the message's beginning. otherwise: what else there is to do than to free some.
    """
    if needed > (free := free_bytes(folder)):
        raise DiskFullError(
            f"{work} needs {format_bytes(needed)} of disk in {folder}, which has {format_bytes(free)} free",
            f"Free {format_bytes(needed - free)} more, or {otherwise}",
        )


def as_output_error(error: OSError, path: Path) -> OutputError:
    """A failed write in the user's words; what is finished stays and can be resumed."""
    if is_disk_full(error):
        try:
            free = f", and {max(free_bytes(path.parent), 0) / (1 << 20):.1f} MiB are free there"
        except OSError:
            free = ""
        return DiskFullError(
            f"the disk is full: {path} could not be written ({error.strerror}){free}",
            "Free some space and give the same command again: what is finished is kept",
        )
    return OutputError(
        f"{path} could not be written: {error.strerror or error}", "Check the folder and try again"
    )


@contextlib.contextmanager
def refusals(target: Path) -> Iterator[None]:
    """What the disk refuses while `target` is made, wherever that happens, in one line: OutputError."""
    try:
        yield
    except OSError as error:
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else target
        if is_disk_full(error):
            raise as_output_error(error, path) from error
        raise OutputError(
            f"{path}: {error.strerror or error}",
            "Check the disk, and give the same command again: what is finished is kept",
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> FileDigest:
    """Write `chunks` beside `path`, flush them to disk, and rename: all of it or nothing.

    Where two processes write the same file, one waits for the other. Raises OutputError (DiskFullError for
    want of room), and leaves no part behind.
    """
    part = path.with_name(path.name + ".part")
    digest, count = hashlib.sha256(), 0
    try:
        with _open_part(part) as stream:
            try:
                for chunk in chunks:
                    stream.write(chunk)
                    digest.update(chunk)
                    count += len(chunk)
                stream.flush()
                os.fsync(stream.fileno())
                os.replace(part, path)
            except BaseException:
                _forget(stream, part)
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise as_output_error(error, path) from error
    return FileDigest(digest.hexdigest(), count)


def write_json(path: Path, value: object) -> FileDigest:
    """Write JSON for people to read: indented, keys in the order given."""
    return write_whole(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])


def _open_part(part: Path) -> IO[bytes]:
    """The empty file `part`, against other writers: one that a killed process left is used again."""
    while True:
        handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait_for(handle)
            # The writer before us has renamed or removed what we waited for.
            if part.exists() and os.path.samestat(os.fstat(handle), os.stat(part)):
                os.ftruncate(handle, 0)
                return open(handle, "wb")
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _wait_for(handle: int) -> None:
    import fcntl

    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX)


def _forget(stream: IO[bytes], part: Path) -> None:
    """Remove what could not be finished; what is still buffered would only fail once more."""
    with contextlib.suppress(OSError):
        part.unlink()
    with contextlib.suppress(OSError):
        stream.close()
