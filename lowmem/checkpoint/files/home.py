"""Paths that the user types, and the user's home folder, which an unnamed user of a container lacks."""

from __future__ import annotations

import os
from pathlib import Path


def typed_path(text: str | os.PathLike[str]) -> Path:
    """The path with a leading ~ expanded, unchanged where no home folder is known."""
    return Path(os.path.expanduser(text))


def home_folder() -> Path | None:
    """The user's home folder; None where $HOME is unset and the system knows none for the user."""
    home = os.path.expanduser("~") if os.environ.get("HOME", "~") else ""
    return Path(home) if os.path.isabs(home) else None


def user_folder(variable: str, below_home: str) -> Path | None:
    """lowmem's folder in the one that an XDG variable names, or by default in `below_home`.

    None without either. The XDG Base Directory Specification has relative paths ignored.
    """
    named, home = os.environ.get(variable, ""), home_folder()
    if os.path.isabs(named):
        return Path(named) / "lowmem"
    return None if home is None else home / below_home / "lowmem"
