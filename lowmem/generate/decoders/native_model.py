"""A model that the C library runs: forwards for several sequences, over the slots of a KV cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowmem.generate.cache.contract import Layout, Slot
from lowmem.generate.decoders.contract import DecoderRefused, Feed
from lowmem.generate.decoders.native_families import describe
from lowmem.generate.decoders.native_weights import MAX_ROWS
from lowmem.kernels.native import library as native
from lowmem.kernels.native.header import LmFeed


@dataclass(frozen=True)
class _Bound:
    """A slot that the library reads and writes."""

    number: int
    """Its distance from the first slot that was bound, in slots."""
    pointers: list[tuple[int, int]]


class NativeModel:
    """A model of one of the families in `native_families`, in bfloat16 on the CPU.

    capacity: tokens of the KV cache's slots. Raises DecoderRefused.
    """

    def __init__(self, model: Any, capacity: int) -> None:
        found = describe(model, capacity)
        self._weights, self._model, self._layers = found.weights, found.model, found.layers
        self.vocabulary, self.positions = found.vocabulary, found.positions
        self._model.capacity = capacity
        self.packed = found.weights.packed
        """Whether every linear before the head is packed."""
        self._cache: list[tuple[int, int]] = []  # where the rows of slot 0 are
        self._bound: dict[int, _Bound] = {}  # by the slot's index

    def forward(self, feeds: Sequence[Feed], wanted: Sequence[int]) -> torch.Tensor:
        """Append the ids of each feed to its slot, in one call for all.

        wanted: of each feed, of how many of its last ids the logits are wanted. Returns float32 logits
        [sum of wanted, vocab]. Raises DecoderRefused for a slot whose rows the library does not read, and
        ValueError for no ids or more than MAX_ROWS, ids outside of the vocabulary, and a slot that has no
        room for them or has new buffers.
        """
        ids = [token for feed in feeds for token in feed.ids]
        if not ids or len(ids) > MAX_ROWS or not all(feed.ids for feed in feeds):
            raise ValueError(f"a forward takes 1 to {MAX_ROWS} tokens, not {len(ids)}")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ValueError(f"a token id is outside of the vocabulary of {self.vocabulary}")
        fed = (LmFeed * len(feeds))(
            *[
                LmFeed(self._place(feed.slot, len(feed.ids)), feed.slot.length, len(feed.ids), keep)
                for feed, keep in zip(feeds, wanted, strict=True)
            ]
        )
        logits = torch.empty((sum(wanted), self.vocabulary), dtype=torch.float32)
        table, fed_rows = self._weights.tokens, self._weights.fed
        if table is not None and fed_rows is not None:
            fed_rows[: len(ids)] = table.lookup(torch.tensor(ids))
            ids = list(range(len(ids)))
        tokens = (ctypes.c_int64 * len(ids))(*ids)
        model, parts = ctypes.addressof(self._model), ctypes.addressof(fed)
        with native.running() as library:
            space = native.workspace(library.lm_forward_workspace(model, parts, len(feeds)))
            library.lm_forward(model, parts, len(feeds), tokens, logits.data_ptr(), space)
        for feed in feeds:
            feed.slot.advance(len(feed.ids))
        return logits

    def _place(self, slot: Slot, rows: int) -> int:
        """The number of the slot for the library, once `rows` more rows are known to fit."""
        bound = self._bound.get(slot.index)
        if bound is None:
            bound = self._bound[slot.index] = self._bind(slot)
        room = min(slot.capacity, self.positions)
        if slot.length + rows > room:
            raise ValueError(f"{slot.length + rows} tokens do not fit in a slot of {room}")
        if slot.pointers() != bound.pointers:
            raise ValueError("the KV cache has new buffers")
        return bound.number

    def _bind(self, slot: Slot) -> _Bound:
        kv_heads, head_dim = self._model.kv_heads, self._model.size
        if slot.capacity != self._model.capacity:
            raise DecoderRefused("the slots of the KV cache have another capacity")
        needed = Layout((kv_heads, slot.capacity, head_dim), torch.bfloat16, torch.device("cpu"))
        found = slot.layout()
        if found != needed:
            raise DecoderRefused(f"the KV cache must store {needed}, not {found}")
        pointers = slot.pointers()
        if not self._cache:
            self._cache = pointers
            for layer, (keys, values) in zip(self._layers, pointers, strict=True):
                layer.keys, layer.values = keys, values
        step = 2 * kv_heads * slot.capacity * head_dim
        apart = {
            here - first
            for both, known in zip(pointers, self._cache, strict=True)
            for here, first in zip(both, known, strict=True)
        }
        if len(apart) != 1 or (distance := apart.pop()) % step:
            raise DecoderRefused("the slots of the KV cache are not rows of one tensor")
        return _Bound(distance // step, pointers)
