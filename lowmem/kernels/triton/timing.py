"""Time our kernels on the user's card, once for each shape of linear; the cache's file remembers the fastest.

`LOWMEM_CACHE/kernels.json` has a `Choice` for each card, version of the kernels, format and shape. Without a
card to time on, the usual choice is used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from lowmem.cards.find import cards_of, is_card, is_timed
from lowmem.checkpoint.cache import cache_root
from lowmem.checkpoint.files.whole import write_json
from lowmem.errors import OutputError
from lowmem.kernels.card_timing import product_seconds
from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.triton.choice import Choice, tuned, usual
from lowmem.kernels.triton.linear import TritonLinear

FILE = "kernels.json"
_chosen: dict[str, Choice] = {}


def choose(linear: TritonLinear, dtype: torch.dtype) -> Choice:
    """The launches for a linear: remembered, timed now on a card, or the usual ones."""
    device = linear.qweight.device
    format = replace(linear.format, sym=linear.middle, desc_act=False)
    spec = LinearSpec(linear.in_features, linear.out_features, linear.bias is not None, format)
    if not is_card(device):
        return usual(spec, 1)
    card = cards_of(device).properties(device)
    if not is_timed(device):
        return usual(spec, card.multiprocessors)
    key = f"{card.name}, {version('triton')}, {_sources()}, {spec}, {dtype}"
    if key not in _chosen:
        choice = _read(key)
        if choice is None:
            choice = tuned(spec, card.multiprocessors, stopwatch(linear, dtype))
            _write(key, choice)
        _chosen[key] = choice
    return _chosen[key]


def stopwatch(linear: TritonLinear, dtype: torch.dtype) -> Callable[[Choice, int], float]:
    """Times products of the linear with a choice and a number of rows; leaves its choice as it was."""

    @functools.cache
    def seconds(choice: Choice, rows: int) -> float:
        x = torch.randn(rows, linear.in_features, device=linear.qweight.device, dtype=dtype)
        before, linear.choice = linear.choice, choice
        try:
            return product_seconds(linear, x)
        except torch.OutOfMemoryError:
            return float("inf")
        except RuntimeError:  # a launch that takes more registers or shared memory than the card has
            return float("inf")
        finally:
            linear.choice = before

    return seconds


@functools.cache
def _sources() -> str:
    """Changes with the kernels."""
    found = hashlib.sha256()
    for name in ("fields.py", "decode.py", "prefill.py"):
        found.update((Path(__file__).parent / name).read_bytes())
    return found.hexdigest()[:12]


def _file() -> Path | None:
    with contextlib.suppress(OutputError):  # a user without a home folder: nothing is stored
        return cache_root() / FILE
    return None


def _stored(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(key: str) -> Choice | None:
    """The stored choice, or None if it is missing or damaged."""
    file = _file()
    found = _stored(file).get(key) if file else None
    try:
        return Choice.from_json(found) if isinstance(found, dict) else None
    except (TypeError, KeyError, ValueError):
        return None


def _write(key: str, choice: Choice) -> None:
    """Store a choice; where that is not possible, the next run times again."""
    file = _file()
    if file is None:
        return
    with contextlib.suppress(OSError, OutputError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**_stored(file), key: choice.to_json()})
