"""Which slot of the KV cache a sequence gets, and which rows of its prompt are computed already.

Rows of a prompt's beginning may be in the slot itself, in another slot, whether its sequence has ended or
not, or in the prefix store. Wherever they come from, they are the bits that computing them again would give.
"""

from __future__ import annotations

from collections.abc import Collection

from lowmem.generate.cache.contract import KVCache, Slot
from lowmem.generate.position_scaling import PositionScaling, rows_at_scale
from lowmem.generate.prefix_store import MIN_TOKENS, PrefixStore, common_prefix
from lowmem.generate.sequence import Sequence


class Slots:
    """The slots of a KV cache, and the sequences that use them."""

    def __init__(self, cache: KVCache, scaling: PositionScaling) -> None:
        self.cache = cache
        self.store: PrefixStore | None = None
        """Keeps the rows of earlier prompts that the next one overwrites; None: they are lost."""
        self._scaling = scaling
        self._users: dict[int, Sequence] = {}  # by the slot's index
        self._used: list[int] = [0] * len(cache.slots)  # when, by a count of uses
        self._uses = 0

    def take(self, sequence: Sequence, reading: Collection[Sequence]) -> bool:
        """Give the sequence a slot that holds as many rows of its prompt as are known.

        reading: the sequences whose prompts are being read. Returns False, and changes nothing, if one of
        them will soon have more rows to share. There must be a free slot.
        """
        prompt = sequence.prompt
        # The last token is always fed, since its logits are not kept; for scores all are.
        kept, scale = prompt[: 0 if sequence.scores else -1], self._scaling.scale(len(prompt))
        known = {slot.index: self._common(slot, kept, scale) for slot in self.cache.slots}
        most = max(known.values())
        for other in reading:
            if other.slot is None or other is sequence or self._scaling.scale(len(other.prompt)) != scale:
                continue
            shared = common_prefix(other.prompt, kept)
            if shared >= most + MIN_TOKENS and other.read < shared:
                return False
        slot = self._target(known)
        self._users[slot.index] = sequence
        self._uses += 1
        self._used[slot.index] = self._uses
        sequence.slot = slot
        sequence.cached_tokens = sequence.read = self._bring(slot, kept, scale, known)
        return True

    def release(self, sequence: Sequence) -> None:
        """The sequence has ended; its rows stay until the slot is taken again."""
        for index, user in list(self._users.items()):
            if user is sequence:
                del self._users[index]

    def _common(self, slot: Slot, prompt: list[int], scale: int) -> int:
        """Rows at the beginning of a slot that are those of the prompt."""
        return min(common_prefix(slot.tokens, prompt), rows_at_scale(slot.scales, scale))

    def _target(self, known: dict[int, int]) -> Slot:
        """The free slot that the prompt continues, or else the free slot that was used longest ago."""
        free = [slot for slot in self.cache.slots if slot.index not in self._users]
        best = max(free, key=lambda slot: known[slot.index])
        if 4 * known[best.index] >= 3 * len(best.tokens) > 0:
            return best
        return min(free, key=lambda slot: self._used[slot.index])

    def _bring(self, slot: Slot, prompt: list[int], scale: int, known: dict[int, int]) -> int:
        """Save the rows that are about to be cut, and bring the prompt's rows there; returns how many."""
        own, store = known[slot.index], self.store
        if store is not None and len(slot.tokens) - own >= MIN_TOKENS and slot.length >= len(slot.tokens):
            store.save(slot.tokens, slot)
        source = max(self.cache.slots, key=lambda other: known[other.index])
        elsewhere = known[source.index]
        if store is not None and store.longest(prompt, scale) >= max(own, elsewhere) + MIN_TOKENS:
            return store.restore(prompt, slot, scale)
        if elsewhere >= own + MIN_TOKENS:
            slot.copy(source, elsewhere)
            return elsewhere
        slot.cut(own)
        return own
