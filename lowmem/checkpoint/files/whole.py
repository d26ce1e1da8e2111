"""Atomic writes: a file is staged beside its target, flushed to disk and renamed. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lowmem.errors import OutputError
from lowmem.platform import system
from lowmem.text.units import format_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class FileDigest:
    """One file of a manifest: its sha256 in lower-case hex, and its length in bytes."""

    sha256: str
    bytes: int


class DiskFullError(OutputError):
    """A file could not be written because the disk is full."""


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed because of a full disk, a quota, or a limit on the file's size."""
    return error.errno in _FULL


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(folder: Path, needed: int, work: str, otherwise: str) -> None:
    """Raise DiskFullError when the disk of `folder` has less than `needed` bytes free, before hours of work.

    work: the beginning of the message, naming what needs the space. otherwise: an alternative to freeing it.
    """
    if needed > (free := free_bytes(folder)):
        raise DiskFullError(
            f"{work} needs {format_bytes(needed)} of disk in {folder}, which has {format_bytes(free)} free",
            f"Free {format_bytes(needed - free)} more, or {otherwise}",
        )


def as_output_error(error: OSError, path: Path) -> OutputError:
    """A failed write as an error for the user; finished parts stay and can be resumed."""
    if is_disk_full(error):
        try:
            free = f"; {max(free_bytes(path.parent), 0) / (1 << 20):.1f} MiB are free"
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
    """Turn every OSError while `target` is written into an OutputError of one line."""
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


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> FileDigest:
    """Write `chunks` beside `path`, flush them to disk, and rename: all or nothing.

    When two processes write the same file, one waits for the other. Raises OutputError (DiskFullError for a
    full disk) and removes the partial file.
    """
    digest, count = hashlib.sha256(), 0
    with staged(path) as stream:
        for chunk in chunks:
            stream.write(chunk)
            digest.update(chunk)
            count += len(chunk)
    return FileDigest(digest.hexdigest(), count)


def staged_path(path: Path) -> Path:
    """Where `staged` writes before it renames."""
    return path.with_name(path.name + ".part")


@contextlib.contextmanager
def staged(path: Path) -> Iterator[IO[bytes]]:
    """A new file beside `path`, open for writing, flushed to disk and renamed to `path` at the end.

    After any exception, a KeyboardInterrupt included, nothing is left of it. Raises as `write_whole`.
    """
    part = staged_path(path)
    try:
        with _open_part(part) as stream:
            try:
                yield stream
                system.finish_file(stream, part, path)
            except BaseException:
                system.discard_file(stream, part)
                raise
        system.flush_folder(path.parent)
    except OSError as error:
        raise as_output_error(error, path) from error


def write_json(path: Path, value: object) -> FileDigest:
    """Write indented JSON, with keys in the given order."""
    return write_whole(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])


def _open_part(part: Path) -> IO[bytes]:
    """The empty, locked file `part`; one left by a killed process is reused."""
    while True:
        handle = system.open_shared(part, create=True)
        try:
            _wait_for(handle)
            # The previous writer may have renamed or removed the file that we waited for.
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
    with contextlib.suppress(OSError):  # a file system without locks
        system.lock(handle, wait=True)
