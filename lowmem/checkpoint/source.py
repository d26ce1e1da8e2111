"""The checkpoint to convert, whatever it is: a folder, a file or a hub id becomes one lazy `Source`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from lowmem.checkpoint.bin_shards import BinShard, BinSource, read_shard_header
from lowmem.checkpoint.files import is_plain_name, read_json
from lowmem.checkpoint.gguf_file import is_gguf
from lowmem.checkpoint.gguf_source import GgufSource
from lowmem.checkpoint.hub import download, is_hub_id
from lowmem.checkpoint.safetensors_file import SafetensorsHeader, SafetensorsSource, read_header
from lowmem.checkpoint.source_base import Source, TensorInfo, read_config
from lowmem.errors import SourceError

__all__ = ["Source", "TensorInfo", "head_is_tied", "open_source", "resolve_names"]

_COMPARE_BYTES = 16 * 2**20
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def open_source(
    source: str,
    revision: str | None = None,
    offline: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Source:
    """Open a checkpoint for lazy reading; only headers are read.

    source: a folder with safetensors or .bin shards or one GGUF, a .safetensors or .gguf file, or a
    hub id `owner/name` (downloaded; `revision` and `offline` are for that). What exists here is
    local, whatever it looks like. progress: called with a line of text while a download goes on.
    Raises SourceError for everything that cannot be read, naming the file and tensor at fault.
    """
    display = str(source)
    path = Path(display).expanduser()
    try:
        found = bool(display) and path.exists()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        found = False
    if found:
        return _open_folder(path, display) if path.is_dir() else _open_file(path, display)
    if is_hub_id(display):
        return _open_folder(download(display, revision, offline, progress), display)
    raise SourceError(
        f"{display!r} does not exist", "Give a folder, a .safetensors or .gguf file, or owner/name"
    )


def _open_file(path: Path, display: str) -> Source:
    if not path.is_file():
        raise SourceError(f"{display} is neither a file nor a folder")
    if path.stat().st_size == 0:
        raise SourceError(f"{display} is empty (0 bytes)", "Download or copy it again")
    if path.suffix == ".gguf" or is_gguf(path):
        return GgufSource(path, display)
    if path.suffix == ".safetensors":
        read_config(path.parent)
        header = read_header(path)
        return SafetensorsSource(path.parent, display, dict.fromkeys(header.tensors, header))
    raise SourceError(
        f"{display} is no checkpoint that can be read",
        "Give a folder, a .safetensors file or a .gguf file",
    )


def _open_folder(folder: Path, display: str) -> Source:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise SourceError(f"{display} cannot be read: {error.strerror or error}") from error
    index, bin_index = "model.safetensors.index.json", "pytorch_model.bin.index.json"
    safetensors = [name for name in names if name.endswith(".safetensors")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if index in names:
        read_config(folder)
        return SafetensorsSource(folder, display, _files_of_index(folder, index, read_header))
    if safetensors:
        read_config(folder)
        return SafetensorsSource(folder, display, _files_without_index(folder, safetensors))
    if bin_index in names:
        read_config(folder)
        shards = _files_of_index(folder, bin_index, read_shard_header)
        return BinSource(folder, display, shards)
    if "pytorch_model.bin" in names:
        read_config(folder)
        shard = read_shard_header(folder / "pytorch_model.bin")
        return BinSource(folder, display, dict.fromkeys(shard.tensors, shard))
    if len(ggufs) == 1:
        return GgufSource(folder / ggufs[0], display)
    if ggufs:
        raise SourceError(
            f"{display} holds {len(ggufs)} GGUF files", f"Give one of them, such as {folder / ggufs[0]}"
        )
    raise SourceError(
        f"{display} holds no weights: no safetensors, no pytorch_model.bin and no .gguf",
        "Give the folder that the model was downloaded to",
    )


S = TypeVar("S", SafetensorsHeader, BinShard)


def _files_of_index(folder: Path, index: str, read: Callable[[Path], S]) -> dict[str, S]:
    """Tensor name → header of the shard that the index names, all of them checked to be there."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{folder / index} has no weight_map")
    headers: dict[str, S] = {}
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise SourceError(
                f"{folder / index} puts tensor {name[:1024]!r} in {str(file)[:200]!r}, "
                "which is not a plain file name"
            )
        if file not in headers:
            if not (folder / file).is_file():
                raise SourceError(
                    f"{folder} has no {file}, which {index} names for tensor {name[:1024]!r}",
                    "Download the checkpoint again: a download that was cut off goes on where it stopped",
                )
            headers[file] = read(folder / file)
        if name not in headers[file].tensors:
            raise SourceError(f"{file} does not hold tensor {name[:1024]!r}, which {index} says is there")
    return {name: headers[file] for name, file in weight_map.items()}


def _files_without_index(folder: Path, names: list[str]) -> dict[str, SafetensorsHeader]:
    """Tensor name → header when the names alone say which files make the checkpoint."""
    if "model.safetensors" in names:
        names = ["model.safetensors"]
    if len(names) > 1 or _NUMBERED.fullmatch(names[0]):
        # Without an index, a complete numbered set is as clear: model-00001-of-00003.safetensors, …
        matches = [_NUMBERED.fullmatch(name) for name in names]
        first = matches[0]
        if first is None or {m and (m[1], m[3]) for m in matches} != {(first[1], first[3])}:
            raise SourceError(
                f"{folder} holds {len(names)} safetensors files and no index to say which belong together",
                "Add model.safetensors.index.json, or give one file",
            )
        count = int(first[3])
        present = {int(m[2]) for m in matches if m}
        missing = next((number for number in range(1, count + 1) if number not in present), None)
        if missing is not None:
            raise SourceError(
                f"{folder} has no {first[1]}-{missing:05}-of-{first[3]}.safetensors", "Download the rest"
            )
    files: dict[str, SafetensorsHeader] = {}
    for file in names:
        header = read_header(folder / file)
        for name in header.tensors:
            if name in files:
                raise SourceError(f"tensor {name!r} is both in {files[name].path.name} and in {file}")
            files[name] = header
    return files


def resolve_names(infos: Mapping[str, TensorInfo], expected: Iterable[str]) -> dict[str, str]:
    """Map a model's state-dict names to the names under which a checkpoint stores them.

    Copes with one base-model prefix that is missing (`h.0.ln_1.bias` for `transformer.h.0.ln_1.bias`)
    or extra (`model.lm_head.weight`), the same for all names, except where only the plain name is stored.
    Raises SourceError naming the first expected tensor that the checkpoint lacks.
    """
    names = list(expected)
    best: dict[str, str] = {}
    for drop, add in _prefixes(infos, names):
        found = {}
        for name in names:
            bare = name[len(drop) :] if name.startswith(drop) else name
            # The head lies outside the base model and may be stored without its prefix.
            stored = add + bare if add + bare in infos else name
            if stored in infos:
                found[name] = stored
        # Two names of the model for one tensor of the checkpoint is no mapping.
        if len(set(found.values())) == len(found) > len(best):
            best = found
        if len(best) == len(names):
            return best
    missing = next(name for name in names if name not in best)
    raise SourceError(
        f"the checkpoint holds no tensor {missing!r}",
        "It is not whole, or of another architecture than its config",
    )


def _prefixes(infos: Mapping[str, TensorInfo], names: list[str]) -> list[tuple[str, str]]:
    """(prefix to drop, prefix to add) pairs worth trying: none first, then the most frequent."""
    wanted = set(names)
    extra: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for stored in infos:
        for prefix, rest in _splits(stored):
            if rest in wanted:
                extra[prefix] += 1
    for name in names:
        for prefix, rest in _splits(name):
            if rest in infos:
                missing[prefix] += 1
    drops = [(prefix, "") for prefix, _ in missing.most_common(4)]
    adds = [("", prefix) for prefix, _ in extra.most_common(4)]
    return [("", ""), *drops, *adds]


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """("a.", "b.c"), ("a.b.", "c") of "a.b.c"; at most 8, for names are anyone's."""
    position = 0
    for _ in range(8):
        position = name.find(".", position) + 1
        if not position:
            return
        yield name[:position], name[position:]


def head_is_tied(source: Source, embedding_name: str, head_name: str) -> bool:
    """True when the output head is the input embedding: not stored, or stored with the same bytes.

    The names are stored ones (see `resolve_names`). Compares in chunks of rows, 16 MiB of each at a
    time. Raises SourceError when the embedding is missing, or the head is although the config says
    that the two are not tied.
    """
    embedding, head = source.infos.get(embedding_name), source.infos.get(head_name)
    if embedding is None:
        raise SourceError(f"{source.display} holds no tensor {embedding_name!r}")
    if head is None:
        if source.config().tie_word_embeddings is False:
            raise SourceError(
                f"{source.display} holds no tensor {head_name!r}, and its config does not tie the head",
                "Use a checkpoint of the whole language model",
            )
        return True
    if head.shape != embedding.shape or head.dtype != embedding.dtype or len(head.shape) != 2:
        return False
    row_bytes = max(1, embedding.nbytes // max(1, embedding.shape[0]))
    step = max(1, _COMPARE_BYTES // row_bytes)
    for start in range(0, embedding.shape[0], step):
        rows = slice(start, start + step)
        # As bytes: a NaN equals itself, and -0 differs from 0.
        one = source.read(embedding_name, rows).view(torch.uint8)
        if not torch.equal(one, source.read(head_name, rows).view(torch.uint8)):
            return False
    return True
