"""Bounded, exact reads of untrusted files.

Every length comes from the file's real size, or is checked against it before anything is allocated. Errors
are `SourceError`s that name the file. Only functions that fill a tensor import torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lowmem.checkpoint.files.links import check_file
from lowmem.errors import SourceError

if TYPE_CHECKING:
    import torch

MAX_JSON = 100_000_000
MAX_VALUES = 2_000_000
"""Values in one JSON text; each takes about a hundred bytes of memory. The largest indexes have 100,000."""
CHUNK = 65536
SPREAD_CHUNKS = 64


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's text, printable and short enough for a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 100 MB.

    Raises SourceError if the file is not such an object, or is a link that leads out of its folder (see
    links.py).
    """
    check_file(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_JSON + 1)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_JSON:
        raise SourceError(
            f"{path} is larger than {MAX_JSON} bytes, too large for a JSON file of a checkpoint"
        )
    value = parse_json(data, str(path))
    if not isinstance(value, dict):
        raise SourceError(f"{path} should hold a JSON object, and holds {type(value).__name__}")
    return value


def about_values(data: bytes) -> int:
    """An estimate of the number of values in a JSON text."""
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def parse_json(data: bytes, what: str) -> Any:
    """Decode UTF-8 JSON in which no object has a duplicate key.

    Raises SourceError naming `what` if the text is not such JSON or has more than MAX_VALUES values, which
    would take far more memory than it has bytes.
    """
    if about_values(data) > MAX_VALUES:
        raise SourceError(
            f"{what} holds more than {MAX_VALUES} values, too many for a JSON file of a checkpoint"
        )
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object_of_unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError: bad encoding, or bad JSON
        raise SourceError(f"{what} is not valid JSON: {one_line(error)}") from error


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def is_plain_name(name: object) -> bool:
    """Whether this is the name of a file in the folder: no path separators, no control characters."""
    return (
        isinstance(name, str)
        and bool(re.fullmatch(r"[^/\\:\x00-\x1f]{1,255}", name))
        and name not in (".", "..")
    )


def is_hub_id(text: str) -> bool:
    """Whether this is of the form `owner/name`."""
    return bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*", text))


def read_exact(stream: BinaryIO, offset: int, out: torch.Tensor, what: str) -> None:
    """Fill the contiguous CPU tensor `out` with the file's bytes from `offset`.

    Reads straight into the tensor's memory, without a map or a second copy. Raises SourceError naming `what`
    when the file is too short.
    """
    import torch

    size = out.numel() * out.element_size()
    if not size:
        return
    buffer: Any = out.view(-1).view(torch.uint8).numpy()
    view = memoryview(buffer)
    try:
        stream.seek(offset)
        done = 0
        while done < size:  # one readinto gives at most 2 GiB on Linux
            got = stream.readinto(view[done:])  # type: ignore[attr-defined]
            if not got:
                raise SourceError(
                    f"{what} is truncated: {size} bytes should start at {offset}, only {done} were read"
                )
            done += got
    except OSError as error:
        raise SourceError(f"{what} cannot be read: {error.strerror or error}") from error


def row_numbers(rows: slice | torch.Tensor, count: int) -> range | list[int]:
    """The rows that `rows` selects out of `count`; raises IndexError when one is out of range."""
    if isinstance(rows, slice):
        return range(*rows.indices(count))
    numbers = [int(row) for row in rows.tolist()]
    for row in numbers:
        if not 0 <= row < count:
            raise IndexError(f"row {row} of {count}")
    return numbers


def runs(numbers: range | list[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive rows, each for one read: (position in the result, first row, rows)."""
    if isinstance(numbers, range) and numbers.step == 1:
        if len(numbers):
            yield 0, numbers[0], len(numbers)
        return
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield start, numbers[start], i - start
            start = i


def update_with_bytes(digest: hashlib._Hash, label: str, data: bytes) -> None:
    """Add labelled, length-prefixed bytes, so that different lists of files give different streams."""
    digest.update(f"{label}\0{len(data)}\0".encode())
    digest.update(data)


def update_with_sample(digest: hashlib._Hash, path: Path) -> None:
    """Add a file's size, its first and last 64 KiB, and 64 evenly spaced chunks of 64 KiB (4 MiB in all).

    A smaller file is read whole.
    """
    size = path.stat().st_size
    last = size - CHUNK
    offsets: list[int]
    if size <= (SPREAD_CHUNKS + 2) * CHUNK:
        offsets = list(range(0, size, CHUNK))
    else:
        spread = [last * (i + 1) // (SPREAD_CHUNKS + 1) for i in range(SPREAD_CHUNKS)]
        offsets = [0, *spread, last]
    digest.update(f"size\0{size}\0".encode())
    with path.open("rb") as stream:
        for offset in offsets:
            stream.seek(offset)
            digest.update(stream.read(CHUNK))
