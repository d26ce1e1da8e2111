"""Memory bandwidth, measured. It bounds decode, since every token reads all weights once.

The host's is measured with numpy in threads, without torch, and stored in lowmem's cache folder for this CPU
and number of cores. A card's is measured anew each time.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.cards.find import cards_of, is_card, synchronize
from lowmem.checkpoint.cache import cache_root
from lowmem.checkpoint.files.whole import write_json
from lowmem.errors import OutputError
from lowmem.plan.device import host_memory_available
from lowmem.platform import system

if TYPE_CHECKING:
    import torch

MACHINE_FILE = "machine.json"
_SECONDS = 0.25  # of passes over the buffer; the best pass counts, since other programs interfere
_LEAST_BUFFER, _MOST_BUFFER = 128 << 20, 512 << 20
_CARD_BUFFER = 256 << 20
_PLAUSIBLE = (1e8, 1e14)  # bytes per second; a stored value outside is ignored


@dataclass(frozen=True)
class Measured:
    """A measured memory bandwidth."""

    bytes_per_second: float
    """Read by all cores together."""
    machine: str
    """See `machine_name`."""
    date: str
    """ISO 8601."""


def host_bandwidth(refresh: bool = False, *, folder: Path | None = None) -> Measured:
    """The memory bandwidth of the host: stored by an earlier run, or measured now.

    refresh: measure again. folder: of the stored value, by default lowmem's cache folder.
    """
    with contextlib.suppress(OutputError):  # a user without a home folder: nothing is stored
        folder = folder or cache_root()
    file = folder / MACHINE_FILE if folder else None
    machine = machine_name()
    stored = None if refresh or file is None else _read(file)
    if stored is not None and stored.machine == machine:
        return stored
    measured = Measured(measure_host(), machine, datetime.date.today().isoformat())
    if file is None:
        return measured
    with contextlib.suppress(OSError, OutputError):  # a read-only folder: the next run measures again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"host_bandwidth": vars(measured)})
    return measured


def measure_host() -> float:
    """Bytes per second: the best of several passes of all cores over a buffer larger than the caches."""
    import numpy

    threads = len(system.usable_cores())
    part = _buffer_bytes() // threads // 8
    with ThreadPoolExecutor(threads) as pool:
        # Each thread fills its own part, which the system then places near its core.
        parts = list(pool.map(lambda _: numpy.full(part, 1, dtype=numpy.int64), range(threads)))

        def one_pass() -> None:
            list(pool.map(numpy.max, parts))  # vectorized, and releases the GIL

        seconds = best(one_pass, _SECONDS, least=3)
    return threads * part * 8 / seconds


def card_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy within a card's memory, reads and writes counted together."""
    import torch

    count = _CARD_BUFFER
    if is_card(device):
        count = min(count, cards_of(device).memory(device)[0] // 8)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = 8  # in a row, to hide the time of launching them

    def one_pass() -> None:
        for _ in range(copies):
            target.copy_(source)
        synchronize(device)

    synchronize(device)
    return 2 * count * copies / best(one_pass, _SECONDS, least=3)


def machine_name() -> str:
    """The CPU's model and the number of cores that this process may use."""
    count = len(system.usable_cores())
    return f"{system.processor_name()}, {count} core{'s' * (count != 1)}"


def _buffer_bytes() -> int:
    """Four times the last-level cache, within bounds, and at most an eighth of the free memory."""
    cache = 0
    with contextlib.suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        cache = int(text.removesuffix("K")) * 1024
    wanted = min(max(4 * cache, _LEAST_BUFFER), _MOST_BUFFER)
    return max(min(wanted, host_memory_available() // 8), 1 << 20)


def best(one_pass: Callable[[], object], seconds: float, least: int = 2) -> float:
    """Seconds of the shortest pass, among passes for `seconds`, at least `least`; the first is a warm-up."""
    one_pass()
    start, shortest, count = time.perf_counter(), float("inf"), 0
    while count < least or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        one_pass()
        shortest = min(shortest, time.perf_counter() - before)
        count += 1
    return shortest


def _read(file: Path) -> Measured | None:
    """The stored value, or None if it is missing or damaged."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))["host_bandwidth"]
        stored = Measured(float(data["bytes_per_second"]), str(data["machine"]), str(data["date"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return stored if _PLAUSIBLE[0] < stored.bytes_per_second < _PLAUSIBLE[1] else None
