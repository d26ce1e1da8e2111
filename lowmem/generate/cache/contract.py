"""The interface of a KV cache: slots, each of which holds the keys and values of one sequence.

To add a way of storing rows (8-bit, say), write one file with a `KVCache` and a `Slot`, and add the cache to
`CACHES` in tests/generate/test_cache_contract.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

UNSCALED = 0
"""The scale of rows whose rotary embeddings do not depend on the sequence's length."""


@dataclass(frozen=True)
class Layout:
    """How a slot stores each layer's keys and values: one contiguous tensor for each of the two."""

    shape: tuple[int, int, int]
    """(kv_heads, capacity, head_dim)"""
    dtype: torch.dtype
    device: torch.device


class FixedView(Cache, ABC):
    """A slot's first `size` rows as a transformers cache whose shapes never change.

    A step that is captured or compiled needs fixed shapes: it reads all `size` rows, and the mask hides those
    that are not filled.
    """

    @abstractmethod
    def seek(self, length: int) -> None:
        """Set the position on the device at which the next step writes. Call it before each step."""


class BatchView(Cache, ABC):
    """The first `size` rows of a cache's first `count` slots, as a transformers cache with fixed shapes.

    A forward of ids [count, 1] appends one row to each slot that is in the step, at its own position. It
    computes a row for every other slot too, and leaves what those hold.
    """

    @abstractmethod
    def seek(self, lengths: Mapping[int, int]) -> None:
        """Set the positions at which the next step writes, by slot index. Call it before each step."""

    @abstractmethod
    def position_ids(self) -> torch.Tensor:
        """The next step's positions [count, 1], 0 for a slot that is not in it; computed on the device."""

    @abstractmethod
    def mask(self) -> torch.Tensor:
        """Which rows the next step sees: bool [count, 1, 1, size], computed on the device."""


class Slot(ABC):
    """The keys and values of one sequence, up to `capacity` tokens.

    `tokens` lists the token ids whose rows every layer is known to hold. A decoder adds ids after a forward
    has ended, and `cut` removes them before it drops rows. An exception at any point therefore leaves rows
    that have no token, and `rewind` drops those.
    """

    def __init__(self, index: int, capacity: int) -> None:
        self.index = index
        self.capacity = capacity
        self.tokens: list[int] = []
        self.scales: list[int] = []
        """For each token the scale of its rows (see `PositionScaling.scale`)."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens whose rows every layer holds, whether they are in `tokens` or not."""

    @property
    @abstractmethod
    def view(self) -> Cache:
        """The slot as a transformers cache: a forward appends its rows and attends to all before them."""

    @abstractmethod
    def fixed_view(self, size: int) -> FixedView:
        """The first `size` rows with fixed shapes. The slot must have held a token before."""

    @abstractmethod
    def layout(self) -> Layout:
        """How the rows are stored. Raises ValueError if layers differ, have no buffers yet or are packed."""

    @abstractmethod
    def pointers(self) -> list[tuple[int, int]]:
        """The addresses of each layer's keys and values, stored as `layout` says."""

    @abstractmethod
    def advance(self, count: int) -> None:
        """Count `count` more rows as filled: a fixed or native step has written them to the buffers."""

    @abstractmethod
    def save(self, count: int) -> tuple[torch.Tensor, ...]:
        """Copy the first `count` rows to the host, as `load` takes them."""

    @abstractmethod
    def load(self, rows: Sequence[torch.Tensor], ids: Sequence[int], scale: int = UNSCALED) -> None:
        """Replace the contents with the first len(ids) rows of a `save`.

        ids: their tokens. scale: the scale of all of them.
        """

    @abstractmethod
    def copy(self, other: Slot, count: int) -> None:
        """Replace the contents with the first `count` tokens of another slot of the same cache."""

    @abstractmethod
    def saved_bytes(self, count: int) -> int:
        """Bytes that `save(count)` takes; 0 before the buffers exist."""

    def cut(self, length: int) -> None:
        """Drop all tokens from `length` on, in every layer. Raises ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a slot of {self.length} tokens to {length}")
        del self.tokens[length:]
        del self.scales[length:]
        self._cut_rows(length)

    def rewind(self) -> None:
        """Drop the rows that an interrupted or rejected step has left behind `tokens`."""
        self.cut(len(self.tokens))

    def commit(self, ids: Sequence[int], scales: Sequence[int] = ()) -> None:
        """Record that every layer now holds the rows of `ids`; without `scales` they are unscaled."""
        self.scales += scales or [UNSCALED] * len(ids)
        self.tokens += ids

    @abstractmethod
    def _cut_rows(self, length: int) -> None:
        """Set every layer's length to `length`, which no layer is short of."""


class KVCache(ABC):
    """Slots for several sequences of up to `capacity` tokens each; buffers are made once, at first use."""

    slots: tuple[Slot, ...]
    capacity: int

    @abstractmethod
    def batch_view(self, count: int, size: int) -> BatchView:
        """The first `size` rows of the first `count` slots. Raises ValueError before the buffers exist."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the buffers made so far, of all slots together."""

    def reset(self) -> None:
        """Empty every slot; the buffers stay."""
        for slot in self.slots:
            slot.cut(0)
