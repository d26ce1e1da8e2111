"""Keys and values of earlier prompts in host memory, so that conversations do not evict each other.

A slot of the KV cache holds one sequence. Before another overwrites its rows, they are copied out; when the
first goes on, the same bits are copied back, so its answer does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowmem.generate.cache.contract import UNSCALED, Slot
from lowmem.generate.position_scaling import rows_at_scale

MIN_TOKENS = 16
"""Copying fewer costs more time than it saves."""


@dataclass(frozen=True)
class _Entry:
    ids: tuple[int, ...]
    rows: tuple[torch.Tensor, ...]
    """As `Slot.save` returned them."""
    scale: int
    """Of all rows."""

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)


class PrefixStore:
    """The most recently used sequences, `max_bytes` in all."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the most recently used one is last

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self._entries)

    def clear(self) -> None:
        """Drop all entries."""
        self._entries.clear()

    def longest(self, prompt: Sequence[int], scale: int = UNSCALED) -> int:
        """The length of the longest prefix of `prompt` that an entry of this scale starts with."""
        return max((common_prefix(entry.ids, prompt) for entry in self._of(scale)), default=0)

    def save(self, ids: Sequence[int], slot: Slot) -> None:
        """Copy the first len(ids) rows of `slot`, and drop the least recently used entries to make room.

        Of rows with different scales only the first that are alike are kept.

        Entries that share three quarters or more of their tokens with `ids` are dropped too: an editor sends
        the same text with small changes again and again, and its versions would leave no room for others.
        """
        scale = slot.scales[0] if slot.scales else UNSCALED
        alike = rows_at_scale(slot.scales, scale)
        ids = ids[:alike] if alike < len(slot.scales) else ids
        count, new_bytes = len(ids), slot.saved_bytes(len(ids))
        if count < MIN_TOKENS or new_bytes > self.max_bytes:
            return
        if any(common_prefix(entry.ids, ids) == count for entry in self._of(scale)):
            return
        self._entries = [e for e in self._entries if 4 * common_prefix(e.ids, ids) < 3 * len(e.ids)]
        while self._entries and self.nbytes + new_bytes > self.max_bytes:
            del self._entries[0]
        self._entries.append(_Entry(tuple(ids), slot.save(count), scale))

    def restore(self, prompt: Sequence[int], slot: Slot, scale: int = UNSCALED) -> int:
        """Replace the slot's contents with the longest stored prefix of `prompt`; returns its length.

        scale: of the rows that the prompt needs. Leaves the slot as it is if no entry of this scale has the
        prompt's first token.
        """
        best = max(self._of(scale), key=lambda entry: common_prefix(entry.ids, prompt), default=None)
        count = 0 if best is None else common_prefix(best.ids, prompt)
        if best is None or count == 0:
            return 0
        self._entries.remove(best)
        self._entries.append(best)
        slot.load(best.rows, prompt[:count], scale)
        return count

    def _of(self, scale: int) -> list[_Entry]:
        return [entry for entry in self._entries if entry.scale == scale]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of leading tokens that both share."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
