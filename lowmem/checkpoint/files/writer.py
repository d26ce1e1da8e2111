"""Writing safetensors files, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem.checkpoint.files.shards import INDEX_FILE
from lowmem.checkpoint.files.whole import FileDigest, write_json, write_whole
from lowmem.checkpoint.headers.safetensors import DTYPE_NAMES, StoredTensor, read_header
from lowmem.errors import OutputError

CHUNK = 8 << 20
_CODES = {getattr(torch, name): code for code, (name, _) in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """Name, dtype and shape of a tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def _header(plans: Sequence[TensorPlan]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for plan in plans:
        end = position + plan.nbytes
        entries[plan.name] = {
            "dtype": _CODES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a CPU tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy().data)


def write_tensors(path: Path, plans: Sequence[TensorPlan], read: Callable[[str], torch.Tensor]) -> FileDigest:
    """Write one safetensors file; `read` is called for one tensor at a time."""

    def chunks() -> Iterator[bytes | memoryview]:
        yield _header(plans)
        for plan in plans:
            tensor = read(plan.name)
            if tensor.dtype != plan.dtype or tuple(tensor.shape) != plan.shape:
                raise ValueError(f"{plan.name} is {tensor.dtype} {tuple(tensor.shape)}, planned as {plan}")
            yield tensor_bytes(tensor)

    return write_whole(path, chunks())


def _stored_chunks(path: Path, tensor: StoredTensor) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(tensor.begin)
        left = tensor.end - tensor.begin
        while left:
            data = stream.read(min(CHUNK, left))
            if not data:
                raise OutputError(f"{path} became shorter while it was read", "Start again with --force")
            left -= len(data)
            yield data


def merge(staged: Sequence[Path], folder: Path, shard_bytes: int) -> dict[str, FileDigest]:
    """Merge the staged files, in order, into the shards of one checkpoint in `folder`, with an index.

    A shard holds at most `shard_bytes`, unless a single tensor is larger. Bytes are copied unchanged, a chunk
    at a time.
    """
    located: list[tuple[TensorPlan, Path, StoredTensor]] = []
    for path in staged:
        for name, stored in sorted(read_header(path).tensors.items(), key=lambda item: item[1].begin):
            located.append((TensorPlan(name, stored.dtype, stored.shape), path, stored))
    shards: list[list[tuple[TensorPlan, Path, StoredTensor]]] = [[]]
    filled = 0
    for item in located:
        size = item[0].nbytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    written: dict[str, FileDigest] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"

        def chunks(
            shard: list[tuple[TensorPlan, Path, StoredTensor]] = shard,
        ) -> Iterator[bytes | memoryview]:
            yield _header([plan for plan, _, _ in shard])
            for _, path, stored in shard:
                yield from _stored_chunks(path, stored)

        written[name] = write_whole(folder / name, chunks())
        weight_map.update({plan.name: name for plan, _, _ in shard})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(plan.nbytes for plan, _, _ in located)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        written[INDEX_FILE] = write_json(folder / INDEX_FILE, index)
    return written
