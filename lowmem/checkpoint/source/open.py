"""The checkpoint to convert, whatever it is: a folder, a file or a hub id becomes one lazy `Source`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from lowmem.checkpoint.files.reading import is_hub_id
from lowmem.checkpoint.headers.folder import headers_by_name, layout_of
from lowmem.checkpoint.headers.gguf import is_gguf
from lowmem.checkpoint.source.base import Source, TensorInfo, read_config
from lowmem.checkpoint.source.bin import BinSource, read_shard_header
from lowmem.checkpoint.source.gguf import GgufSource
from lowmem.checkpoint.source.hub import download
from lowmem.checkpoint.source.safetensors import SafetensorsSource, read_header
from lowmem.errors import SourceError

__all__ = ["Source", "TensorInfo", "head_is_tied", "open_source", "resolve_names"]

_COMPARE_BYTES = 16 * 2**20


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
    layout = layout_of(folder, display)
    if layout.kind == "gguf":
        return GgufSource(folder / layout.files[0], display)
    read_config(folder)
    if layout.kind == "bin":
        return BinSource(folder, display, headers_by_name(folder, layout, read_shard_header))
    return SafetensorsSource(folder, display, headers_by_name(folder, layout, read_header))


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
