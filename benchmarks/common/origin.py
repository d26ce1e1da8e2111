"""The origin of a measurement: command, machine, software versions and date."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from lowmem.benchmarks.common.processes import hardware
from lowmem.benchmarks.common.records import Machine, Origin

from lowmem import __version__
from lowmem.cards.find import cards_of
from lowmem.platform import system

PACKAGES = ("torch", "transformers", "bitsandbytes", "gptqmodel")


def machine_here(device: str = "cpu") -> Machine:
    """Describe this machine. device: the torch device that models run on."""
    found = hardware()
    name, memory = "cpu", 0
    if device != "cpu":
        import torch

        card = cards_of(device).properties(torch.device(device))
        name, memory = card.name, card.total
    cores = len(system.usable_cores())
    return Machine(found["cpu"], tuple(found["flags"]), cores, found["memory_bytes"], name, memory)


def versions(packages: Sequence[str] = PACKAGES) -> tuple[tuple[str, str], ...]:
    """Return (package, version) of lowmem, Python, and each of `packages` that is installed."""
    found = [("lowmem", __version__), ("python", platform.python_version())]
    for package in packages:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return tuple(found)


def origin_of(argv: Sequence[str], source: str, source_digest: str, device: str = "cpu") -> Origin:
    """Describe a measurement that starts now. argv: the words after `lowmem`."""
    return Origin(
        command=shlex.join(["lowmem", *argv]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine_here(device),
        versions=versions(),
        source=source,
        source_digest=source_digest,
        load_average=round(system.load_average(), 2),
    )
