"""Keys and values of earlier prompts in host memory, so that conversations do not evict each other.

The KV cache holds one sequence. When another comes, the rows that it would overwrite are copied out; when the
first goes on, they are copied back, bit by bit. So an answer is as after the same prefix in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowmem.generate.cache import KVCache

LEAST_TOKENS = 16
"""Copies of fewer are not worth their time."""


@dataclass(frozen=True)
class _Kept:
    """Token ids, and each layer's keys and values [1, kv_heads, tokens, head_dim] of them."""

    ids: tuple[int, ...]
    rows: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.rows)


class PrefixStore:
    """The sequences that were used last, `most_bytes` of them in all."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: list[_Kept] = []  # the one used last comes last

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(kept.nbytes for kept in self._kept)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def longest(self, prompt: Sequence[int]) -> int:
        """Tokens at the start of `prompt` that something kept has as well."""
        return max((common_prefix(kept.ids, prompt) for kept in self._kept), default=0)

    @torch.inference_mode()
    def save(self, ids: Sequence[int], cache: KVCache) -> None:
        """Keep the first len(ids) rows of the cache. What was used least goes for it.

        So does what has three quarters or more of its tokens in common with it: an editor sends the same text
        with a few changes again and again, and all of them would leave no room for anything else.
        """
        count = len(ids)
        if count < LEAST_TOKENS or cache.nbytes * count // cache.capacity > self.most_bytes:
            return
        for kept in self._kept:
            if common_prefix(kept.ids, ids) == count:  # all of it is there already
                return
        self._kept = [kept for kept in self._kept if 4 * common_prefix(kept.ids, ids) < 3 * len(kept.ids)]
        new_bytes = cache.nbytes * count // cache.capacity
        while self._kept and self.nbytes + new_bytes > self.most_bytes:
            del self._kept[0]
        rows = []
        for layer in cache.kv_layers:
            assert layer.keys is not None and layer.values is not None
            rows.append((_to_host(layer.keys[:, :, :count]), _to_host(layer.values[:, :, :count])))
        self._kept.append(_Kept(tuple(ids), tuple(rows)))

    @torch.inference_mode()
    def restore(self, prompt: Sequence[int], cache: KVCache) -> int:
        """Fill an empty cache with the most of `prompt` that is kept; the tokens that it then holds."""
        best = max(self._kept, key=lambda kept: common_prefix(kept.ids, prompt), default=None)
        count = 0 if best is None else common_prefix(best.ids, prompt)
        if best is None or count == 0:
            return 0
        self._kept.remove(best)
        self._kept.append(best)
        for layer, (keys, values) in zip(cache.kv_layers, best.rows, strict=True):
            assert layer.keys is not None and layer.values is not None
            layer.keys[:, :, :count] = keys[:, :, :count]
            layer.values[:, :, :count] = values[:, :, :count]
            layer.length = count
        return count


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the start of both."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def _to_host(rows: torch.Tensor) -> torch.Tensor:
    return rows.to("cpu", copy=True).contiguous()
