"""Pickle shards (`pytorch_model*.bin`) as a source; StarChat Alpha is published so.

They are only loaded with `torch.load(mmap=True, weights_only=True)`: the restricted unpickler runs no code of
the file, and nothing but the pickle is read until a tensor is copied out. At most one shard is mapped at a
time.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowmem.checkpoint.files.reading import one_line, row_numbers
from lowmem.checkpoint.formats import QuantizationFormat
from lowmem.checkpoint.headers.bin import MAX_PICKLE, BinHeader, check_archive, read_bin_header
from lowmem.checkpoint.source.base import ByteRange, Source, TensorInfo
from lowmem.errors import SourceError

REMAP_BYTES = 256 * 2**20
"""A shard is mapped again after this much was copied out of it: the pages stay resident until then."""
_LOCAL_HEADER = 1024
"""Bytes of a zip entry's own header, padding included: PyTorch aligns the data to 64 bytes."""
_AGAIN = "Download or copy it again"


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    """The mapped tensors of a shard, each checked to be inside the file.

    Raises SourceError if the shard is not a flat dictionary of plain CPU tensors.
    """
    entry_sizes = set(check_archive(path).sizes.values())
    size = path.stat().st_size
    try:
        loaded = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{path.name} cannot be read without running its code, or is damaged; no code was run",
            "Use a safetensors copy of the checkpoint",
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # each opcode of a damaged pickle fails in its own way
        if "map" in str(error).lower() and "memory" in str(error).lower():
            raise SourceError(
                f"{path.name} ({size} bytes) cannot be mapped: the file is larger than the system's memory",
                "Add swap, or use a safetensors copy of the checkpoint",
            ) from error
        raise SourceError(f"{path.name} is damaged: {one_line(error)}", _AGAIN) from error
    if not isinstance(loaded, dict):
        raise SourceError(f"{path.name} holds {type(loaded).__name__}, not a dictionary of tensors")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise SourceError(
                f"{path.name}: entry {str(name)[:200]!r} is {type(tensor).__name__}, not a tensor"
            )
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


class BinSource(Source):
    """A folder of pickle shards."""

    _kind = "bin"

    def __init__(
        self,
        path: Path,
        display: str,
        headers: Mapping[str, BinHeader],
        config_json: Mapping[str, Any],
        format: QuantizationFormat | None = None,
    ) -> None:
        """headers: each tensor's name → its shard."""
        infos = {}
        for name, header in headers.items():
            stored = header.tensors[name]
            dtype = "float32" if stored.dtype == "float64" else stored.dtype
            infos[name] = TensorInfo(stored.shape, dtype, header.path.name)
        super().__init__(path, display, infos, config_json, format)
        self._paths = {name: header.path for name, header in headers.items()}
        self._mapped: Path | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._copied = 0

    def _read(self, name: str, rows: slice | torch.Tensor | None) -> torch.Tensor:
        """See Source.read."""
        info = self._check_read(name, rows)
        path = self._paths[name]
        self._map_shard(path)
        stored = self._tensors.get(name)
        if stored is None or tuple(stored.shape) != info.shape:
            raise SourceError(f"{path.name}: tensor {name!r} changed while it was read")
        if rows is None:
            tensor = stored
        elif isinstance(rows, slice) and (rows.step is None or rows.step > 0):
            tensor = stored[rows]
        else:
            tensor = stored[torch.tensor(list(row_numbers(rows, info.shape[0])), dtype=torch.int64)]
        self._copied += tensor.numel() * tensor.element_size()
        if tensor.dtype == torch.float64:
            return tensor.to(torch.float32, memory_format=torch.contiguous_format)
        return tensor.clone(memory_format=torch.contiguous_format)

    def _map_shard(self, path: Path) -> None:
        if self._mapped != path or self._copied > REMAP_BYTES:
            self.release()  # before the next map: never two at once
            self._tensors, self._mapped = load_shard(path), path

    def same_values(self, one: str, other: str) -> bool:
        """See Source.same_values; torch.save writes a tied head once, as another view of its storage."""
        if self._paths[one] == self._paths[other]:
            self._map_shard(self._paths[one])
            first, second = self._tensors.get(one), self._tensors.get(other)
            if first is not None and second is not None and _is_same_view(first, second):
                return True
        return super().same_values(one, other)

    def read_overhead(self, numel: int) -> int:
        """See Source.read_overhead; the mapped pages of the shard count until `release`."""
        return REMAP_BYTES + 8 * numel

    def release(self) -> None:
        """Unmap the shard."""
        self._tensors, self._mapped, self._copied = {}, None, 0

    def shards(self) -> list[tuple[Path, bytes]]:
        """See Source.shards. A shard's header is its pickle followed by its zip directory.

        The zip directory holds a checksum of every tensor.
        """
        result = []
        for path in self.checksummed_shards():
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

    def checksummed_shards(self) -> list[Path]:
        """See Source.checksummed_shards: all shards, since each is a zip with checksums."""
        return sorted(set(self._paths.values()), key=lambda path: path.name)

    def _byte_ranges(self, stored: list[str]) -> list[ByteRange]:
        found: list[ByteRange] = []
        for path in {self._paths[name]: None for name in stored}:
            tensors = read_bin_header(path)
            with zipfile.ZipFile(path) as archive:
                entries = {entry.filename.rpartition("/data/")[2]: entry for entry in archive.infolist()}
            for name in stored:
                if self._paths[name] == path:
                    entry = entries[tensors[name].key]
                    found.append(ByteRange(path, entry.header_offset, entry.file_size + _LOCAL_HEADER))
        return found


def _is_same_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same elements of the same storage."""
    if one.data_ptr() != other.data_ptr() or one.dtype != other.dtype:
        return False
    return one.shape == other.shape and one.stride() == other.stride()
