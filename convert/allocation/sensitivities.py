"""The sensitivities of a model's linears: predicted rises of the KL divergence, kept with the source's digest.

> $LOWMEM_CACHE/sensitivities/1a2b3c….json

One measurement serves every budget. Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.checkpoint.cache import cache_root
from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.files.whole import write_json
from lowmem.checkpoint.formats import LinearFormat
from lowmem.errors import LowmemError

VERSION = 1
"""Raised by every change to what is measured."""
WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (128, 64, 32)
ASYM_WIDTHS = (2, 3, 4)
"""Widths at which zero-points of their own are worth trying; above them both kinds are equal."""
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
    """The fingerprint of the unquantized checkpoint."""
    tokens: str
    """The digest of the token rows that were measured."""
    rises: Mapping[str, tuple[float, ...]]
    """By the linear's full name, in nats a token, in the order of OPTIONS; infinity where the group size does
    not divide the inputs. Without OF_ROUNDING."""
    seconds: float = 0.0
    """What the measurement took."""

    def predicted(self, linear: str, option: int) -> float:
        """The rise of the KL divergence, in nats a token, when GPTQ stores a linear as OPTIONS[option]."""
        return self.rises[linear][option] * OF_ROUNDING[OPTIONS[option].bits]

    def as_json(self) -> dict[str, Any]:
        """The content of the file; the inverse of `from_json`."""
        return {
            "version": VERSION,
            "source": self.source,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "options": [[o.bits, o.group_size, o.sym] for o in OPTIONS],
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
            if any(len(v) != len(OPTIONS) or not all(x >= 0 for x in v) for v in rises.values()):
                return None
            return cls(str(data["source"]), str(data["tokens"]), rises, float(data["seconds"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def kept_file(source: str) -> Path:
    """The file in lowmem's cache for a source's fingerprint."""
    return cache_root() / "sensitivities" / f"{source[:32]}.json"


def read_kept(source: str) -> Sensitivities | None:
    """The sensitivities measured earlier for the source with this fingerprint; None without them."""
    try:
        found = Sensitivities.from_json(read_json(kept_file(source)))
    except LowmemError:
        return None
    return found if found and found.source == source else None


def keep(found: Sensitivities) -> Path:
    """Write sensitivities into lowmem's cache. Raises OutputError when that fails."""
    file = kept_file(found.source)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found.as_json())
    return file


def digest_text(found: Sensitivities) -> str:
    """The content as one line, for digests."""
    return json.dumps(found.as_json() | {"seconds": 0}, sort_keys=True)
