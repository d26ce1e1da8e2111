"""The head and the embedding of a checkpoint by its headers, and whether they hold the same values.

Needs no torch. The check is a sample, which is enough for a plan; `Source.same_values` compares everything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lowmem.checkpoint.headers.folder import TensorHeader

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("wte.weight", "embed_tokens.weight", "token_embd.weight", "embed_in.weight")
_PIECES = 64
_PIECE_BYTES = 4096


def own_heads(folder: Path, headers: Mapping[str, TensorHeader]) -> set[str]:
    """The heads whose stored values differ from the embedding's, by a sample of 64 pieces of 4 KiB.

    A head whose place in its file is not known, as in a pickle shard, counts as a copy.
    """
    embedding = next((header for name, header in headers.items() if name.endswith(EMBEDDINGS)), None)
    if embedding is None:
        return set()
    return {n for n, h in headers.items() if n.endswith(HEADS) and not _alike(folder, h, embedding)}


def _alike(folder: Path, one: TensorHeader, other: TensorHeader) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if one.begin is None or other.begin is None:
        return True
    last = max(0, one.nbytes - _PIECE_BYTES)
    places = sorted({last * piece // (_PIECES - 1) for piece in range(_PIECES)})
    first = [_read(folder / one.file, one.begin + place) for place in places]
    return first == [_read(folder / other.file, other.begin + place) for place in places]


def _read(path: Path, begin: int) -> bytes:
    with path.open("rb", buffering=0) as stream:
        stream.seek(begin, os.SEEK_SET)
        return stream.read(_PIECE_BYTES)
