"""The safetensors files of a folder by their headers: where each tensor is, and every problem found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem.checkpoint.files.pointers import HINT, WHAT, is_pointer
from lowmem.checkpoint.files.reading import is_plain_name, read_json
from lowmem.checkpoint.headers.safetensors import SafetensorsHeader, StoredTensor, read_header
from lowmem.checkpoint.source.base import TensorInfo
from lowmem.checkpoint.source.safetensors import read_tensor
from lowmem.errors import LowmemError, printable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Problem:
    """A problem in a checkpoint."""

    file: str
    """"" for the whole checkpoint."""
    tensor: str
    """"" for the whole file."""
    what: str
    """Follows file and tensor in a message."""

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.tensor) if part)
        return printable(f"{where}: {self.what}" if where else self.what)


@dataclass(frozen=True)
class Shards:
    """The safetensors files of a folder by their headers."""

    tensors: dict[str, SafetensorsHeader]
    """Each tensor's name → the header of its file."""
    promised: dict[str, str]
    """Each tensor's name → the file that the index names for it; empty without an index."""
    problems: tuple[Problem, ...]
    """Of the index and the headers."""

    def stored(self, name: str) -> StoredTensor:
        """Shape, dtype and offsets of a tensor; raises KeyError for an unknown name."""
        return self.tensors[name].tensors[name]

    def header(self, name: str) -> TensorInfo:
        """The same as readers of the tensor see it, with its file."""
        stored = self.stored(name)
        return TensorInfo(stored.shape, stored.dtype_name, self.tensors[name].path.name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its stored dtype; raises SourceError when the file is too short."""
        header = self.tensors[name]
        return read_tensor(header.path, name, header.tensors[name])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.end - stored.begin for stored in map(self.stored, self.tensors))


def read_shards(folder: Path) -> Shards:
    """The headers of model.safetensors, or of the shards in the index; problems are collected, not raised."""
    problems: list[Problem] = []
    promised: dict[str, str] = {}
    if (folder / INDEX_FILE).is_file():
        promised, fault = _read_index(folder / INDEX_FILE)
        problems += [fault] if fault else []
        files = sorted(set(promised.values()))
    else:
        files = [SINGLE_FILE]
    tensors: dict[str, SafetensorsHeader] = {}
    broken = set()
    for file in files:
        if not (folder / file).is_file():
            problems.append(Problem(file, "", "the file is missing"))
            broken.add(file)
            continue
        if is_pointer(folder / file):
            problems.append(Problem(file, "", f"{WHAT} ({HINT})"))
            broken.add(file)
            continue
        try:
            header = read_header(folder / file)
        except LowmemError as error:
            problems.append(Problem(file, "", error.message))
            broken.add(file)
            continue
        for name in header.tensors:
            if name in tensors:
                problems.append(Problem(file, name, f"is in {tensors[name].path.name} as well"))
            elif promised and promised.get(name) != file:
                problems.append(Problem(file, name, f"is in this file, but not according to {INDEX_FILE}"))
            else:
                tensors[name] = header
    for name, file in promised.items():
        if name not in tensors and file not in broken:
            problems.append(Problem(file, name, f"is listed in {INDEX_FILE}, and is missing"))
    return Shards(tensors, promised, tuple(problems))


def _read_index(file: Path) -> tuple[dict[str, str], Problem | None]:
    try:
        weight_map = read_json(file).get("weight_map")
    except LowmemError as error:
        return {}, Problem(file.name, "", error.message)
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, Problem(file.name, "", "has no weight_map")
    for name, shard in weight_map.items():
        if not is_plain_name(shard):
            return {}, Problem(
                file.name,
                name,
                f"is in {str(shard)[:80]!r}, which is not the name of a file in the same folder",
            )
    return weight_map, None
