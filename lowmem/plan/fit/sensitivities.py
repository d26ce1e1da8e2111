"""The sensitivities of a model: what each linear adds to its KL divergence, kept with the source's digest.

> $LOWMEM_CACHE/sensitivities/1a2b3c…-4d5e6f….json

The first part of the name belongs to the weights, the second to the text. One measurement serves every
budget. Needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.checkpoint.cache import cache_root
from lowmem.checkpoint.files.reading import read_json, update_with_bytes, update_with_sample
from lowmem.checkpoint.files.whole import write_json
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.headers.folder import tensor_headers
from lowmem.config import GROUP_SIZES
from lowmem.errors import LowmemError, OutputError, SourceError

VERSION = 1
"""Raised by every change to what is measured."""
WIDTHS = (2, 3, 4, 5, 6, 8)
ASYM_WIDTHS = (2, 3, 4)
"""Widths at which zero-points of their own are worth trying; above them both kinds are equal."""
ASYM_MARGIN = 1.02
"""Zero-points must save more than 2 %: fewer readers take them, and the estimate is noisy."""
OPTIONS = tuple(
    LinearFormat(bits, group, sym)
    for bits in WIDTHS
    for group in GROUP_SIZES
    for sym in (True, False)
    if sym or bits in ASYM_WIDTHS
)
"""How a linear may be stored."""
OF_ROUNDING = {2: 1.0, 3: 0.77, 4: 0.70, 5: 0.655, 6: 0.655, 8: 0.655}
"""GPTQ's part of the error of rounding to nearest in whitened coordinates, by width: it refines integers and
scales together, and later linears correct part of the error of earlier ones. Measured as the KL divergence of
uniform conversions of tiny-starchat over the sum of its sensitivities."""


@dataclass(frozen=True)
class Sensitivities:
    """What each linear adds to the model's KL divergence, by the way in which it is stored."""

    source: str
    """`weights_digest` of the unquantized checkpoint."""
    tokens: str
    """The digest of the token rows that were measured."""
    rises: Mapping[str, tuple[float, ...]]
    """By the linear's full name, in nats a token, in the order of OPTIONS; infinity where the group size does
    not divide the inputs. Without OF_ROUNDING."""
    linears: Mapping[str, tuple[int, int]]
    """(inputs, outputs) by the linear's full name."""
    seconds: float = 0.0
    """What the measurement took."""

    def predicted(self, linear: str, option: int) -> float:
        """The rise of the KL divergence, in nats a token, when GPTQ stores a linear as OPTIONS[option]."""
        format = OPTIONS[option]
        return self.rises[linear][option] * OF_ROUNDING[format.bits] * (1 if format.sym else ASYM_MARGIN)

    def at_four_bits(self, linear: str) -> float:
        """The same at 4 bits, in the largest groups that divide the linear's inputs."""
        four = [i for i, option in enumerate(OPTIONS) if option.bits == 4 and option.sym]
        return max((v for i in four if math.isfinite(v := self.predicted(linear, i))), default=math.inf)

    def as_json(self) -> dict[str, Any]:
        """The content of the file; the inverse of `from_json`."""
        return {
            "version": VERSION,
            "source": self.source,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "options": [[o.bits, o.group_size, o.sym] for o in OPTIONS],
            "linears": {name: list(sizes) for name, sizes in self.linears.items()},
            "rises": {
                name: [value if math.isfinite(value) else None for value in values]
                for name, values in self.rises.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sensitivities | None:
        """The sensitivities in a file; None if it is damaged, or of another version."""
        try:
            options = [LinearFormat(bits, group, sym) for bits, group, sym in data["options"]]
            if data["version"] != VERSION or options != list(OPTIONS):
                return None
            rises = {
                str(name): tuple(math.inf if v is None else float(v) for v in values)
                for name, values in data["rises"].items()
            }
            linears = {str(name): (int(sizes[0]), int(sizes[1])) for name, sizes in data["linears"].items()}
            if linears.keys() != rises.keys() or any(min(sizes) < 1 for sizes in linears.values()):
                return None
            if any(len(v) != len(OPTIONS) or not all(x >= 0 for x in v) for v in rises.values()):
                return None
            return cls(str(data["source"]), str(data["tokens"]), rises, linears, float(data["seconds"]))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return None


def weights_digest(path: Path) -> str:
    """A sha256 that changes with the weights and the config of a folder or file; cheap at any size.

    Covers config.json, the names, shapes and dtypes of the tensors, and a sample of each file's bytes. Raises
    SourceError for a checkpoint that cannot be read.
    """
    digest = hashlib.sha256()
    folder = path if path.is_dir() else path.parent
    try:
        if (folder / "config.json").is_file():
            update_with_bytes(digest, "config.json", (folder / "config.json").read_bytes())
        headers = tensor_headers(path)
        for name in sorted(headers):
            header = headers[name]
            update_with_bytes(digest, name, repr((header.shape, header.dtype)).encode())
        for file in sorted({header.file for header in headers.values()}):
            update_with_sample(digest, folder / file)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def kept_file(source: str, tokens: str) -> Path:
    """The file in lowmem's cache for the digests of the weights and of the token rows."""
    return cache_root() / "sensitivities" / f"{source[:24]}-{tokens[:8]}.json"


def read_kept(source: str, tokens: str | None = None) -> Sensitivities | None:
    """The sensitivities measured earlier for these weights; None without them.

    tokens: the digest of the token rows; None takes the last measurement on any text.
    """
    with contextlib.suppress(LowmemError, OSError):
        files = (
            [kept_file(source, tokens)]
            if tokens
            else list(kept_file(source, "").parent.glob(f"{source[:24]}-*.json"))
        )
        for file in sorted(files, key=os.path.getmtime, reverse=True):
            found = Sensitivities.from_json(read_json(file))
            if found and found.source == source and tokens in (None, found.tokens):
                return found
    return None


def keep(found: Sensitivities) -> Path:
    """Write sensitivities into lowmem's cache. Raises OutputError when that fails."""
    file = kept_file(found.source, found.tokens)
    make_folder(file.parent)
    write_json(file, found.as_json())
    return file


def make_folder(folder: Path) -> None:
    """Create a folder of lowmem's cache. Raises OutputError when that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache {cache_root()} cannot be written: {error.strerror or error}",
            "Set LOWMEM_CACHE to a writable folder",
        ) from error
