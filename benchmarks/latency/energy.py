"""Energy counters: RAPL for the processor, NVML for a card.

Both count the energy of the whole package or card, idle power included. On most machines only root can read
RAPL. If a counter cannot be read, no energy is reported.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowmem.cards.find import cards_of, is_card

if TYPE_CHECKING:
    import torch

POWERCAP = Path("/sys/class/powercap")
_NVML = "libnvidia-ml.so.1"


class Meter(Protocol):
    """An energy counter."""

    def read(self) -> tuple[int, ...]:
        """Read the counters. Raises OSError if they can no longer be read."""

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Energy between two readings, in joules."""


@dataclass(frozen=True)
class Zone:
    """A RAPL zone."""

    file: Path
    """Of its counter, in microjoules."""
    largest: int
    """After this value the counter wraps around to 0."""


@dataclass(frozen=True)
class HostMeter:
    """Measures the energy of the processor packages, and of DRAM if RAPL has a separate counter for it."""

    zones: tuple[Zone, ...]

    def read(self) -> tuple[int, ...]:
        """Energy of each zone, in microjoules. Raises OSError if a counter is not a number or cannot be
        read.
        """
        try:
            return tuple(int(zone.file.read_text()) for zone in self.zones)
        except ValueError as error:
            raise OSError(f"a RAPL counter is not a number: {error}") from error

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Energy of all zones, in joules. Each counter may wrap around once between the readings."""
        pairs = zip(self.zones, before, after, strict=True)
        return sum((end - start) % (zone.largest + 1) for zone, start, end in pairs) / 1e6


@dataclass(frozen=True)
class CardMeter:
    """Measures the energy of a card with NVML."""

    library: Any
    handle: Any

    def read(self) -> tuple[int, ...]:
        """Energy since the driver was loaded, in millijoules. Raises OSError if NVML cannot read it."""
        total = ctypes.c_ulonglong()
        if status := self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(total)):
            raise OSError(f"NVML cannot read the energy counter: error {status}")
        return (total.value,)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Energy between two readings, in joules."""
        return (after[0] - before[0]) / 1e3


def find_meter(device: torch.device) -> Meter | None:
    """Find the energy counter of the device; None if it has none or the counter cannot be read."""
    meter = _card_meter(device) if is_card(device) else host_meter()
    try:
        return meter if meter and meter.read() else None
    except OSError:
        return None


def host_meter(root: Path = POWERCAP) -> HostMeter | None:
    """Find the RAPL zones of packages and DRAM under `root`; None if there are none or they cannot be read.

    Zones of cores are part of their package, and `psys` counts packages again, so both are left out.
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
    """NVML's meter; None for a card of another maker, which has none here."""
    import torch

    if cards_of(device).maker != "NVIDIA":
        return None
    try:
        library = ctypes.CDLL(_NVML)
        library.nvmlInit_v2()
        uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        handle = ctypes.c_void_p()
        found = library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle))
    except (OSError, AttributeError):
        return None
    return None if found else CardMeter(library, handle)
