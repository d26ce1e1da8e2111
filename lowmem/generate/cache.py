"""The KV cache: one buffer a layer for the whole context, made once and filled in place.

transformers' own dynamic cache copies all keys and values for every token, so that a step needs two of
them for a moment. Here a step writes its rows and the layer sees the filled part of the buffer: the memory
is what the plan computed, and going back (a rejected draft, another turn) is a number that changes.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class KVLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, [1, kv_heads, capacity, head_dim] each.

    The buffers are made at the first update, with the dtype and on the device of what comes. `fixed`: the
    layer sees whole buffers and the mask hides what is not filled, so that shapes never change, as a
    captured or compiled step needs; else it sees the filled part alone.
    """

    is_sliding = False
    is_croppable = True
    # Also while shapes follow the length: transformers then makes a mask for a one-row step, and with a mask
    # its sdpa packs the heads that share a KV head. Without one it asks torch for grouped queries, which on a
    # CPU is 22 times slower (StarChat's layer at 8192 tokens: 39 ms for 1.8).
    is_compileable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.fixed = False
        self.position = torch.zeros((), dtype=torch.long)
        """The length as a tensor on the device, kept only while `fixed`."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the buffers; zeros, since a fixed step multiplies unfilled rows by weights of 0."""
        for name, states in (("keys", key_states), ("values", value_states)):
            batch, heads, _, size = states.shape
            setattr(self, name, states.new_zeros((batch, heads, self.capacity, size)))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.position = self.position.to(self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new rows; the keys and values that the layer attends to.

        Raises ValueError when they do not fit: the engine counts, so that is a bug.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        count = key_states.shape[-2]
        if self.fixed:
            rows = torch.arange(count, device=self.device) + self.position
            self.keys.index_copy_(2, rows, key_states)
            self.values.index_copy_(2, rows, value_states)
            self.position.add_(count)
            return self.keys, self.values
        stop = self.length + count
        if stop > self.capacity:
            raise ValueError(f"{stop} tokens do not fit a KV cache of {self.capacity}")
        self.keys[:, :, self.length : stop] = key_states
        self.values[:, :, self.length : stop] = value_states
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length of the keys, offset of the first) for transformers' mask."""
        return (self.capacity if self.fixed else self.length + query_length), 0

    def get_seq_length(self) -> Any:
        """Tokens that are filled: an int, or while `fixed` a tensor."""
        return self.position if self.fixed else self.length

    def get_max_length(self) -> int:
        """The capacity, in tokens; -1 while shapes follow the length, which is no fixed shape."""
        return self.capacity if self.fixed else -1


class KVCache(Cache):
    """The KV cache of a model with `layers` decoder layers, for at most `capacity` tokens of one sequence."""

    def __init__(self, layers: int, capacity: int) -> None:
        if layers < 1 or capacity < 1:
            raise ValueError(f"a KV cache of {layers} layers and {capacity} tokens")
        self.kv_layers = [KVLayer(capacity) for _ in range(layers)]
        super().__init__(layers=list(self.kv_layers))
        self.capacity = capacity

    @property
    def length(self) -> int:
        """Tokens that every layer has filled: an interrupted forward leaves some layers ahead of others."""
        return min(layer.length for layer in self.kv_layers)

    @property
    def fixed(self) -> bool:
        """Whether the layers show whole buffers (`set_fixed`)."""
        return self.kv_layers[0].fixed

    def cut(self, length: int) -> None:
        """Forget all tokens from `length` on, in every layer; ValueError for more than there are."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a KV cache of {self.length} tokens to {length}")
        for layer in self.kv_layers:
            layer.length = length
            if layer.fixed:
                layer.position.fill_(length)

    def set_fixed(self, fixed: bool) -> None:
        """Switch between whole buffers (for compiled steps) and the filled part; the contents stay.

        A step that ran while fixed has moved each layer's `position`; `advance` says so to the host.
        """
        for layer in self.kv_layers:
            layer.fixed = fixed
            if fixed:
                layer.position.fill_(layer.length)

    def advance(self, count: int) -> None:
        """Note that a fixed step has written `count` tokens: nothing waits for the device to tell."""
        for layer in self.kv_layers:
            layer.length += count

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that have been made."""
        return sum(
            layer.keys.nbytes + layer.values.nbytes
            for layer in self.kv_layers
            if layer.keys is not None and layer.values is not None
        )
