"""Keys and values in the dtype in which the model computes them, in buffers that are filled in place.

transformers' DynamicCache copies all keys and values at every token, so a step needs twice their memory for a
moment. Here a layer has one buffer for the whole context, a step writes its rows into it, and attention reads
the filled part. The memory is what the plan computed, and dropping tokens only changes a length.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from lowmem.generate.cache.contract import UNSCALED, BatchView, FixedView, KVCache, Layout, Slot
from lowmem.generate.cache.fixed import DenseBatchView, DenseFixedView, with_reused


class _Buffers:
    """One decoder layer's keys and values [slots, kv_heads, capacity, head_dim], made at the first update."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def of(
        self, slot: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot's part [1, kv_heads, capacity, head_dim] of both, made for states of this dtype."""
        if self.keys is None or self.values is None:
            self.keys, self.values = self._zeros(key_states), self._zeros(value_states)
        return self.keys[slot : slot + 1], self.values[slot : slot + 1]

    def _zeros(self, states: torch.Tensor) -> torch.Tensor:
        _, heads, _, size = states.shape
        # Zeros: a fixed step multiplies unfilled rows by weights of 0, which no NaN survives.
        return states.new_zeros((self.slots, heads, self.capacity, size))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.values) if t is not None)


class _Layer(CacheLayerMixin):
    """One slot's rows of one decoder layer."""

    is_sliding = False
    is_croppable = True
    # transformers then makes a mask for one-row steps too, and with a mask its sdpa packs the heads that
    # share a KV head. Without one it uses torch's grouped queries, which on a CPU take 22 times as long
    # (StarChat's layer at 8192 tokens: 39 ms instead of 1.8).
    is_compileable = True

    def __init__(self, buffers: _Buffers, slot: int) -> None:
        super().__init__()
        self._buffers, self._slot = buffers, slot
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the layer's buffers, or take this slot's part of them."""
        self.keys, self.values = self._buffers.of(self._slot, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def join(self) -> None:
        """Take this slot's part of the buffers if another slot has made them."""
        if not self.is_initialized and self._buffers.keys is not None and self._buffers.values is not None:
            self.lazy_initialization(self._buffers.keys, self._buffers.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows [1, kv_heads, rows, head_dim]; returns all keys and values filled so far.

        Raises ValueError if they do not fit.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        stop, capacity = self.length + key_states.shape[-2], self._buffers.capacity
        if stop > capacity:
            raise ValueError(f"{stop} tokens do not fit in a slot of {capacity}")
        self.keys[:, :, self.length : stop] = key_states
        self.values[:, :, self.length : stop] = value_states
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, offset of the first) for transformers' mask."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that are filled."""
        return self.length

    def get_max_length(self) -> int:
        """-1: shapes follow the length."""
        return -1


class DenseSlot(Slot):
    """One sequence's part of a `DenseKVCache`; see `Slot` for the methods."""

    def __init__(self, index: int, buffers: Sequence[_Buffers], reused: Collection[int] = ()) -> None:
        super().__init__(index, buffers[0].capacity)
        self.layers = [_Layer(part, index) for part in buffers]
        self._reused = reused
        self._view = Cache(layers=with_reused(self.layers, reused))

    @property
    def length(self) -> int:
        return min([layer.length for layer in self.layers])

    @property
    def view(self) -> Cache:
        return self._view

    def fixed_view(self, size: int) -> FixedView:
        rows = [_rows(layer) for layer in self.layers]
        return DenseFixedView(rows, self._reused, size)

    def layout(self) -> Layout:
        for layer in self.layers:
            layer.join()
        found = {
            Layout(tuple(tensor.shape[1:]), tensor.dtype, tensor.device)  # type: ignore[arg-type]
            for layer in self.layers
            for tensor in _rows(layer)
        }
        if len(found) != 1:
            raise ValueError("the KV cache's layers are not stored alike")
        return found.pop()

    def pointers(self) -> list[tuple[int, int]]:
        return [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in self.layers]  # type: ignore[union-attr]

    def advance(self, count: int) -> None:
        for layer in self.layers:
            layer.length += count

    @torch.inference_mode()
    def save(self, count: int) -> tuple[torch.Tensor, ...]:
        return tuple(
            rows[:, :, :count].to("cpu", copy=True).contiguous()
            for layer in self.layers
            for rows in _rows(layer)
        )

    @torch.inference_mode()
    def load(self, rows: Sequence[torch.Tensor], ids: Sequence[int], scale: int = UNSCALED) -> None:
        self.cut(0)
        count = len(ids)
        buffers = [buffer for layer in self.layers for buffer in _rows(layer)]
        for buffer, saved in zip(buffers, rows, strict=True):
            buffer[:, :, :count] = saved[:, :, :count]
        self.advance(count)
        self.commit(ids, [scale] * count)

    @torch.inference_mode()
    def copy(self, other: Slot, count: int) -> None:
        if not isinstance(other, DenseSlot) or count > len(other.tokens):
            raise ValueError(f"{count} tokens of a slot that holds {len(other.tokens)}")
        self.cut(0)
        for own, layer in zip(self.layers, other.layers, strict=True):
            own.join()
            for to, rows in zip(_rows(own), _rows(layer), strict=True):
                to[:, :, :count] = rows[:, :, :count]
        self.advance(count)
        self.commit(other.tokens[:count], other.scales[:count])

    def saved_bytes(self, count: int) -> int:
        buffers = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(buffer.nbytes for buffer in buffers) * count // self.capacity

    def _cut_rows(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length


class DenseKVCache(KVCache):
    """A KV cache for a model of `layers` decoder layers, in the dtype and on the devices of its layers.

    reused: indices of the layers that keep nothing, since they read the keys and values of an earlier layer.
    """

    def __init__(self, layers: int, capacity: int, slots: int = 1, *, reused: Collection[int] = ()) -> None:
        if min(layers, capacity, slots) < 1:
            raise ValueError(f"a KV cache of {layers} layers, {capacity} tokens and {slots} slots")
        self.capacity = capacity
        self._buffers = [_Buffers(slots, capacity) for _ in range(layers - len(reused))]
        self._reused = reused
        self.slots = tuple(DenseSlot(index, self._buffers, reused) for index in range(slots))

    def batch_view(self, count: int, size: int) -> BatchView:
        return DenseBatchView([_rows(buffers) for buffers in self._buffers], self._reused, count, size)

    @property
    def nbytes(self) -> int:
        return sum(buffers.nbytes for buffers in self._buffers)


def reused_layers(config: Any) -> tuple[int, ...]:
    """The layers of a model that read the keys and values of an earlier one, as in Gemma 3n and 4.

    config: transformers' config of the text model.
    """
    modes = getattr(config, "kv_sharing_modes", None) or ()
    return tuple(index for index, mode in enumerate(modes) if mode == "reuse")


def _rows(layer: _Layer | _Buffers) -> tuple[torch.Tensor, torch.Tensor]:
    if layer.keys is None or layer.values is None:
        raise ValueError("the KV cache has no buffers yet")
    return layer.keys, layer.values
