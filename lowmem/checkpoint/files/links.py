"""Which files of a checkpoint's folder may be read: plain ones, through no link that leads out of it.

A folder that came from somewhere else says with a link what *this* machine reads: somebody's private model, a
key, a device. Two kinds of link are honest, and followed: those that stay in the folder, and those of the
hub's cache, `models--owner--name/snapshots/<commit>/x -> ../../blobs/<digest>`, which older versions of its
library made from any folder. What a user names on a command line, folder or file, is what was meant, link or
not.
"""

from __future__ import annotations

import os
import stat
from fnmatch import fnmatchcase
from pathlib import Path

from lowmem.checkpoint.files.patterns import SETTINGS_PATTERNS, TOKENIZER_PATTERNS
from lowmem.errors import SourceError

_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.gguf", *TOKENIZER_PATTERNS, *SETTINGS_PATTERNS)
_FOLDERS = ("additional_chat_templates",)


def leads_outside(path: Path) -> bool:
    """Whether a file of a folder lies elsewhere, by a link that is not one of the hub's cache."""
    if not path.is_symlink():
        return False
    target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    if target.is_relative_to(folder):
        return False
    blobs = target.parent
    return blobs.name != "blobs" or not blobs.parent.name.startswith("models--")


def check_file(path: Path) -> None:
    """Raise SourceError for a link that leads out of its folder, and for a pipe or device."""
    if leads_outside(path):
        raise SourceError(
            f"{path} is a link that leads out of its folder, to {os.path.realpath(path)}",
            "If it is meant, put a copy in its place, or give the folder where the files are",
        )
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # missing: its reader reports that
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise SourceError(f"{path} is no plain file", "Download the checkpoint again")


def check_folder(folder: Path) -> None:
    """`check_file` for every file in the folder that lowmem or transformers may open."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name
                for entry in entries
                if entry.name in _FOLDERS or any(fnmatchcase(entry.name, p) for p in _PATTERNS)
            )
    except (OSError, ValueError):  # its reader reports that
        return
    for name in names:
        check_file(folder / name)
