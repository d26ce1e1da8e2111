"""Names, shapes, dtypes and bytes of a checkpoint's tensors, from headers alone; needs no torch.

No weights are read, so this takes milliseconds at any size. Which files of a folder are the checkpoint is
decided here for all readers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lowmem.checkpoint.files.links import check_folder
from lowmem.checkpoint.files.patterns import WEIGHT_SUFFIXES
from lowmem.checkpoint.files.pointers import check_no_pointer
from lowmem.checkpoint.files.reading import is_plain_name, read_json
from lowmem.checkpoint.foreign import check_disguise, other_weights
from lowmem.checkpoint.headers.bin import BinHeader, read_bin_shard
from lowmem.checkpoint.headers.config import read_config
from lowmem.checkpoint.headers.gguf import GgufHeader, check_whole_model, is_gguf, read_gguf_header
from lowmem.checkpoint.headers.safetensors import SafetensorsHeader, read_header
from lowmem.errors import ForeignError, SourceError
from lowmem.platform import system

_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin|pt)")


@dataclass(frozen=True)
class TensorHeader:
    """A stored tensor."""

    name: str
    shape: tuple[int, ...]
    """In torch's order."""
    dtype: str
    """As torch spells it ("float16"); of a GGUF tensor the name of its ggml type ("F16", "Q4_1")."""
    nbytes: int
    """Of its data on disk."""
    file: str
    """Name of the file inside the folder."""
    begin: int | None = None
    """First byte of its data in the file; None where that is not one piece of plain bytes."""


@dataclass(frozen=True)
class Layout:
    """Which files of a folder are the checkpoint."""

    kind: str
    """"safetensors", "bin" or "gguf"."""
    index: str
    """Name of the index that lists the shards, or ""."""
    files: tuple[str, ...]
    """Names of the weight files, if there is no index."""


class _Shard(Protocol):
    """The header of a shard, as a reader returns it."""

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, Any]: ...


S = TypeVar("S", bound=_Shard)


def tensor_headers(path: str | Path) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint by its stored name.

    path: a folder with safetensors or .bin shards or one GGUF, or a .safetensors or .gguf file. Raises
    SourceError for a file that is missing, truncated, or contradicts its header.
    """
    path = system.extended(Path(path))
    if os.path.isfile(path):
        return _headers_of_file(path)
    layout = layout_of(path, str(path))
    if layout.kind == "gguf":
        return _gguf_headers(path / layout.files[0])
    if layout.kind == "bin":
        bins = headers_by_name(path, layout, read_bin_shard)
        return {name: _of_bin(name, bins[name]) for name in bins}
    shards = headers_by_name(path, layout, read_header)
    return {name: _of_safetensors(name, shards[name]) for name in shards}


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The config.json of a checkpoint's folder (or beside a weight file), quantized or not.

    Raises SourceError when it is missing, is not a JSON object, or has sizes that no model has.
    """
    folder = system.extended(Path(path))
    if os.path.isfile(folder):
        folder = folder.parent
    file = folder / "config.json"
    if not os.path.isfile(file):
        raise SourceError(
            f"{folder} has no config.json", "Give the folder that holds the model's config and weights"
        )
    return read_config(file)


def gguf_metadata(path: str | Path) -> dict[str, object]:
    """The keys of a GGUF (a file, or a folder with one) that hold a number, a boolean or a string.

    Arrays, such as the vocabulary, are left out. Raises SourceError for a file that is truncated
    or contradicts its header.
    """
    path = system.extended(Path(path))
    if not os.path.isfile(path):
        layout = layout_of(path, str(path))
        if layout.kind != "gguf":
            raise SourceError(f"{path} is a checkpoint of {layout.kind} files, not a GGUF")
        path = path / layout.files[0]
    return dict(_read_gguf(path).values)


def layout_of(folder: Path, display: str) -> Layout:
    """Which files of `folder` are its checkpoint, by their names alone.

    display: the folder's name in messages. Raises SourceError when there are no weights, when the names do
    not tell which files belong together, or when a file is a link that leads out of the folder.
    """
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except (FileNotFoundError, ValueError) as error:  # ValueError: a zero byte in the name
        raise SourceError(
            f"{display!r} does not exist", "Give a folder, a .safetensors or .gguf file"
        ) from error
    except OSError as error:
        raise SourceError(f"{display} cannot be read: {error.strerror or error}") from error
    check_folder(folder)
    ggufs = [name for name in names if name.endswith(".gguf")]
    for kind in ("safetensors", "bin"):
        if index := _index(names, kind):
            return Layout(kind, index, ())
        if found := _weight_files(names, kind):
            named = _named_file(folder) if len(found) > 1 else ""
            return Layout(kind, "", (named,) if named in found else tuple(found))
    if len(ggufs) == 1:
        check_no_pointer(folder / ggufs[0])
        return Layout("gguf", "", (ggufs[0],))
    if ggufs:
        raise SourceError(
            f"{display} holds {len(ggufs)} GGUF files", f"Give one of them, such as {folder / ggufs[0]}"
        )
    for name in names:
        if name.endswith(WEIGHT_SUFFIXES):
            check_disguise(folder / name)
    if others := other_weights(names):
        raise ForeignError(
            f"{display} holds {others}", "Use the model's safetensors or pytorch_model.bin files"
        )
    raise SourceError(
        f"{display} holds no weights: no safetensors, no pytorch_model.bin and no .gguf",
        "Give the folder that the model was downloaded to",
    )


def names_in_index(folder: Path) -> list[str]:
    """The tensors that an index beside config.json lists, whether or not its shards are there.

    Empty without an index, and for one that cannot be read: that is reported when the shards are.
    """
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    index = _index(files, "safetensors") or _index(files, "bin")
    try:
        listed = read_json(folder / index).get("weight_map") if index else None
    except SourceError:
        return []
    return list(listed) if isinstance(listed, dict) else []


def _index(names: list[str], kind: str) -> str:
    """The index of the shards, as "model.safetensors.index.json"; "" without one, or with several others."""
    usual = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}[kind]
    found = [name for name in names if name.endswith(f".{kind}.index.json")]
    return usual if usual in found else found[0] if len(found) == 1 else ""


def _named_file(folder: Path) -> str:
    """The weight file that auto-gptq's quantize_config.json names; "" without it."""
    file = folder / "quantize_config.json"
    name = read_json(file).get("model_file_base_name") if file.is_file() else None
    return f"{name}.safetensors" if isinstance(name, str) else ""


def _weight_files(names: list[str], kind: str) -> list[str]:
    """The weight files of a folder without an index."""
    if kind == "safetensors":
        return [name for name in names if name.endswith(".safetensors")]
    if "pytorch_model.bin" in names:
        return ["pytorch_model.bin"]
    # auto-gptq and GPTQ-for-LLaMa: gptq_model-4bit-128g.bin, llama-7b-4bit-128g.pt
    return [name for name in names if re.fullmatch(r".*\d ?-?bit.*\.(bin|pt)|gptq_model.*\.bin", name)]


def headers_by_name(folder: Path, layout: Layout, read: Callable[[Path], S]) -> dict[str, S]:
    """Map each tensor name to the header of its shard; `read` is called once for each shard.

    Raises SourceError for a shard or a tensor that is missing, or stored twice.
    """

    def read_file(path: Path) -> S:
        check_no_pointer(path)
        check_disguise(path)
        return read(path)

    if layout.index:
        return _files_of_index(folder, layout.index, read_file)
    return _files_without_index(folder, list(layout.files), read_file)


def _files_of_index(folder: Path, index: str, read: Callable[[Path], S]) -> dict[str, S]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{folder / index} has no weight_map")
    headers: dict[str, S] = {}
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise SourceError(
                f"{folder / index} maps tensor {name[:1024]!r} to {str(file)[:200]!r}, "
                "which is not the name of a file in the same folder"
            )
        if file not in headers:
            if not (folder / file).is_file():
                raise SourceError(
                    f"{folder} has no {file}, which {index} names for tensor {name[:1024]!r}",
                    "Download the checkpoint again: an interrupted download resumes",
                )
            headers[file] = read(folder / file)
        if name not in headers[file].tensors:
            raise SourceError(f"{file} does not hold tensor {name[:1024]!r}, which {index} lists")
    return {name: headers[file] for name, file in weight_map.items()}


def _files_without_index(folder: Path, names: list[str], read: Callable[[Path], S]) -> dict[str, S]:
    """As `headers_by_name`, for a folder without an index."""
    if "model.safetensors" in names:
        names = ["model.safetensors"]
    numbered = [_NUMBERED.fullmatch(name) for name in names]
    if len(names) > 1 or numbered[0]:
        # Without an index a complete numbered set will do: model-00001-of-00003.safetensors, …
        first = numbered[0]
        if first is None or {m and (m[1], m[3]) for m in numbered} != {(first[1], first[3])}:
            raise SourceError(
                f"{folder} holds {len(names)} weight files and no index to say which belong together",
                f"Add model.safetensors.index.json, or give one file, such as {folder / names[0]}",
            )
        count = int(first[3])
        present = {int(m[2]) for m in numbered if m}
        missing = next((number for number in range(1, count + 1) if number not in present), None)
        if missing is not None:
            raise SourceError(
                f"{folder} has no {first[1]}-{missing:05}-of-{first[3]}.{first[4]}", "Download the rest"
            )
    files: dict[str, S] = {}
    for file in names:
        header = read(folder / file)
        for name in header.tensors:
            if name in files:
                raise SourceError(f"tensor {name!r} is both in {files[name].path.name} and in {file}")
            files[name] = header
    return files


def _headers_of_file(path: Path) -> dict[str, TensorHeader]:
    if path.suffix == ".gguf" or is_gguf(path):
        return _gguf_headers(path)
    if path.suffix == ".safetensors":
        header = read_header(path)
        return {name: _of_safetensors(name, header) for name in header.tensors}
    check_disguise(path)
    raise SourceError(
        f"{path} is not a checkpoint that can be read", "Give a folder, a .safetensors file or a .gguf file"
    )


def _of_bin(name: str, header: BinHeader) -> TensorHeader:
    stored = header.tensors[name]
    return TensorHeader(name, stored.shape, stored.dtype, stored.nbytes, header.path.name)


def _of_safetensors(name: str, header: SafetensorsHeader) -> TensorHeader:
    stored = header.tensors[name]
    nbytes = stored.end - stored.begin
    return TensorHeader(name, stored.shape, stored.dtype_name, nbytes, header.path.name, stored.begin)


def _read_gguf(path: Path) -> GgufHeader:
    header = read_gguf_header(path)
    check_whole_model(header)
    return header


def _gguf_headers(path: Path) -> dict[str, TensorHeader]:
    tensors = _read_gguf(path).tensors.values()
    return {t.name: TensorHeader(t.name, t.shape, t.type_name, t.nbytes, path.name) for t in tensors}
