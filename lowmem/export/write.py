"""Write tensors as one GGUF file: staged, a slice of a tensor at a time, and read back as it grows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from lowmem.checkpoint.dequantize import PackedWeight, dequantize, slices
from lowmem.checkpoint.files.whole import staged, staged_path
from lowmem.checkpoint.headers.gguf import read_gguf_header
from lowmem.checkpoint.source.base import Source
from lowmem.config import SLICE_WEIGHTS
from lowmem.errors import OutputError
from lowmem.export.blocks import Bytes, LinearEncoder, decode, encode_dense
from lowmem.export.tensors import Stored
from lowmem.platform import system

_ALIGNMENT = 32
"""Of tensors in the file: gguf's default."""


@dataclass
class Loss:
    """What tensors of one kind lost when they were rounded to a smaller type."""

    what: str
    """The tensors, and the type they are stored in."""
    tensors: set[str] = field(default_factory=set)
    """Their names in the file."""
    largest: float = 0.0
    """The largest difference of a weight."""
    squares: float = 0.0
    """Of all differences."""
    energy: float = 0.0
    """The squares of all weights."""

    def add(self, tensor: str, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Count the weights of a slice of a tensor."""
        self.tensors.add(tensor)
        difference = (expected - found).abs()
        self.largest = max(self.largest, float(difference.max()))
        self.squares += float(difference.double().square().sum())
        self.energy += float(expected.double().square().sum())

    @property
    def relative(self) -> float:
        """The root mean square of the differences, as a share of that of the weights."""
        return (self.squares / self.energy) ** 0.5 if self.energy else 0.0


@dataclass(frozen=True)
class Header:
    """What stands before the tensors."""

    architecture: str
    """llama.cpp's name."""
    add_keys: Callable[[Any], None]
    """Adds every key to gguf's writer."""


def write_file(
    out: Path, source: Source, plan: Sequence[Stored], header: Header, progress: Callable[[int], None]
) -> list[Loss]:
    """Write the tensors of a plan, whole or not at all; what they lost by rounding.

    progress: the bytes that were written since the last call. Raises OutputError where the file cannot be
    written, or holds other weights than it was given when it is read back.
    """
    losses: dict[str, Loss] = {}
    starts: dict[str, int] = {}
    with staged(out) as stream:
        _write_header(staged_path(out), plan, header)
        stream.seek(0, os.SEEK_END)
        for stored in plan:
            starts[stored.name] = _pad(stream)
            for expected, data in pieces(source, stored):
                begin = stream.tell()
                stream.write(data.data)
                stream.flush()
                read = system.read_at(stream.fileno(), data.nbytes, begin)
                found = decode(read, stored.kind, tuple(expected.shape))
                _compare(stored, expected, found, losses)
                progress(data.nbytes)
            source.release()
        _pad(stream)
        stream.flush()
        _check_header(staged_path(out), plan, starts)
    return list(losses.values())


def _write_header(part: Path, plan: Sequence[Stored], header: Header) -> None:
    """Write keys and tensor descriptions to `part` with gguf's own writer."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(part, header.architecture)
    header.add_keys(writer)
    for stored in plan:
        kind = gguf.GGMLQuantizationType[stored.kind]
        # The dtype is only asked for the size of an element, which the type has.
        writer.add_tensor_info(stored.name, stored.shape, np.dtype(np.float16), stored.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _pad(stream: IO[bytes]) -> int:
    """Fill up to the next aligned position, which is returned."""
    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
    return stream.tell()


def pieces(source: Source, stored: Stored) -> Iterator[tuple[torch.Tensor, Bytes]]:
    """A tensor in slices of rows: the float32 weights of the checkpoint, and their bytes in the file."""
    linear = source.packed_name(stored.source) if stored.grid else None
    if linear is not None:
        yield from _packed_pieces(source.packed(linear), stored)
        return
    if stored.values is not None or len(stored.shape) == 1:
        values = source.read(stored.source) if stored.values is None else stored.values
        values = values if stored.order is None else values[stored.order]
        yield values.float(), encode_dense(values, stored.kind)
        return
    rows, columns = stored.shape
    step = max(1, SLICE_WEIGHTS // columns)
    whole = None if source.reads_rows else source.read(stored.source)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        chosen: Any = slice(start, stop) if stored.order is None else stored.order[start:stop]
        part = source.read(stored.source, chosen) if whole is None else whole[chosen]
        yield part.float(), encode_dense(part, stored.kind)


def _packed_pieces(packed: PackedWeight, stored: Stored) -> Iterator[tuple[torch.Tensor, Bytes]]:
    encoder = LinearEncoder(packed, stored.kind) if stored.grid and stored.grid.block_type else None
    for outputs, weight in _weights(packed, stored.order):
        yield weight, encoder.encode(outputs) if encoder else encode_dense(weight, stored.kind)


def _weights(packed: PackedWeight, order: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs in the order of the file, int64, and their dequantized rows, float32 [outputs, in]."""
    if order is None:
        for start, part in slices(packed):
            yield torch.arange(start, start + part.shape[1]), part.T
        return
    weight = dequantize(packed)
    for outputs in order.split(max(1, SLICE_WEIGHTS // weight.shape[1])):
        yield outputs, weight[outputs]


def _compare(stored: Stored, expected: torch.Tensor, found: torch.Tensor, losses: dict[str, Loss]) -> None:
    """Hold what was read back to the checkpoint's weights; count a loss where the type rounds."""
    if torch.equal(expected, found):
        return
    if not stored.rounded:
        raise OutputError(
            f"{stored.name} was read back from the file with other weights than the checkpoint's",
            "The disk or the memory of this machine is faulty: check both, and export again",
        )
    losses.setdefault(stored.rounded, Loss(stored.rounded)).add(stored.name, expected, found)


def _check_header(part: Path, plan: Sequence[Stored], starts: dict[str, int]) -> None:
    """Raise OutputError unless lowmem's own reader finds every tensor where it was written."""
    tensors = read_gguf_header(part).tensors
    for stored in plan:
        found = tensors[stored.name]
        place = (found.begin, found.nbytes, found.shape, found.type_name)
        if place != (starts[stored.name], stored.nbytes, stored.shape, stored.kind):
            raise OutputError(
                f"the header of {part.name} does not place {stored.name!r} where it is",
                "Report this, with the versions of lowmem and gguf",
            )
