"""Paths that the user types, and the user's home folder, which an unnamed user of a container lacks."""

from __future__ import annotations

import os
from pathlib import Path


def typed_path(text: str | os.PathLike[str]) -> Path:
    """The path with a leading ~ expanded, unchanged where no home folder is known."""
    return Path(os.path.expanduser(text))


def home_folder() -> Path | None:
    """The user's home folder; None for a user who has none ($HOME is unset, and the system knows no name)."""
    home = os.path.expanduser("~") if os.environ.get("HOME", "~") else ""
    return Path(home) if os.path.isabs(home) else None
