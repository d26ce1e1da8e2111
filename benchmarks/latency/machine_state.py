"""What makes times untrustworthy on this machine, in the user's words: load, battery, governor, swapping."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from lowmem.text.units import format_bytes

CPUFREQ = Path("/sys/devices/system/cpu")
BUSY = 0.3
"""Of a core, taken by one other process."""
_OWN_SPEED = ("intel_pstate", "amd-pstate-epp")  # "powersave" is these drivers' name for as fast as needed
_SWAPPED = 16 << 20
_NAMED = 3  # of busy processes


@dataclass(frozen=True)
class Before:
    """The machine before anything began. swapped: bytes moved to and from swap since it started."""

    warnings: tuple[str, ...]
    swapped: int


def look_before(load_average: float, seconds: float = 0.5) -> Before:
    """Look around for so many seconds. load_average: of one minute."""
    cores = len(os.sched_getaffinity(0))
    lines = [load_warning(load_average, cores), _battery(), governor_warning()]
    lines += busy_warnings(*_processor_times(seconds), seconds)
    return Before(tuple(line for line in lines if line), _swapped())


def swap_warning(before: Before) -> str:
    """What was swapped since; empty for next to nothing."""
    moved = _swapped() - before.swapped
    if moved < _SWAPPED:
        return ""
    return f"{format_bytes(moved)} went to or from swap while this ran: those times are the disk's"


def load_warning(load: float, cores: int) -> str:
    """Of a machine that others used already."""
    if load <= cores / 2:
        return ""
    return f"The machine was busy before anything began: load average {load:.2f} on {cores} cores"


def governor_warning(root: Path = CPUFREQ) -> str:
    """Of cores that are told to stay slow."""
    slow = 0
    for folder in root.glob("cpu[0-9]*/cpufreq"):
        try:
            governor = (folder / "scaling_governor").read_text().strip()
            driver = (folder / "scaling_driver").read_text().strip()
        except OSError:
            continue
        slow += governor == "powersave" and driver not in _OWN_SPEED
    return f"The powersave governor keeps {slow} cores slow: try cpupower frequency-set -g performance" * (
        slow > 0
    )


def busy_warnings(
    before: Mapping[tuple[int, str], float], after: Mapping[tuple[int, str], float], seconds: float
) -> list[str]:
    """Processes, as (id, name) → CPU seconds, that took much of a core in between."""
    shares = {key: (after[key] - before[key]) / seconds for key in before.keys() & after.keys()}
    busy = sorted((share, key) for key, share in shares.items() if share > BUSY)
    most = busy[: -_NAMED - 1 : -1]
    return [f"{name} (process {pid}) took {share:.0%} of a core" for share, (pid, name) in most]


def _processor_times(
    seconds: float,
) -> tuple[dict[tuple[int, str], float], dict[tuple[int, str], float]]:
    before = _times()
    time.sleep(seconds)
    return before, _times()


def _times() -> dict[tuple[int, str], float]:
    """(id, name) → CPU seconds of every other process that lets itself be seen."""
    found = {}
    for process in psutil.process_iter(["pid", "name", "cpu_times"]):
        used = process.info["cpu_times"]
        if used is not None and process.info["pid"] != os.getpid():
            name = "".join(c if c.isprintable() else "?" for c in process.info["name"] or "?")
            found[process.info["pid"], name] = used.user + used.system
    return found


def _battery() -> str:
    battery = getattr(psutil, "sensors_battery", lambda: None)()
    if battery is None or battery.power_plugged is not False:
        return ""
    return "The machine runs on its battery, which makes it slower"


def _swapped() -> int:
    try:
        memory = psutil.swap_memory()
    except (OSError, RuntimeError):
        return 0
    return int(memory.sin + memory.sout)
