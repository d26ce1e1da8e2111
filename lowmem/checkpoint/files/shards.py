"""The safetensors files of a folder by their headers: which tensor lies where, and what is wrong there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem.checkpoint.files.pointers import HINT, WHAT, is_pointer
from lowmem.checkpoint.files.reading import is_plain_name, read_json
from lowmem.checkpoint.headers.safetensors import SafetensorsHeader, StoredTensor, read_header
from lowmem.checkpoint.source.safetensors import read_tensor
from lowmem.errors import LowmemError, printable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the file (or "" for the whole checkpoint), the tensor (or ""), and what."""

    file: str
    tensor: str
    what: str

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.tensor) if part)
        return printable(f"{where}: {self.what}" if where else self.what)


@dataclass(frozen=True)
class Shards:
    """The safetensors files of a folder by their headers.

    tensors: each name's header. promised: the file that the index names for each tensor (empty without
    an index). problems: of the index and the headers.
    """

    tensors: dict[str, SafetensorsHeader]
    promised: dict[str, str]
    problems: tuple[Problem, ...]

    def stored(self, name: str) -> StoredTensor:
        """Shape, dtype and place of a tensor. Raises KeyError for an unknown name."""
        return self.tensors[name].tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its stored dtype; SourceError when the file ends before."""
        header = self.tensors[name]
        return read_tensor(header.path, name, header.tensors[name])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.end - stored.begin for stored in map(self.stored, self.tensors))


def read_shards(folder: Path) -> Shards:
    """The headers of model.safetensors, or of the shards that the index names; nothing is raised."""
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
                problems.append(Problem(file, name, f"is in this file, but not so in {INDEX_FILE}"))
            else:
                tensors[name] = header
    for name, file in promised.items():
        if name not in tensors and file not in broken:
            problems.append(Problem(file, name, f"is promised by {INDEX_FILE} and not there"))
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
                file.name, name, f"lies in {str(shard)[:80]!r}, which is no name of a file here"
            )
    return weight_map, None
