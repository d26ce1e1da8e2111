"""How fast memory is read here, measured: what bounds decode, since a token reads all weights once.

The host's is measured with numpy in threads, which needs no torch, and kept in lowmem's cache folder for this
CPU and number of cores. A card's is measured when a device is given.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MACHINE_FILE = "machine.json"
_SECONDS = 0.25  # of passes over the buffer: neighbours come and go, and the best pass is taken
_LEAST_BUFFER, _MOST_BUFFER = 128 << 20, 512 << 20
_CARD_BUFFER = 256 << 20
_PLAUSIBLE = (1e8, 1e14)  # bytes a second: anything else in the file is damage


@dataclass(frozen=True)
class Measured:
    """bytes_per_second read by all cores together; machine: what it was measured on; date: when."""

    bytes_per_second: float
    machine: str
    date: str


def host_bandwidth(refresh: bool = False, *, folder: Path | None = None) -> float:
    """Bytes a second that all cores together read from memory: kept from before, or measured now.

    refresh: measure in any case. folder: where it is kept, lowmem's cache folder unless given; one that
    cannot be written only means measuring again next time.
    """
    return host_measurement(refresh, folder=folder).bytes_per_second


def host_measurement(refresh: bool = False, *, folder: Path | None = None) -> Measured:
    """As `host_bandwidth`, with the machine and the date."""
    file = (folder if folder is not None else _cache_folder()) / MACHINE_FILE
    machine = machine_name()
    kept = None if refresh else _read(file)
    if kept is not None and kept.machine == machine:
        return kept
    measured = Measured(measure_host(), machine, datetime.date.today().isoformat())
    _write(file, measured)
    return measured


def measure_host() -> float:
    """Bytes a second, of the best of several passes of all cores over a buffer that no cache holds."""
    import numpy

    threads = len(usable_cores())
    part = _buffer_bytes() // threads // 8
    with ThreadPoolExecutor(threads) as pool:
        # Each thread fills its own part, which lies near its core then; unfilled pages would all be one.
        parts = list(pool.map(lambda _: numpy.full(part, 1, dtype=numpy.int64), range(threads)))

        def one_pass() -> None:
            list(pool.map(numpy.max, parts))  # vectorized, and without the interpreter's lock

        seconds = _best(one_pass, _SECONDS)
    return threads * part * 8 / seconds


def card_bandwidth(device: torch.device) -> float:
    """Bytes a second that a card moves within its memory: reads and writes of a copy, counted together."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    count = _CARD_BUFFER
    if device.type == "cuda":
        count = min(count, int(torch.cuda.mem_get_info(device)[0]) // 8)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = 8  # in a row, so that launching them costs nothing beside them

    def one_pass() -> None:
        for _ in range(copies):
            target.copy_(source)
        wait()

    wait()
    return 2 * count * copies / _best(one_pass, _SECONDS)


def machine_name() -> str:
    """The CPU's model and the cores that this process may use: what the figure belongs to."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    count = len(usable_cores())
    return f"{model}, {count} core{'s' * (count != 1)}"


def usable_cores() -> set[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _buffer_bytes() -> int:
    """Four times the last cache, within bounds, and not more than an eighth of the free memory."""
    from lowmem.plan.device import host_memory_available

    cache = 0
    with contextlib.suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        cache = int(text.removesuffix("K")) * 1024
    wanted = min(max(4 * cache, _LEAST_BUFFER), _MOST_BUFFER)
    return max(min(wanted, host_memory_available() // 8), 1 << 20)


def _best(one_pass: Callable[[], None], seconds: float) -> float:
    """The shortest time of passes for `seconds`, of three at least; the first only warms up."""
    one_pass()
    start, best, count = time.perf_counter(), float("inf"), 0
    while count < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        one_pass()
        best = min(best, time.perf_counter() - before)
        count += 1
    return best


def _read(file: Path) -> Measured | None:
    """What is kept, or None for what is not there or damaged."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))["host_bandwidth"]
        kept = Measured(float(data["bytes_per_second"]), str(data["machine"]), str(data["date"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if _PLAUSIBLE[0] < kept.bytes_per_second < _PLAUSIBLE[1] else None


def _write(file: Path, measured: Measured) -> None:
    data = {"host_bandwidth": vars(measured)}
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=MACHINE_FILE)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(data, indent=2) + "\n")
        os.replace(name, file)


def _cache_folder() -> Path:
    from lowmem.checkpoint.cache import cache_root

    return cache_root()
