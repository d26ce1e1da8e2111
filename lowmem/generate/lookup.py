"""Prompt-lookup speculation: the tokens that followed the same n-gram before are a draft of the next ones.

Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAMS = (3, 2)  # the longest match counts


class Lookup:
    """Where each n-gram of a sequence was last continued."""

    def __init__(self) -> None:
        self._next: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in NGRAMS)
        self._seen = 0  # tokens whose n-grams are known

    def draft(self, ids: Sequence[int], length: int) -> list[int]:
        """Up to `length` tokens that followed the last occurrence of the last 3 (else 2) tokens; [] if none.

        ids: the sequence, to which tokens may have been added since the last call. A draft that reaches the
        end continues with its own tokens, so a period is repeated.
        """
        for end in range(self._seen, len(ids)):
            for size, places in zip(NGRAMS, self._next, strict=True):
                if end >= size:
                    places[tuple(ids[end - size : end])] = end
        self._seen = len(ids)
        for size, places in zip(NGRAMS, self._next, strict=True):
            start = places.get(tuple(ids[-size:]))
            if start is not None:
                period = len(ids) - start
                return [ids[start + i % period] for i in range(length)]
        return []
