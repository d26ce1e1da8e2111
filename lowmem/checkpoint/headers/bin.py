"""Headers of pickle shards (`pytorch_model*.bin`), from the zip directory and the pickle; needs no torch.

> data.pkl:  {"h.0.w": _rebuild_tensor_v2(("storage", HalfStorage, "0", "cpu", 39321600), 0, (6400, 6144), …
> data/0:    the storage's bytes
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowmem.checkpoint.files.reading import one_line
from lowmem.checkpoint.headers.tensor_pickle import BinTensor, NeedsCodeError, describe, follow_pickle
from lowmem.errors import SourceError

MAX_PICKLE = MAX_DIRECTORY = 8 * 2**20
"""Bytes of a pickle and of a zip directory; those of a 10 GB shard are a few tens of KB long."""
_AGAIN = "Download or copy it again"


@dataclass(frozen=True)
class Archive:
    """The zip directory of a shard: the entry of its pickle, and the bytes of every entry by name."""

    path: Path
    pickle: zipfile.ZipInfo
    sizes: Mapping[str, int]

    def storage_size(self, key: str) -> int | None:
        """Bytes of the storage `key`, or None without such an entry."""
        return self.sizes.get(f"{self.pickle.filename.removesuffix('data.pkl')}data/{key}")


class _Bounded(io.FileIO):
    """A file that refuses to read more at once than a directory or a pickle may be long."""

    def read(self, size: int | None = -1, /) -> bytes:
        rest = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        size = rest if size is None or size < 0 else min(size, rest)
        if size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory is larger than {MAX_DIRECTORY} bytes")
        return super().read(size) or b""


# What zipfile raises for a damaged directory.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    ValueError,
    NotImplementedError,
    EOFError,
    RuntimeError,
    struct.error,
    OverflowError,
)


def check_archive(path: Path) -> Archive:
    """The checked directory of a zip that torch.save wrote.

    Raises SourceError for a truncated or damaged archive, for compressed entries (torch never writes them;
    they could unpack to any size) and for the old format, which cannot be mapped.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            magic = stream.read(4)
        if size == 0:
            raise SourceError(f"{path.name} is empty (0 bytes)", _AGAIN)
        if magic != b"PK\x03\x04":
            if magic[:1] == b"\x80":  # a bare pickle: torch before 1.6
                raise SourceError(
                    f"{path.name} is in torch's old format, which cannot be read piece by piece",
                    "If it fits in memory: torch.load(weights_only=True), then torch.save",
                )
            raise SourceError(f"{path.name} is not a file that torch.save wrote", _AGAIN)
        with _Bounded(path, "rb") as bounded, zipfile.ZipFile(bounded) as archive:
            entries = archive.infolist()
    except _ZIP_ERRORS as error:
        raise SourceError(f"{path.name} is truncated or damaged: {one_line(error)}", _AGAIN) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise SourceError(f"{path.name} has compressed entries, which torch.save does not write", _AGAIN)
        if entry.header_offset + entry.file_size > size:
            raise SourceError(
                f"{path.name} is truncated: entry {entry.filename[:200]!r} ends after the file", _AGAIN
            )
    pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
        raise SourceError(f"{path.name} is not a file that torch.save wrote", _AGAIN)
    return Archive(path, pickles[0], {entry.filename: entry.file_size for entry in entries})


def read_bin_header(path: Path) -> dict[str, BinTensor]:
    """Every tensor of a shard by name, from its zip directory and pickle; no storage is read.

    Raises SourceError if the shard is not a flat dictionary of plain tensors inside their storages.
    """
    archive = check_archive(path)
    try:
        with _Bounded(path, "rb") as stream, zipfile.ZipFile(stream) as zipped:
            data = zipped.read(archive.pickle)
    except _ZIP_ERRORS as error:
        raise SourceError(f"{path.name} is damaged: {one_line(error)}", _AGAIN) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        loaded = follow_pickle(data)
    except NeedsCodeError as error:
        raise SourceError(
            f"{path.name} cannot be read without running its code, or is damaged; no code was run",
            "Use a safetensors copy of the checkpoint",
        ) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise SourceError(f"{path.name} is damaged: {one_line(error)}", _AGAIN) from error
    if not isinstance(loaded, dict):
        raise SourceError(f"{path.name} holds {describe(loaded)}, not a dictionary of tensors")
    for name, tensor in loaded.items():
        if not isinstance(tensor, BinTensor):
            raise SourceError(f"{path.name}: entry {name[:200]!r} is {describe(tensor)}, not a tensor")
        if not _is_in_file(tensor, archive):
            raise SourceError(
                f"{path.name}: tensor {name!r} of shape {list(tensor.shape)} is not in the file"
            )
    return loaded


def _is_in_file(tensor: BinTensor, archive: Archive) -> bool:
    """Whether the storage is a zip entry of its size, and holds each element of the tensor once.

    A stride of 0 would let a few bytes claim any shape.
    """
    if archive.storage_size(tensor.key) != tensor.storage_nbytes or tensor.nbytes > tensor.storage_nbytes:
        return False
    if 0 in tensor.shape:
        return True
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    return (last + 1) * tensor.itemsize <= tensor.storage_nbytes


@dataclass(frozen=True)
class BinHeader:
    """A checked shard: its tensors by name."""

    path: Path
    tensors: Mapping[str, BinTensor]


def read_bin_shard(path: Path) -> BinHeader:
    """As `read_bin_header`, with the file beside the tensors."""
    return BinHeader(path, read_bin_header(path))
