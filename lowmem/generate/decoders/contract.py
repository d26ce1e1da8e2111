"""The interface of a decoder: prefill and decode steps for several sequences at once.

To add one, write a file with a `Decoder`, name it in `selection.py`, and add it to `DECODERS` in
tests/generate/test_decoder_contract.py.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lowmem.checkpoint.files.reading import one_line
from lowmem.generate.cache.contract import Slot


class DecoderRefused(Exception):
    """A decoder does not take this model, or its logits are wrong; `reason` says why in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Feed:
    """Token ids to append to one sequence."""

    slot: Slot
    """Where the sequence's keys and values are."""
    ids: Sequence[int]
    length: int | None = None
    """Of a prefill: tokens of the whole prompt, where this is a chunk of it."""
    keep: int = 1
    """Of a prefill: after how many of its last ids to return logits."""


@dataclass(frozen=True)
class StepOutput:
    """The logits of one step."""

    logits: tuple[torch.Tensor, ...]
    """For each feed, the logits [len(ids), vocab] after each of its ids."""
    rounding: float = 0.0
    """By how much, as a share of the largest logit, the gap between two logits of a row may differ from that
    of a step with this row alone. 0: the bits are the same."""
    timed: bool = True
    """Whether the step did only what every step does, so that its duration is typical."""


class Decoder(ABC):
    """Appends tokens to sequences and returns logits.

    Both methods first drop rows that an interrupted call has left in the slots, and commit the ids to the
    slots after the whole call has succeeded. A sequence's logits and rows do not depend on the other feeds,
    or only by `StepOutput.rounding`.
    Both raise ValueError for a feed without ids, or with more than its slot has room for.
    """

    max_rows: int = sys.maxsize
    """The most ids that one feed of a step may have."""

    @abstractmethod
    def prefill(self, feeds: Sequence[Feed]) -> tuple[torch.Tensor, ...]:
        """Append the ids of each feed; returns the logits [keep, vocab] after the last ids of each."""

    @abstractmethod
    def step(self, feeds: Sequence[Feed]) -> StepOutput:
        """Append one id, or one id and its draft, to each sequence; returns the logits after every id."""


def rewind(feeds: Sequence[Feed]) -> None:
    """Prepare the slots of a prefill or step. Raises ValueError for feeds that do not fit."""
    for feed in feeds:
        feed.slot.rewind()
        free = feed.slot.capacity - len(feed.slot.tokens)
        if not 1 <= len(feed.ids) <= free:
            raise ValueError(f"{len(feed.ids)} tokens for a slot that has room for {free}")


def commit(feeds: Sequence[Feed]) -> None:
    """Record the ids of a prefill or step that has succeeded, without a position scaling."""
    for feed in feeds:
        feed.slot.commit(feed.ids)


@contextmanager
def refusing() -> Iterator[None]:
    """Raise DecoderRefused in place of any other exception of the block."""
    try:
        yield
    except DecoderRefused:
        raise
    except Exception as error:  # compilers, captures and models of a known name raise anything
        raise DecoderRefused(one_line(error)) from error
