"""The bits that the converter chose for each linear of a folder, for the record of a measurement."""

from __future__ import annotations

import math
from pathlib import Path

from lowmem.benchmarks.common.records import Allocated, AllocatedLinear

from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.manifest import REPORT_FILE
from lowmem.errors import LowmemError


def read_allocated(folder: Path) -> Allocated | None:
    """The allocation in the folder's report.

    None for a folder that was not made for a size, or whose report is damaged: figures about the folder do
    not depend on it.
    """
    try:
        found = read_json(folder / REPORT_FILE).get("allocation")
        if not isinstance(found, dict) or not isinstance(found["linears"], dict):
            return None
        return Allocated(
            _text(found["made_for"]),
            _number(found["predicted_kld"]),
            tuple(_linear(name, one) for name, one in found["linears"].items()),
        )
    except (LowmemError, KeyError, TypeError, ValueError):
        return None


def _linear(name: str, found: dict[str, object]) -> AllocatedLinear:
    bits, group_size, sym = found["bits"], found["group_size"], found["sym"]
    if type(bits) is not int or type(group_size) is not int or type(sym) is not bool:
        raise TypeError(f"{name} has no format")
    return AllocatedLinear(
        _text(name), bits, group_size, sym, _number(found["predicted_kld"]), _number(found["sensitivity"])
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r} is no text")
    return value


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < 1e30 or math.isnan(value):
        raise ValueError(f"{value!r} is not a divergence")
    return float(value)
