"""Token ids one at a time → text: whole characters only, ended by stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowmem.text.tokenizing import decode

_INCOMPLETE = "\ufffd"  # decoders return this for bytes of an incomplete character


class TextStream:
    """Token ids one at a time → text in whole characters.

    A token may hold a part of a character's bytes; the text waits until they are complete. Each piece is
    what the last tokens add to the text of those before them, since some tokenizers write a token
    differently at the start of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last tokens; older ones do not affect the text any more
        self._given = 0  # the number of `_ids` whose text was returned

    def push(self, token: int) -> str:
        """The text that is complete with this token; it may be empty."""
        self._ids.append(token)
        piece, whole = self._piece()
        if not piece or whole.endswith(_INCOMPLETE):
            return ""
        del self._ids[: self._given]
        self._given = len(self._ids)
        return piece

    def finish(self) -> str:
        """What is left, broken characters as U+FFFD."""
        piece, _ = self._piece()
        self._given = len(self._ids)
        return piece

    def _piece(self) -> tuple[str, str]:
        given, whole = self._text(self._ids[: self._given]), self._text(self._ids)
        return whole[len(given) :], whole

    def _text(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids, skip_special_tokens=True)


class StopStrings:
    """Text piece by piece → the text before the stop string that starts first in it.

    What may be the beginning of a stop string is held back until it is clear, and so is a stop string that
    is there already while a longer one, begun before it, may still come. `found`: the text has ended.
    Without stop strings every piece passes at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty, which would end every text before it begins (ValueError)."""
        if not all(stops):
            raise ValueError("an empty stop string")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is certain with this piece; it may be empty, and always is after the end."""
        if self.found:
            return ""
        self._held += piece
        match, begun = self._match(), self._begun()
        if match <= begun and match < len(self._held):
            return self._end(match)
        return self._release(min(match, begun))

    def finish(self) -> str:
        """What was held back, when no more text comes: all of it, or that before a whole stop string."""
        match = self._match()
        if not self.found and match < len(self._held):
            return self._end(match)
        return self._release(match)

    def _end(self, position: int) -> str:
        self.found = True
        text, self._held = self._held[:position], ""
        return text

    def _release(self, position: int) -> str:
        text, self._held = self._held[:position], self._held[position:]
        return text

    def _match(self) -> int:
        """The start of the first complete stop string in the held text, or the length of that text."""
        starts = [at for at in map(self._held.find, self._stops) if at >= 0]
        return min(starts, default=len(self._held))

    def _begun(self) -> int:
        """Where the first stop string starts that the end of what is held cuts short, or its length."""
        first = max(0, len(self._held) - self._longest + 1)
        for at in range(first, len(self._held)):
            tail = self._held[at:]
            if any(len(stop) > len(tail) and stop.startswith(tail) for stop in self._stops):
                return at
        return len(self._held)


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token, special ones too, as it stands inside a text.

    Some tokenizers leave a word's space out at the start of a text, so that the second of two shows it. A
    part of a character is U+FFFD.
    """
    one, two = (decode(tokenizer, [token] * count, skip_special_tokens=False) for count in (1, 2))
    return two[len(one) :] if two.startswith(one) and len(two) > len(one) else one
