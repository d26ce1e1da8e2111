"""The hidden states between two decoder layers: always in a file, and in memory if they fit.

An interrupted job resumes from the bytes of the file. Where the memory budget is too small for a copy, chunks
are read from the file with plain reads, because a mapped file would count as memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lowmem.checkpoint.files.whole import write_whole
from lowmem.checkpoint.files.writer import tensor_bytes
from lowmem.checkpoint.values import all_finite
from lowmem.errors import CalibrationError, OutputError


class HiddenStates:
    """Hidden states [rows, row_length, hidden] at the input of one decoder layer."""

    def __init__(
        self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, kept: torch.Tensor | None
    ) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self._kept = kept

    @classmethod
    def create(
        cls,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        chunks: Iterator[torch.Tensor],
        *,
        keep: bool,
    ) -> HiddenStates:
        """Write chunks [rows, row_length, hidden] to `path`; keep: keep a copy in memory."""
        kept = torch.empty(shape, dtype=dtype) if keep else None
        _write(path, chunks, kept, where="after the embedding")
        return cls(path, shape, dtype, kept)

    @classmethod
    def reopen(
        cls, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, *, keep: bool
    ) -> HiddenStates:
        """The hidden states that an interrupted job left. Raises OutputError if the file is damaged."""
        states = cls(path, shape, dtype, None)
        size = shape[0] * states._row_bytes
        if not path.is_file() or path.stat().st_size != size:
            raise OutputError(
                f"{path} of the unfinished job is missing or damaged", "Start again with --force"
            )
        if keep:
            states._kept = states.read(0, shape[0])
        return states

    @property
    def _row_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def read(self, start: int, end: int) -> torch.Tensor:
        """Rows start..end, [end - start, row_length, hidden]."""
        if self._kept is not None:
            return self._kept[start:end]
        return read_rows(self.path, start, end, self.shape[1:], self.dtype)

    def chunks(self, rows: int) -> Iterator[torch.Tensor]:
        """All rows, `rows` at a time."""
        for start in range(0, self.shape[0], rows):
            yield self.read(start, min(start + rows, self.shape[0]))

    def advance(
        self, path: Path, rows: int, layer: Callable[[torch.Tensor], torch.Tensor], where: str
    ) -> HiddenStates:
        """Write the output of `layer` for every chunk to `path`: the next layer's hidden states.

        A copy in memory is overwritten in place, since each row is needed once. where: for the message of the
        CalibrationError that is raised for values that are not finite.
        """
        _write(path, (layer(chunk) for chunk in self.chunks(rows)), self._kept, where)
        return HiddenStates(path, self.shape, self.dtype, self._kept)

    def delete(self) -> None:
        """Remove the file, once a later layer's is on disk."""
        self.path.unlink(missing_ok=True)


def read_rows(path: Path, start: int, end: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Rows start..end of a file whose rows have `shape`: [end - start, *shape], in new memory."""
    rows = torch.empty((end - start, *shape), dtype=dtype)
    view = tensor_bytes(rows)
    with path.open("rb", buffering=0) as stream:
        stream.seek(start * math.prod(shape) * dtype.itemsize)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise OutputError(f"{path} became shorter while it was read", "Start again with --force")
            done += count
    return rows


def _write(path: Path, chunks: Iterator[torch.Tensor], kept: torch.Tensor | None, where: str) -> None:
    def encode() -> Iterator[memoryview]:
        start = 0
        for chunk in chunks:
            if not all_finite(chunk):
                raise CalibrationError(
                    f"the activations are not finite {where}",
                    "The source's weights may be damaged, or overflow: try --compute-dtype float32",
                )
            if kept is not None:
                kept[start : start + chunk.shape[0]] = chunk
                start += chunk.shape[0]
            yield tensor_bytes(chunk)

    write_whole(path, encode())
