"""Hostile folders: each case has a name, a valid checkpoint, and a change to a copy of it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lowmem.checkpoint.headers.safetensors import read_header

INDEX = "model.safetensors.index.json"
DEEP = "[" * 200_000
MANY = "{}," * 3_000_000
"""Each number takes about a hundred bytes of memory once parsed."""


@dataclass(frozen=True)
class Case:
    """A change to a copy of the seed `base`, made by change(folder). `outside_of(folder)` must not be read.

    harmless: commands that may succeed, because they do not use the changed part.
    """

    name: str
    base: str
    change: Callable[[Path], Any]
    harmless: tuple[str, ...] = ()


CASES: list[Case] = []
ALL = ("plan", "verify", "run", "convert")


def case(name: str, base: str, harmless: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Decorator: add the function, which changes the folder, as a case."""

    def add_it(change: Callable[[Path], None]) -> Callable[[Path], None]:
        add(name, base, change, harmless)
        return change

    return add_it


def add(name: str, base: str, change: Callable[[Path], Any], harmless: tuple[str, ...] = ()) -> None:
    """A case."""
    CASES.append(Case(name, base, change, harmless))


def tensors(
    name: str, base: str, change: Callable[[dict[str, torch.Tensor]], Any], harmless: tuple[str, ...] = ()
) -> None:
    """Add a case that adds or replaces the tensors returned by `change`."""
    add(name, base, lambda f: edit_tensors(f, lambda found: found.update(change(dict(found)))), harmless)


# ---- changes to files


def outside_of(folder: Path) -> Path:
    """The folder that no command may read. It is not beside the model, where versions of it are looked
    for."""
    return folder.parent.parent / "outside"


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def config(name: str, base: str, harmless: tuple[str, ...] = (), **changes: Any) -> None:
    """Add a case that changes keys of config.json."""
    add(name, base, lambda f: edit_json(f / "config.json", **changes), harmless)


def quantization(name: str, harmless: tuple[str, ...] = (), **changes: Any) -> None:
    """Add a case that changes keys of quantization_config."""

    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_json(folder / "config.json", quantization_config={**found, **changes})

    add(name, "packed", change, harmless)


def tokenizer_config(name: str, harmless: tuple[str, ...] = (), base: str = "source", **changes: Any) -> None:
    """Add a case that changes keys of tokenizer_config.json."""
    add(name, base, lambda f: edit_json(f / "tokenizer_config.json", **changes), harmless)


def text(name: str, base: str, file: str, content: str | bytes, harmless: tuple[str, ...] = ()) -> None:
    """Add a case that replaces the content of a file."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    add(name, base, lambda f: (f / file).write_bytes(data), harmless)


def edit_header(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Rewrite the header of a safetensors file and keep the data."""
    blob = path.read_bytes()
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:end])
    data = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + blob[end:])


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Read all safetensors files, change the dictionary of tensors, and write one file."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
        path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")


def grow(folder: Path, name: str, shape: list[int], dtype: str, itemsize: int) -> None:
    """Give a tensor any size; its bytes are a hole in the file."""
    edit_tensors(folder, lambda tensors: None)
    path = folder / "model.safetensors"

    def change(header: dict[str, Any]) -> dict[str, Any]:
        header.pop(name, None)
        order = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        end, moved = 0, {}
        for n in order:
            begin, stop = header[n]["data_offsets"]
            moved[n] = {**header[n], "data_offsets": [end, end + stop - begin]}
            end += stop - begin
        size = itemsize
        for dim in shape:
            size *= dim
        moved[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        return moved

    edit_header(path, change)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    length = int.from_bytes(path.read_bytes()[:8], "little")
    os.truncate(path, 8 + length + max(entry["data_offsets"][1] for entry in header.values()))
    read_header(path)


def first_shard(folder: Path) -> Path:
    """The first shard by name."""
    return min(path for path in folder.iterdir() if "00001-of" in path.name)


def move_outside(folder: Path, name: str, *, away: str = "") -> None:
    """Move a file to the folder outside, and leave a link to it."""
    target = outside_of(folder) / (away or name)
    target.parent.mkdir(exist_ok=True)
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


def index_entry(folder: Path, **changes: Any) -> None:
    """Set entries of the index."""
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | changes}))
