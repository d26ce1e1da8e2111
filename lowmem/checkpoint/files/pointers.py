"""What git leaves in the place of a large file until git-lfs has fetched it: some lines of text."""

from __future__ import annotations

from pathlib import Path

from lowmem.errors import SourceError

WHAT = "is not the file itself, but git-LFS' pointer to it"
HINT = "Fetch the files with: git lfs pull"
_START = b"version https://git-lfs.github.com/spec/"
_MOST = 1024  # bytes of a pointer, by its specification


def is_pointer(path: Path) -> bool:
    """Whether a file holds a pointer of git-LFS; False for what cannot be read."""
    try:
        if path.stat().st_size > _MOST:
            return False
        with path.open("rb") as stream:
            return stream.read(len(_START)) == _START
    except (OSError, ValueError):
        return False


def check_no_pointer(path: Path) -> None:
    """SourceError for a pointer."""
    if is_pointer(path):
        raise SourceError(f"{path.name} {WHAT}", HINT)
