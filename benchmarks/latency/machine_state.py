"""What makes times untrustworthy on this machine: load, battery, CPU governor, swapping."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from lowmem.platform import system
from lowmem.text.units import format_bytes

CPUFREQ = Path("/sys/devices/system/cpu")
BUSY = 0.3
"""Share of a core that makes another process worth a warning."""
_OWN_SPEED = ("intel_pstate", "amd-pstate-epp")  # their "powersave" still allows full speed
_SWAPPED = 16 << 20
_NAMED = 3  # of busy processes


@dataclass(frozen=True)
class Before:
    """The machine before the measurement."""

    warnings: tuple[str, ...]
    swapped: int
    """Bytes swapped since boot."""


def look_before(load_average: float, seconds: float = 0.5) -> Before:
    """Measure the CPU time of other processes for `seconds`. load_average: of one minute."""
    cores = len(system.usable_cores())
    lines = [load_warning(load_average, cores), _battery(), governor_warning()]
    lines += busy_warnings(*_processor_times(seconds), seconds)
    return Before(tuple(line for line in lines if line), _swapped())


def swap_warning(before: Before) -> str:
    """Return a warning if memory was swapped since `before`, else ""."""
    moved = _swapped() - before.swapped
    if moved < _SWAPPED:
        return ""
    return f"{format_bytes(moved)} were swapped during the measurement: some times are the disk's"


def load_warning(load: float, cores: int) -> str:
    """Return a warning if the machine was busy, else ""."""
    if load <= cores / 2:
        return ""
    return f"the machine was busy before the measurement: load average {load:.2f} on {cores} cores"


def governor_warning(root: Path = CPUFREQ) -> str:
    """Return a warning if the CPU governor keeps cores slow, else ""."""
    slow = 0
    for folder in root.glob("cpu[0-9]*/cpufreq"):
        try:
            governor = (folder / "scaling_governor").read_text().strip()
            driver = (folder / "scaling_driver").read_text().strip()
        except OSError:
            continue
        slow += governor == "powersave" and driver not in _OWN_SPEED
    return f"the powersave governor keeps {slow} cores slow: try cpupower frequency-set -g performance" * (
        slow > 0
    )


def busy_warnings(
    before: Mapping[tuple[int, str], float], after: Mapping[tuple[int, str], float], seconds: float
) -> list[str]:
    """Return warnings about other processes that used much of a core.

    before, after: CPU seconds by (id, name).
    """
    shares = {key: (after[key] - before[key]) / seconds for key in before.keys() & after.keys()}
    busy = sorted((share, key) for key, share in shares.items() if share > BUSY)
    most = busy[: -_NAMED - 1 : -1]
    return [f"{name} (process {pid}) used {share:.0%} of a core" for share, (pid, name) in most]


def _processor_times(
    seconds: float,
) -> tuple[dict[tuple[int, str], float], dict[tuple[int, str], float]]:
    before = _times()
    time.sleep(seconds)
    return before, _times()


def _times() -> dict[tuple[int, str], float]:
    """(id, name) → CPU seconds of every other visible process."""
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
    return "the machine runs on battery, which makes it slower"


def _swapped() -> int:
    try:
        memory = psutil.swap_memory()
    except (OSError, RuntimeError):
        return 0
    return int(memory.sin + memory.sout)
