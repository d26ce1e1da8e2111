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

from lowmem.checkpoint.files.reading import one_line, row_numbers
from lowmem.checkpoint.headers.bin import MAX_PICKLE, check_archive
from lowmem.checkpoint.source.base import Source, TensorInfo, check_readable, check_rows
from lowmem.errors import SourceError

# Pages that were copied out stay resident while their shard is mapped: map anew after this much.
REMAP_BYTES = 256 * 2**20
_AGAIN = "Download or copy it again"


@dataclass(frozen=True)
class BinShard:
    """What a shard's zip directory and pickle say: nothing else of it was read."""

    path: Path
    tensors: Mapping[str, TensorInfo]


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    """The mapped tensors of a shard, each checked to lie inside the file.

    SourceError for anything but a flat dictionary of plain CPU tensors.
    """
    entry_sizes = set(check_archive(path).sizes.values())
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
            entry = check_archive(path).pickle
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
