"""Prompt-lookup speculation: the tokens that followed the same n-gram before are a draft of the next ones.

Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAMS = (3, 2)  # the longest match counts


class Lookup:
    """The tokens of prompt and answer, and where each n-gram of them was last continued."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._next: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in NGRAMS)
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Add one token."""
        ids, end = self._ids, len(self._ids)
        for size, places in zip(NGRAMS, self._next, strict=True):
            if end >= size:
                places[tuple(ids[end - size : end])] = end
        ids.append(token)

    def draft(self, length: int) -> list[int]:
        """Up to `length` tokens that followed the last occurrence of the last 3 (else 2) tokens; [] if none.

        A draft that reaches the end continues with its own tokens, so a period is repeated.
        """
        ids = self._ids
        for size, places in zip(NGRAMS, self._next, strict=True):
            start = places.get(tuple(ids[-size:]))
            if start is not None:
                period = len(ids) - start
                return [ids[start + i % period] for i in range(length)]
        return []
