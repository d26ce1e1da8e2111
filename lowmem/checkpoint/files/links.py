"""Which links in a checkpoint's folder are followed: those that cannot make lowmem show another file's text.

A link in a downloaded folder could make this machine read any of its own files. What a file is used for
decides:

- **Weights** may lie on another disk: a link to a regular file is followed. Its bytes have to form a
  checkpoint of the tensors that the config describes, and none of them is shown as text.
- **Texts** (configs, tokenizers, templates, licences, indexes) are copied by `lowmem convert`, shown, or
  given to a client. A link to one is followed inside its folder; into the `blobs` of a hub cache; and to a
  file of the same name that lies beside linked weights, as `ln -s /nas/model/* .` makes it. No key or
  password is called `tokenizer.json` and lies beside weights.
- `LOWMEM_FOLLOW_LINKS=1` follows every link to a regular file.

Pipes and devices are never opened. A path that the user types on the command line is always followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from lowmem.checkpoint.files.patterns import SETTINGS_PATTERNS, TEMPLATE_FOLDER, TOKENIZER_PATTERNS
from lowmem.errors import SourceError

FOLLOW = "LOWMEM_FOLLOW_LINKS"
"""Environment variable: 1 follows every link to a regular file."""
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.gguf", "*.pt", *TOKENIZER_PATTERNS, *SETTINGS_PATTERNS)


def leads_outside(path: Path) -> bool:
    """Whether a file is a link that is not followed, by the rules of this module."""
    if not path.is_symlink():
        return False
    target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    if target.is_relative_to(folder) or _in_blobs(path, target, folder):
        return False
    if os.environ.get(FOLLOW, "0") not in ("", "0") or path.suffix in _WEIGHTS:
        return not _is_regular(target)
    beside_weights = target.name == path.name and target.parent in set(_linked_weights(path.parent))
    return not (beside_weights and (_is_regular(target) or path.name == TEMPLATE_FOLDER))


def check_file(path: Path) -> None:
    """Raise SourceError for a link that is not followed, and for pipes and devices."""
    if leads_outside(path):
        target = os.path.realpath(path)
        if not os.path.exists(target):
            raise SourceError(
                f"{path} is a link that leads out of its folder, to {target}, which does not exist",
                "Mount its disk, or download the file again",
            )
        if not os.path.isfile(target):
            raise SourceError(
                f"{path} is a link that leads out of its folder, to {target}, which is not a plain file",
                "Replace it by the model's own file",
            )
        raise SourceError(
            f"{path} is a link that leads out of its folder, to {target}",
            f"If the link is yours, set {FOLLOW}=1 or replace it by a copy",
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
                if entry.name == TEMPLATE_FOLDER or any(fnmatchcase(entry.name, p) for p in _PATTERNS)
            )
    except (OSError, ValueError):  # reported by the reader
        return
    for name in names:
        check_file(folder / name)
        if name == TEMPLATE_FOLDER:
            for path in sorted((folder / name).glob("*")):
                check_file(path)


def _in_blobs(path: Path, target: Path, folder: Path) -> bool:
    """Whether a link leads into the `blobs` of a hub cache: `snapshots/<commit>/x -> ../../blobs/<digest>`.

    Older versions of the hub's library created such links in any folder. In the user's own hub cache, `blobs`
    may itself be a link to another disk.
    """
    blobs = target.parent
    if blobs.name == "blobs" and blobs.parent.name.startswith("models--"):
        return True
    if folder.parent.name != "snapshots" or not _is_regular(target):
        return False
    named = folder.parent.parent / "blobs"
    if blobs == named:
        return True
    if Path(os.path.normpath(folder / os.readlink(path))).parent != named or blobs != Path(
        os.path.realpath(named)
    ):
        return False
    return any(named.is_relative_to(cache) for cache in _hub_caches())


def _hub_caches() -> Iterator[Path]:
    """Where the hub's library keeps its cache: the same variables, in its order."""
    home = os.path.expanduser("~")
    shared = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    hugging_face = os.environ.get("HF_HOME") or os.path.join(shared, "huggingface")
    for named in (
        os.environ.get("HF_HUB_CACHE"),
        os.environ.get("HUGGINGFACE_HUB_CACHE"),
        os.path.join(hugging_face, "hub"),
    ):
        if named:
            yield Path(os.path.realpath(os.path.expanduser(os.path.expandvars(named))))


def _linked_weights(folder: Path) -> Iterator[Path]:
    """The folders of the regular files that this folder's linked weights lead to, under the same names."""
    try:
        with os.scandir(folder) as entries:
            links = [e.path for e in entries if e.is_symlink() and Path(e.name).suffix in _WEIGHTS]
    except OSError:
        return
    for link in links:
        target = Path(os.path.realpath(link))
        if target.name == os.path.basename(link) and _is_regular(target):
            yield target.parent


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False
