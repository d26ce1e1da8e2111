"""Pickle shards (`pytorch_model*.bin`), as StarChat Alpha is published.

Only ever `torch.load(mmap=True, weights_only=True)`: the restricted unpickler runs no code of the
file, and the map reads nothing but the pickle until a tensor is copied out. At most one shard is
mapped at a time.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem.checkpoint.files import one_line, row_numbers
from lowmem.checkpoint.source_base import Source, TensorInfo, check_readable, check_rows
from lowmem.errors import SourceError

MAX_PICKLE = 256 * 2**20  # the pickle of a 10 GB shard is a few tens of KB
# Pages that were copied out stay resident while their shard is mapped: map anew after this much.
REMAP_BYTES = 256 * 2**20
_AGAIN = "Download or copy it again"


@dataclass(frozen=True)
class BinShard:
    """What a shard's zip directory and pickle say: nothing else of it was read."""

    path: Path
    tensors: Mapping[str, TensorInfo]


def check_archive(path: Path) -> tuple[zipfile.ZipInfo, set[int]]:
    """The pickle's entry and the sizes of all entries, of a zip that torch.save wrote.

    SourceError for a truncated or damaged archive, for compressed entries (torch never writes
    them; they could unpack to any size) and for the old format that cannot be mapped.
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
                    "Where it fits in memory, torch.load(weights_only=True) it and torch.save it again",
                )
            raise SourceError(f"{path.name} is not a file that torch.save wrote", _AGAIN)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise SourceError(f"{path.name} is truncated or damaged: {one_line(error)}", _AGAIN) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise SourceError(f"{path.name} has compressed entries, which torch.save does not write", _AGAIN)
        if entry.header_offset + entry.file_size > size:
            raise SourceError(
                f"{path.name} is truncated: entry {entry.filename!r} ends after the file", _AGAIN
            )
    pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
        raise SourceError(f"{path.name} is not a file that torch.save wrote", _AGAIN)
    return pickles[0], {entry.file_size for entry in entries}


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    """The mapped tensors of a shard, each checked to lie inside the file.

    SourceError for anything but a flat dictionary of plain CPU tensors.
    """
    _, entry_sizes = check_archive(path)
    size = path.stat().st_size
    try:
        loaded = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{path.name} needs code to be run to be read, or is damaged; nothing of it was run",
            "Use a safetensors copy of the checkpoint",
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        if "map" in str(error).lower() and "memory" in str(error).lower():
            raise SourceError(
                f"{path.name} ({size} bytes) cannot be mapped: the system has less memory than the shard",
                "Add swap, or use a safetensors copy of the checkpoint",
            ) from error
        raise SourceError(f"{path.name} is damaged: {one_line(error)}", _AGAIN) from error
    if not isinstance(loaded, dict):
        raise SourceError(f"{path.name} holds {type(loaded).__name__}, not a dictionary of tensors")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise SourceError(f"{path.name}: entry {str(name)[:200]!r} is {type(tensor).__name__}, no tensor")
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.device.type != "cpu":
            raise SourceError(f"{path.name}: tensor {name!r} is not a plain tensor")
        # A stride of 0 would let a few bytes claim any shape; a storage may run into its neighbour.
        if (
            tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
            or tensor.untyped_storage().nbytes() not in entry_sizes
        ):
            raise SourceError(
                f"{path.name}: tensor {name!r} of shape {list(tensor.shape)} is not in the file"
            )
        tensors[name] = tensor.detach()
    return tensors


def read_shard_header(path: Path) -> BinShard:
    """Shapes and dtypes of a shard's tensors; it is mapped only while this runs."""
    infos = {}
    for name, tensor in load_shard(path).items():
        dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
        infos[name] = TensorInfo(tuple(tensor.shape), str(dtype).removeprefix("torch."), path.name)
    return BinShard(path, infos)


class BinSource(Source):
    """A folder of pickle shards; `files` maps each tensor's name to its shard."""

    kind = "bin"

    def __init__(self, path: Path, display: str, files: Mapping[str, BinShard]) -> None:
        super().__init__(path, display, {name: shard.tensors[name] for name, shard in files.items()})
        self._paths = {name: shard.path for name, shard in files.items()}
        self._mapped: Path | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._copied = 0

    def read(self, name: str, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        """See Source.read."""
        info = self.infos[name]
        check_readable(name, info)
        path = self._paths[name]
        if self._mapped != path or self._copied > REMAP_BYTES:
            self.release()  # before the next map: never two at once
            self._tensors, self._mapped = load_shard(path), path
        stored = self._tensors.get(name)
        if stored is None or tuple(stored.shape) != info.shape:
            raise SourceError(f"{path.name}: tensor {name!r} changed while it was read")
        if rows is None:
            tensor = stored
        else:
            check_rows(name, info)
            if isinstance(rows, slice) and (rows.step is None or rows.step > 0):
                tensor = stored[rows]
            else:
                tensor = stored[torch.tensor(list(row_numbers(rows, info.shape[0])), dtype=torch.int64)]
        self._copied += tensor.numel() * tensor.element_size()
        if tensor.dtype == torch.float64:
            return tensor.to(torch.float32, memory_format=torch.contiguous_format)
        return tensor.clone(memory_format=torch.contiguous_format)

    def read_overhead(self, numel: int) -> int:
        """See Source.read_overhead; the mapped pages of the shard count until `release`."""
        return REMAP_BYTES + 8 * numel

    def release(self) -> None:
        """Unmap the shard."""
        self._tensors, self._mapped, self._copied = {}, None, 0

    def shards(self) -> list[tuple[Path, bytes]]:
        """See Source.shards: the pickle and the zip directory, whose checksums cover every tensor."""
        result = []
        for path in sorted(set(self._paths.values()), key=lambda path: path.name):
            entry, _ = check_archive(path)
            try:
                with zipfile.ZipFile(path) as archive:
                    start = archive.start_dir
                    header = archive.read(entry)
                with path.open("rb") as stream:
                    stream.seek(max(start, os.path.getsize(path) - MAX_PICKLE))
                    header += stream.read(MAX_PICKLE)
            except (zipfile.BadZipFile, ValueError, EOFError) as error:
                raise SourceError(f"{path.name} is damaged: {one_line(error)}", _AGAIN) from error
            result.append((path, header))
        return result
