"""lowmem's cache of converted checkpoints, where `lowmem convert` writes unless a folder is given.

> $LOWMEM_CACHE, or $XDG_CACHE_HOME/lowmem, or ~/.cache/lowmem
>   models/HuggingFaceH4--starchat-alpha/     a hub id, or NAME-1a2b3c4d of a local checkpoint
>     origin.json                             {"source": the hub id, or the local path}
>     4bit-g128/                              a finished checkpoint; the folder's time is its last use
>     3bit-g64.partial/                       an unfinished conversion, see convert/job.py

Needs no torch.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.checkpoint.files.home import typed_path, user_folder
from lowmem.checkpoint.files.lock import take
from lowmem.checkpoint.files.reading import is_hub_id, read_json
from lowmem.checkpoint.files.whole import DiskFullError, write_whole
from lowmem.checkpoint.manifest import MANIFEST_FILE, REPORT_FILE, find_quantization
from lowmem.config import QuantConfig
from lowmem.errors import InvalidRequestError, LowmemError, OutputError

ORIGIN_FILE = "origin.json"
PARTIAL, WASTE = ".partial", ".partial.done"
"""Suffixes of a checkpoint's name: an unfinished job, and a folder that is being removed."""
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Entry:
    """One checkpoint of the cache, finished or unfinished."""

    name: str
    """"key/label", as `remove` takes it."""
    path: Path
    """The finished folder; it exists if `complete`."""
    source: str
    """The hub id or the absolute path that it was converted from."""
    bits: float
    """0 if unknown; where linears differ, the average with scales and zero-points, as the report says."""
    group_size: int
    """Of the linears that have no settings of their own; 0 if unknown."""
    mixed: bool
    """Some linears are stored otherwise."""
    nbytes: int
    """Of all files, those of an unfinished job included."""
    used: float
    """Time of the last use or of the conversion, in seconds since 1970."""
    complete: bool
    unfinished: bool
    """There is an unfinished job."""
    layers_done: int = 0
    """Of the unfinished job."""

    @property
    def state(self) -> str:
        """For `lowmem list`: ready, unfinished or damaged."""
        if self.complete:
            return "ready, and an unfinished job" if self.unfinished else "ready"
        return f"unfinished, {self.layers_done} layers done" if self.unfinished else "damaged"


def cache_root() -> Path:
    """The cache's folder; it need not exist. Raises OutputError for a user without a home folder."""
    own = os.environ.get("LOWMEM_CACHE")
    if own:
        return typed_path(own).absolute()
    folder = user_folder("XDG_CACHE_HOME", ".cache")
    if folder is None:
        raise OutputError("there is no home folder for lowmem's cache", "Set LOWMEM_CACHE to a folder")
    return folder


def label_of(config: QuantConfig, others: Mapping[str, object] | None = None, *, mixed: bool = False) -> str:
    """The folder's name for a recipe, such as "4bit-g128", with the settings that differ from the defaults.

    others: further settings that differ from their defaults; they become six digits of a checksum. mixed:
    some linears differ from `config`, as `others` say. Raises ValueError for a group size that the converter
    has not chosen yet.
    """
    if config.group_size == 0:
        raise ValueError("the group size is not chosen yet")
    default = QuantConfig(bits=config.bits)
    parts = [f"{config.bits}bit", "row" if config.group_size == -1 else f"g{config.group_size}"]
    if mixed:
        parts.append("mixed")
    if not config.sym:
        parts.append("asym")
    if not config.desc_act:
        parts.append("inorder")
    if config.damp_percent != default.damp_percent:
        parts.append(f"damp{config.damp_percent:g}")
    if not config.true_sequential:
        parts.append("atonce")
    if config.correction != default.correction:
        parts.append(f"correct{config.correction:g}")
    if config.passes != default.passes:
        parts.append(f"passes{config.passes}")
    if config.tune_steps != default.tune_steps:
        parts.append(f"tune{config.tune_steps}")
    if others:
        text = json.dumps(dict(others), sort_keys=True, default=str)
        parts.append(hashlib.sha256(text.encode()).hexdigest()[:6])
    return "-".join(parts)


def entry_folder(source: str, label: str) -> Path:
    """The folder of a checkpoint converted from `source`; nothing is created.

    source: a hub id, or a path, which takes precedence if it exists. Raises InvalidRequestError for a label
    that is not a plain name.
    """
    if not _is_label(label):
        raise InvalidRequestError(f"{label!r} is not a name for a checkpoint", "Use letters, digits and -")
    return cache_root() / "models" / _key(_origin(source)) / label


def claim(source: str, label: str) -> Path:
    """As `entry_folder`; creates the folder above it and writes its origin.

    Raises OutputError when the cache cannot be written.
    """
    folder = entry_folder(source, label)
    origin = folder.parent / ORIGIN_FILE
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not origin.exists():
            write_whole(origin, [(json.dumps({"source": _origin(source)}) + "\n").encode()])
    except DiskFullError:
        raise
    except (OSError, OutputError) as error:
        reason = error.__cause__ if isinstance(error, OutputError) else error
        raise OutputError(
            f"the cache {cache_root()} cannot be written: {getattr(reason, 'strerror', None) or reason}",
            "Give an output folder after SOURCE, or set LOWMEM_CACHE",
        ) from error
    return folder


def prune(folder: Path) -> None:
    """Remove the folder above the entry `folder` if only its origin file, whole or partial, is left."""
    with contextlib.suppress(OSError):
        left = list(folder.parent.iterdir())
        if all(path.name in (ORIGIN_FILE, f"{ORIGIN_FILE}.part") for path in left):
            for path in left:
                path.unlink()
            folder.parent.rmdir()


def mark_used(folder: Path) -> None:
    """Set the time of last use of a checkpoint in the cache; other folders are left alone."""
    with contextlib.suppress(OSError, OutputError):
        if folder.resolve().parent.parent == (cache_root() / "models").resolve():
            os.utime(folder)


def entries() -> list[Entry]:
    """All entries, sorted by name; unreadable folders are skipped. None without a home folder."""
    found: list[Entry] = []
    try:
        root = cache_root()
    except OutputError:
        return found
    for key in _subfolders(root / "models"):
        source = _read_origin(key)
        names = {_without_suffix(path.name) for path in _subfolders(key)}
        found += [_entry(key / label, source) for label in sorted(names) if _is_label(label)]
    return found


def entries_for(source: str) -> list[Entry]:
    """The entries that were converted from `source`, a hub id or a path."""
    key = _key(_origin(source))
    return [entry for entry in entries() if entry.name.partition("/")[0] == key]


def find(text: str) -> Entry:
    """The entry named by "key/label", by a label, by its source, or by a prefix of one of them.

    Raises InvalidRequestError, with the nearest names, when none or several match.
    """
    known = entries()
    if not known:
        raise InvalidRequestError(f"{text!r} is not in the cache: {cache_root()} is empty")
    for fits in (str.__eq__, str.startswith):
        for words_of in (_name, _label, _source):
            matches = [entry for entry in known if text and fits(words_of(entry), text)]
            if len(matches) == 1:
                return matches[0]
            if matches:
                names = ", ".join(entry.name for entry in matches)
                raise InvalidRequestError(f"{text!r} matches {names}", "Give the full name")
    words = {word: entry.name for entry in known for word in (_source(entry), _label(entry), _name(entry))}
    near = dict.fromkeys(words[word] for word in difflib.get_close_matches(text, words, n=3, cutoff=0.5))
    raise InvalidRequestError(
        f"{text!r} is not in the cache",
        f"Did you mean {' or '.join(near)}?" if near else "See lowmem list",
    )


def remove(name: str) -> int:
    """Remove the entry `name` ("key/label") and its unfinished job; returns the bytes freed.

    Links are removed, never followed. Raises InvalidRequestError for a name that is not in the cache, and
    OutputError while a conversion is working on it, or when it cannot be removed.
    """
    entry = next((entry for entry in entries() if entry.name == name), None)
    if entry is None:
        raise InvalidRequestError(f"{name!r} is not in the cache", "See lowmem list")
    folder = entry.path
    if folder.parent.is_symlink():
        raise OutputError(
            f"{folder.parent} is a link to {os.path.realpath(folder.parent)}, outside the cache",
            "Remove it yourself",
        )
    waste, job = _beside(folder, WASTE), _beside(folder, PARTIAL)
    try:
        with _job_lock(folder) as held:
            # A job that began after the lock was tried stays.
            for path in (folder, *([job] if held or job.is_symlink() else [])):
                if os.path.lexists(path):
                    # Renamed first, so that a half-removed folder is never taken for a checkpoint or a job.
                    _remove_tree(waste)
                    path.rename(waste)
            _remove_tree(waste)
    except OSError as error:
        raise OutputError(f"{folder} cannot be removed: {error.strerror or error}") from error
    prune(folder)
    return entry.nbytes


@contextlib.contextmanager
def _job_lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of the unfinished job of `folder`; yields whether there is one."""
    job = _beside(folder, PARTIAL)
    if job.is_symlink() or not job.is_dir():
        yield False
        return
    # Creates the lock file of a job that was killed early; it is removed with the job.
    with take(job / "lock", f"a conversion is working on {folder.parent.name}/{folder.name}"):
        yield True


def _remove_tree(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _entry(path: Path, source: str) -> Entry:
    job = _beside(path, PARTIAL)
    folders = [folder for folder in (path, job, _beside(path, WASTE)) if folder.is_dir()]
    complete = (path / MANIFEST_FILE).is_file()
    state = _read_job(job)
    bits, group_size, mixed = _format(path) if complete else _format_of_job(state)
    done = state.get("finished_layers")
    return Entry(
        name=f"{path.parent.name}/{path.name}",
        path=path,
        source=source,
        bits=bits,
        group_size=group_size,
        mixed=mixed,
        nbytes=sum(_size(folder) for folder in folders),
        used=max((_time(folder) for folder in folders), default=0.0),
        complete=complete,
        unfinished=any(folder != path for folder in folders),
        layers_done=done if type(done) is int else 0,
    )


def _format(folder: Path) -> tuple[float, int, bool]:
    """(bits, group size, whether linears differ) of a finished checkpoint, or zeros."""
    try:
        found = find_quantization(folder)
    except LowmemError:
        found = None
    if found is None:
        return 0, 0, False
    bits = found.default.bits if found.uniform else _average_bits(folder)
    return bits, found.default.group_size, not found.uniform


def _average_bits(folder: Path) -> float:
    """Bits of a weight as the folder's report says; 0 if it does not."""
    try:
        found = read_json(folder / REPORT_FILE).get("bits_per_weight")
    except LowmemError:
        return 0
    return round(found, 2) if isinstance(found, float) and 0 < found <= 32 else 0


def _read_job(job: Path) -> dict[str, Any]:
    try:
        return read_json(job / "job.json")
    except LowmemError:
        return {}


def _format_of_job(state: Mapping[str, Any]) -> tuple[int, int, bool]:
    recipe = state.get("recipe")
    if not isinstance(recipe, dict):
        return 0, 0, False
    bits, group_size, mixed = recipe.get("bits"), recipe.get("group_size"), "linears" in recipe
    if type(bits) is not int or type(group_size) is not int:
        return 0, 0, False
    return (0 if mixed else bits), group_size, mixed  # the average is known when it is finished


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _size(folder: Path) -> int:
    """Bytes of all files below; links inside are not followed."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # a conversion may be running
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _time(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _origin(source: str) -> str:
    """A hub id as it is, or the absolute path of what exists here (or looks like no hub id)."""
    path = os.path.expanduser(source)
    if is_hub_id(source) and not os.path.exists(path):
        return source
    try:
        return os.path.realpath(path)
    except ValueError:  # a zero byte: not a valid path
        return source


def _key(origin: str) -> str:
    if is_hub_id(origin):
        return origin.replace("/", "--")
    base = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(origin)).strip(".")[:60] or "model"
    return f"{base}-{hashlib.sha256(os.fsencode(origin)).hexdigest()[:8]}"


def _read_origin(key: Path) -> str:
    try:
        source = read_json(key / ORIGIN_FILE).get("source")
    except LowmemError:
        source = None
    return source if isinstance(source, str) and source.isprintable() else key.name


def _without_suffix(name: str) -> str:
    for suffix in (WASTE, PARTIAL):
        name = name.removesuffix(suffix)
    return name


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _is_label(text: str) -> bool:
    return bool(_LABEL.fullmatch(text)) and _without_suffix(text) == text


def _name(entry: Entry) -> str:
    return entry.name


def _label(entry: Entry) -> str:
    return entry.path.name


def _source(entry: Entry) -> str:
    return entry.source
