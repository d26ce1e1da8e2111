"""The memory of the cards, asked for in a process that ends at once: asking takes card memory itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from lowmem.errors import LowmemError


@dataclass(frozen=True)
class CardMemory:
    """One card."""

    type: str
    """torch's name of its kind, as "cuda"."""
    index: int
    free: int
    total: int
    """Bytes."""


def card_memories() -> list[CardMemory]:
    """The cards that torch sees, in the order in which `auto` prefers them; empty without a driver.

    Raises LowmemError if they cannot be asked.
    """
    from lowmem.cards.find import driver_present

    if not driver_present():
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__], capture_output=True, text=True, timeout=300, check=True
        )
        return [CardMemory(*entry) for entry in json.loads(done.stdout)]
    except (OSError, ValueError, TypeError, subprocess.SubprocessError) as error:
        raise LowmemError("the memory of the cards cannot be determined", "Run `lowmem doctor`") from error


def _print() -> None:
    from lowmem.cards.find import cards_of, found_cards

    print(json.dumps([(d.type, d.index, *cards_of(d).memory(d)) for d in found_cards()]))


if __name__ == "__main__":
    _print()
