"""The views of a dense cache whose shapes never change, for steps that are captured or compiled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from lowmem.generate.cache.contract import BatchView, FixedView
from lowmem.generate.transfer import send

Rows = tuple[torch.Tensor, torch.Tensor]
"""A layer's keys and values [slots, kv_heads, capacity, head_dim]."""


class _FixedLayer(CacheLayerMixin, ABC):
    """The first rows of a layer, written at positions that the device holds.

    positions: [] for one slot, [slots] for several.
    """

    is_sliding = False
    is_compileable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.positions = keys, values, positions
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the rows exist."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows [slots, kv_heads, rows, head_dim] at the positions; returns all rows of the view."""
        assert self.keys is not None and self.values is not None
        for whole, states in ((self.keys, key_states), (self.values, value_states)):
            self._write(whole, states)
        return self.keys, self.values

    @abstractmethod
    def _write(self, whole: torch.Tensor, states: torch.Tensor) -> None:
        """Write the states into the rows `whole`."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, offset of the first) for transformers' mask."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> Any:
        """The position before the step, as a tensor: the host does not wait for it."""
        return self.positions

    def get_max_length(self) -> int:
        """Rows of the view."""
        assert self.keys is not None
        return int(self.keys.shape[2])


class _SlotLayer(_FixedLayer):
    """One slot's rows."""

    def _write(self, whole: torch.Tensor, states: torch.Tensor) -> None:
        rows = torch.arange(states.shape[-2], device=whole.device) + self.positions
        whole.index_copy_(2, rows, states)


class _BatchLayer(_FixedLayer):
    """The rows of several slots; a negative position is that of a slot that is not in the step."""

    def _write(self, whole: torch.Tensor, states: torch.Tensor) -> None:
        slots = torch.arange(len(whole), device=whole.device)
        places = self.positions.clamp(min=0)
        by_row = whole.transpose(1, 2)  # [slots, capacity, kv_heads, head_dim]
        written = torch.where((self.positions >= 0)[:, None, None], states[:, :, 0], by_row[slots, places])
        by_row.index_put_((slots, places), written)


class DenseFixedView(FixedView):
    """One slot; see `FixedView`."""

    def __init__(self, rows: Sequence[Rows], reused: Collection[int], size: int) -> None:
        self._position = torch.zeros((), dtype=torch.long, device=rows[0][0].device)
        layers = [_SlotLayer(keys[:, :, :size], values[:, :, :size], self._position) for keys, values in rows]
        super().__init__(layers=with_reused(layers, reused))

    def seek(self, length: int) -> None:
        """See `FixedView.seek`; nothing waits for the device."""
        self._position.fill_(length)


class DenseBatchView(BatchView):
    """The first `count` slots; see `BatchView`."""

    def __init__(self, rows: Sequence[Rows], reused: Collection[int], count: int, size: int) -> None:
        self._positions = torch.full((count,), -1, dtype=torch.long, device=rows[0][0].device)
        self._size = size
        layers = [
            _BatchLayer(keys[:count, :, :size], values[:count, :, :size], self._positions)
            for keys, values in rows
        ]
        super().__init__(layers=with_reused(layers, reused))

    def seek(self, lengths: Mapping[int, int]) -> None:
        """See `BatchView.seek`; nothing waits for the device."""
        positions = [lengths.get(index, -1) for index in range(len(self._positions))]
        self._positions.copy_(send(positions, self._positions.device))

    def position_ids(self) -> torch.Tensor:
        return self._positions.clamp(min=0)[:, None]

    def mask(self) -> torch.Tensor:
        rows = torch.arange(self._size, device=self._positions.device)
        return (rows <= self.position_ids())[:, None, None]


def with_reused(layers: Sequence[CacheLayerMixin], reused: Collection[int]) -> list[Any]:
    """The layers that keep rows, and at the indices `reused` layers that keep none."""
    kept = iter(layers)
    return [DummyLayer() if i in reused else next(kept) for i in range(len(layers) + len(reused))]
