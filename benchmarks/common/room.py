"""Room on disk for a measurement, and a folder of records that no two of the same kind write at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lowmem.checkpoint.files.lock import take
from lowmem.checkpoint.files.whole import DiskFullError, refusals, require_room
from lowmem.errors import OutputError
from lowmem.text.units import format_bytes

_ELSEWHERE = "measure fewer --rows, set LOWMEM_CACHE (with --no-cache TMPDIR) to a folder on another disk"


@contextlib.contextmanager
def alone(out: Path, kind: str) -> Iterator[None]:
    """Hold the folder of records against another measurement of this kind: it would write over this one's.

    Raises OutputError, at once, where there is one, or where the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = take(out / f"{kind}.lock", f"another lowmem bench {kind} is writing to {out}")
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}", "Give another folder with --out"
        ) from error
    with lock, refusals(out):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (out / f"{kind}.lock").unlink()


@contextlib.contextmanager
def checked(folder: Path, needed: int) -> Iterator[None]:
    """Refuse before the work what `folder` has no room for; where it is full meanwhile, say what was needed.

    needed: bytes at most. Raises OutputError.
    """
    require_room(folder, needed, "the measurement", _ELSEWHERE)
    try:
        yield
    except DiskFullError as error:
        raise DiskFullError(
            f"{error.message}; the whole measurement needs {format_bytes(needed)} in {folder}", error.hint
        ) from error
