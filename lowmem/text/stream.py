"""Stream token ids to text: whole characters only, ended by stop strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lowmem.text.tokenizing import decode

_INCOMPLETE = "\ufffd"  # a decoder's replacement for bytes that are not a whole character (yet)


class TextStream:
    """Decode token ids one at a time to text in whole characters.

    A token may hold only some of a character's bytes; text is held back until they are complete. Each piece
    is the difference that the last tokens make to the text before them, since some tokenizers decode a token
    differently at the start of a text.

    shown: special tokens whose text is part of it.
    """

    def __init__(self, tokenizer: Any, shown: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown: dict[int, str] = {
            token: tokenizer.added_tokens_decoder[token].content for token in shown
        }
        self._ids: list[int] = []  # the tokens that the next piece depends on
        self._given = 0  # how many of them have been returned as text

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes, which may be empty."""
        if token in self._shown:
            piece = self.finish() + self._shown[token]
            self._ids, self._given = [], 0
            return piece
        self._ids.append(token)
        piece, whole = self._piece()
        if not piece or whole.endswith(_INCOMPLETE):
            return ""
        del self._ids[: self._given]
        self._given = len(self._ids)
        return piece

    def finish(self) -> str:
        """Return the remaining text, with U+FFFD for incomplete characters."""
        piece, _ = self._piece()
        self._given = len(self._ids)
        return piece

    def _piece(self) -> tuple[str, str]:
        given, whole = self._text(self._ids[: self._given]), self._text(self._ids)
        return whole[len(given) :], whole

    def _text(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids, skip_special_tokens=True)


class StopStrings:
    """Return streamed text up to the first stop string.

    Text that may be the start of a stop string is held back until the next pieces decide. A complete stop
    string is also held back while a longer one that started earlier may still be completed. Without stop
    strings, `push` returns each piece immediately.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string, which would end every text at once."""
        if not all(stops):
            raise ValueError("an empty stop string")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found = False
        """Whether a stop string was reached."""
        self.text = ""
        """The stop string that was reached."""

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that is no longer held back, always empty after a stop string."""
        if self.found:
            return ""
        self._held += piece
        match, begun = self._match(), self._begun()
        if match <= begun and match < len(self._held):
            return self._end(match)
        return self._release(min(match, begun))

    def finish(self) -> str:
        """End the input; returns the held text, up to a complete stop string if it contains one."""
        match = self._match()
        if not self.found and match < len(self._held):
            return self._end(match)
        return self._release(match)

    def _end(self, position: int) -> str:
        self.found = True
        self.text = next(stop for stop in self._stops if self._held.startswith(stop, position))
        text, self._held = self._held[:position], ""
        return text

    def _release(self, position: int) -> str:
        text, self._held = self._held[:position], self._held[position:]
        return text

    def _match(self) -> int:
        """The start of the first whole stop string in the held text, or the text's length."""
        starts = [at for at in map(self._held.find, self._stops) if at >= 0]
        return min(starts, default=len(self._held))

    def _begun(self) -> int:
        """The start of the first stop string that the held text ends in, or the text's length."""
        first = max(0, len(self._held) - self._longest + 1)
        for at in range(first, len(self._held)):
            tail = self._held[at:]
            if any(len(stop) > len(tail) and stop.startswith(tail) for stop in self._stops):
                return at
        return len(self._held)


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token, special or not, as it appears inside a text.

    Some tokenizers drop a leading space at the start of a text, so the second of two equal tokens is used. A
    part of a character is U+FFFD.
    """
    one, two = (decode(tokenizer, [token] * count, skip_special_tokens=False) for count in (1, 2))
    return two[len(one) :] if two.startswith(one) and len(two) > len(one) else one
