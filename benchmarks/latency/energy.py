"""Energy where the machine tells it: the processor's RAPL counters, or a card's through NVML.

Both count joules since some moment, of the whole package or card, idle draw included. Linux shows RAPL to
root alone on most machines; where a counter cannot be read there is no figure, and no guess.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

POWERCAP = Path("/sys/class/powercap")
_NVML = "libnvidia-ml.so.1"


class Meter(Protocol):
    """A counter of energy."""

    def read(self) -> tuple[int, ...]:
        """The counters as they are now. Raises OSError where they cannot be read any more."""

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """What was used between two readings."""


@dataclass(frozen=True)
class Zone:
    """A RAPL zone: its counter in microjoules, which begins again from 0 past `largest`."""

    file: Path
    largest: int


@dataclass(frozen=True)
class HostMeter:
    """The processor's packages, and memory where it is counted apart."""

    zones: tuple[Zone, ...]

    def read(self) -> tuple[int, ...]:
        """One counter a zone, microjoules."""
        try:
            return tuple(int(zone.file.read_text()) for zone in self.zones)
        except ValueError as error:
            raise OSError(f"no number in a RAPL counter: {error}") from error

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """The sum over zones; a counter that has begun anew once is accounted for."""
        pairs = zip(self.zones, before, after, strict=True)
        return sum((end - start) % (zone.largest + 1) for zone, start, end in pairs) / 1e6


@dataclass(frozen=True)
class CardMeter:
    """A card's own total, which NVML keeps in millijoules since the driver was loaded."""

    library: Any
    handle: Any

    def read(self) -> tuple[int, ...]:
        """The total."""
        total = ctypes.c_ulonglong()
        if status := self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(total)):
            raise OSError(f"NVML refuses to tell the energy: {status}")
        return (total.value,)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """The difference."""
        return (after[0] - before[0]) / 1e3


def find_meter(device: torch.device) -> Meter | None:
    """The meter of what computes: the card, or the processor. None where nothing tells."""
    meter = host_meter() if device.type == "cpu" else _card_meter(device)
    try:
        return meter if meter and meter.read() else None
    except OSError:
        return None


def host_meter(root: Path = POWERCAP) -> HostMeter | None:
    """The RAPL zones under `root`: packages, and the memory zones inside of them.

    A package's cores are part of its own count; `psys`, the whole platform, counts packages again.
    """
    zones = []
    try:
        for folder in sorted(root.glob("*:*")):
            name = (folder / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                zones.append(Zone(folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())))
    except (OSError, ValueError):
        return None
    return HostMeter(tuple(zones)) if zones else None


def _card_meter(device: torch.device) -> CardMeter | None:
    import torch

    try:
        library = ctypes.CDLL(_NVML)
        library.nvmlInit_v2()
        uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        handle = ctypes.c_void_p()
        found = library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle))
    except (OSError, AttributeError):
        return None
    return None if found else CardMeter(library, handle)
