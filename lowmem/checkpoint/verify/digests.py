"""Known digests of a checkpoint's files, and comparisons with them.

Digests come from the manifest of lowmem's own checkpoints; otherwise from the hub's cache, whose links name
the digest of their target; otherwise from the metadata files that the hub's library writes beside a download.
The hub gives the sha256 of large files and git's sha1 of small ones. Pickle shards hold checksums of their
own.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lowmem.checkpoint.files.patterns import (
    SETTINGS_PATTERNS,
    TOKENIZER_PATTERNS,
    VOCABULARIES,
    WEIGHT_SUFFIXES,
)
from lowmem.checkpoint.headers.folder import layout_of, tensor_headers
from lowmem.checkpoint.manifest import MANIFEST_FILE, checkpoint_files, digest_file, read_manifest
from lowmem.checkpoint.verify.bin_checksums import checksum_faults
from lowmem.errors import InvalidRequestError, SourceError, VerifyError

_CHUNK = 1 << 20
_METADATA = Path(".cache") / "huggingface" / "download"
_MAX_METADATA = 10_000
"""Bytes of a metadata file, which has three lines."""
_AGAIN = "Convert it again, or copy or download it again"
_VOCABULARIES = (*VOCABULARIES, "merges.txt")
_SETTINGS = ("config.json", *TOKENIZER_PATTERNS, *SETTINGS_PATTERNS)

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Known:
    """The expected digest and size of a file."""

    digest: str
    """Lower-case hex of a sha256, or of git's sha1."""
    nbytes: int | None = None
    """None if only the digest is known."""


@dataclass(frozen=True)
class Digests:
    """The known digests of a folder's files."""

    origin: str
    """"the manifest" or "the hub"."""
    files: Mapping[str, Known]
    """By file name."""
    ours: bool = False
    """From a manifest, which lists all files."""

    def note(self, names: list[str]) -> str:
        """A line about a folder of these files that has no manifest."""
        if not self.files:
            return f"without {MANIFEST_FILE}, digests were not compared"
        count = sum(name in self.files for name in names)
        what = f"{count} of {len(names)} files were compared with {self.origin}'s digests"
        return f"without {MANIFEST_FILE}, {what}"


def known_digests(folder: Path) -> Digests:
    """The known digests of a folder's files; none if it was only copied here.

    Raises VerifyError for a damaged manifest.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        files = {name: Known(entry.sha256, entry.bytes) for name, entry in manifest.items()}
        return Digests("the manifest", files, ours=True)
    found = {name: known for name in checkpoint_files(folder) if (known := _of_hub(folder, name))}
    return Digests("the hub", found)


def _of_hub(folder: Path, name: str) -> Known | None:
    file = folder / name
    text = ""
    if file.is_symlink():  # the cache: snapshots/<commit>/x -> ../../blobs/<digest>
        target = Path(os.path.realpath(file))
        text = target.name if target.parent.name == "blobs" else ""
    else:
        try:
            with (folder / _METADATA / f"{name}.metadata").open("rb") as stream:
                lines = stream.read(_MAX_METADATA).decode("ascii", errors="replace").splitlines()
        except OSError:
            return None
        text = lines[1].strip() if len(lines) > 1 else ""
    return Known(text) if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else None


def difference(file: Path, known: Known, origin: str, on_bytes: Callable[[int], None] | None = None) -> str:
    """How a file differs from its digest, or ""; a file of the wrong size is not read.

    on_bytes: called with the length of every piece of 1 MiB, or the whole length of a file that is not read.
    """
    size = file.stat().st_size
    if known.nbytes is not None and size != known.nbytes:
        if on_bytes:
            on_bytes(size)
        return f"has {size} bytes, and {origin} says {known.nbytes}"
    if len(known.digest) == 64:
        if digest_file(file, on_bytes).sha256 != known.digest:
            return f"was changed: its sha256 is not {origin}'s"
    elif _git_digest(file, size, on_bytes) != known.digest:
        return f"was changed: its digest is not {origin}'s"
    return ""


def _git_digest(file: Path, size: int, on_bytes: Callable[[int], None] | None) -> str:
    sha = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with file.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            sha.update(piece)
            if on_bytes:
                on_bytes(len(piece))
    return sha.hexdigest()


def check_all(path: Path, progress: Callable[[int, int], None] | None = None) -> int:
    """Compare every file with its known digest; returns the number of files compared.

    path: a folder, or a single weight file. Pickle shards without digests are compared with the checksums in
    their zip. progress: called with bytes read and bytes in all. Raises SourceError naming the first file
    that is missing or was changed, and InvalidRequestError when no digest of the weights is known.
    """
    folder = path if path.is_dir() else path.parent
    digests = _digests(folder)
    wanted = {k: v for k, v in digests.files.items() if path.is_dir() or k == path.name}
    archives = [] if digests.ours else [name for name in _pickle_shards(path) if name not in wanted]
    if not archives and not any(name.endswith(WEIGHT_SUFFIXES) for name in wanted):
        raise InvalidRequestError(
            f"no digest of {path} is known, so it cannot be compared",
            "Omit --check; only converted checkpoints and files from the hub can be compared",
        )
    files = [folder / name for name in (*wanted, *archives)]
    total = sum(file.stat().st_size for file in files if file.is_file())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for name in sorted(wanted):
        if not (folder / name).is_file():
            raise SourceError(f"{folder}: {name} is missing, and {digests.origin} lists it", _AGAIN)
        try:
            fault = difference(folder / name, wanted[name], digests.origin, advance)
        except OSError as error:
            raise SourceError(f"{folder / name} cannot be read: {error.strerror or error}") from error
        if fault:
            raise SourceError(f"{folder}: {name} {fault}", _AGAIN)
    for name in archives:
        for tensor, fault in checksum_faults(folder / name, advance):
            raise SourceError(f"{folder}: {': '.join(filter(None, (name, tensor)))} {fault}", _AGAIN)
    return len(files)


def _pickle_shards(path: Path) -> list[str]:
    if not path.is_dir() or layout_of(path, str(path)).kind != "bin":
        return []
    return sorted({header.file for header in tensor_headers(path).values()})


def check_small(folder: Path, notify: Notify) -> None:
    """Check a converted checkpoint in milliseconds: the sizes of its weights, the digests of its small files.

    Raises SourceError for weights that are missing or of another size, and for a changed vocabulary, with
    which the model would write nonsense. Changed settings may be intended: notify is called for each.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return
    try:
        digests = known_digests(folder)
    except VerifyError as error:
        notify(f"{error.message}: nothing could be compared with it")
        return
    for name, known in digests.files.items():
        file, vocabulary = folder / name, _is_one_of(name, _VOCABULARIES)
        weights = name.endswith(WEIGHT_SUFFIXES)
        if not (weights or vocabulary or _is_one_of(name, _SETTINGS)):
            continue
        if not file.is_file():
            fault = "is missing"
        elif weights:
            size = file.stat().st_size
            fault = "" if size == known.nbytes else f"has {size} bytes, and the manifest says {known.nbytes}"
        else:
            fault = difference(file, known, digests.origin)
        if fault and weights:
            raise SourceError(f"{folder}: {name} {fault}", _AGAIN)
        if fault and vocabulary:
            raise SourceError(
                f"{folder}: {name} is not the tokenizer that this checkpoint was converted with: it {fault}",
                "Restore the source's tokenizer, or convert again with the one you want",
            )
        if fault:
            notify(f"{name} {fault}")


def _digests(folder: Path) -> Digests:
    try:
        return known_digests(folder)
    except VerifyError as error:
        raise SourceError(error.message, error.hint) from error


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
