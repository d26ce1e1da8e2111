"""git-LFS pointers: the text files that stand in for large files until git-lfs has fetched them."""

from __future__ import annotations

from pathlib import Path

from lowmem.errors import SourceError

WHAT = "is a git-LFS pointer, not the file itself"
HINT = "Fetch the files with: git lfs pull"
_START = b"version https://git-lfs.github.com/spec/"
_MOST = 1024  # bytes of a pointer, by its specification


def is_pointer(path: Path) -> bool:
    """Whether a file is a git-LFS pointer; False if it cannot be read."""
    try:
        if path.stat().st_size > _MOST:
            return False
        with path.open("rb") as stream:
            return stream.read(len(_START)) == _START
    except (OSError, ValueError):
        return False


def check_no_pointer(path: Path) -> None:
    """Raise SourceError for a pointer."""
    if is_pointer(path):
        raise SourceError(f"{path.name} {WHAT}", HINT)
