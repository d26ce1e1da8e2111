"""Which files of a checkpoint's folder may be read: plain files, and no links that lead out of it.

A link in a downloaded folder could make this machine read any of its own files: a private model, a key, a
device. Two kinds of link are followed: links inside the folder, and the links of the hub's cache,
`models--owner--name/snapshots/<commit>/x -> ../../blobs/<digest>`, which older versions of the hub's library
created in any folder. A path that the user types on the command line is always followed.
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
    """Whether a file is a link out of its folder, other than a link of the hub's cache."""
    if not path.is_symlink():
        return False
    target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    if target.is_relative_to(folder):
        return False
    blobs = target.parent
    return blobs.name != "blobs" or not blobs.parent.name.startswith("models--")


def check_file(path: Path) -> None:
    """Raise SourceError for a link that leads out of its folder, and for pipes and devices."""
    if leads_outside(path):
        raise SourceError(
            f"{path} is a link that leads out of its folder, to {os.path.realpath(path)}",
            "Replace it by a copy, or give the folder that holds the files",
        )
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # a missing file is reported by its reader
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise SourceError(f"{path} is not a plain file", "Download the checkpoint again")


def check_folder(folder: Path) -> None:
    """`check_file` for every file in a folder that lowmem or transformers may open."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name
                for entry in entries
                if entry.name in _FOLDERS or any(fnmatchcase(entry.name, p) for p in _PATTERNS)
            )
    except (OSError, ValueError):  # reported by the reader
        return
    for name in names:
        check_file(folder / name)
