"""Gaps between two texts: filled, filled up to the end of a line, or only read into the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lowmem.server.lines import limited

if TYPE_CHECKING:
    from lowmem.server.worker import Hole
    from lowmem.session import Response, Session


def fill_hole(
    session: Session, hole: Hole, on_prefill: Callable[[int, int], None], on_token: Callable[[], None]
) -> Iterator[Response]:
    """The pieces of the answer. Raises InvalidRequestError from this call, as `Session.fill_in` does."""
    pieces = session.fill_in(
        hole.prefix,
        hole.suffix,
        hole.params if hole.answered else replace(hole.params, max_new_tokens=1),
        snippets=hole.snippets,
        on_prefill=on_prefill,
        on_token=on_token,
    )
    if not hole.answered:
        return _unanswered(pieces)
    return limited(pieces, hole.limits) if hole.limits else pieces


def _unanswered(pieces: Iterator[Response]) -> Iterator[Response]:
    """The figures of the prompt. Its first token comes from the prefill alone, and is dropped."""
    for response in pieces:
        if response.finish_reason:
            yield replace(response, text="", new_tokens=0, finish_reason="length")
