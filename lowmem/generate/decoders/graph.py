"""Decode steps with fixed shapes, captured once and replayed as graphs of a card.

An eager step of a model of 40 layers launches some 700 kernels one by one; a graph launches them as one. It
is captured from the eager step itself, so it needs no compiler, works with any kernel that does not wait for
the host, and keeps what transformers does in eager mode only: its compiled attention expands a multi-query
cache to all heads, 200 MB a layer for StarChat Alpha at 8192 tokens. torch.compile's backends can be chosen
instead.

With fixed shapes attention also reads rows that are not filled yet. So there is one graph for each window of
a slot, 512 tokens and each power of two above, made when the sequence first reaches it. Each is compared with
the eager step before it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lowmem.cards.find import cards_of, is_card
from lowmem.generate.cache.contract import FixedView, KVCache, Slot
from lowmem.generate.decoders.contract import (
    Decoder,
    DecoderRefused,
    Feed,
    StepOutput,
    commit,
    refusing,
    rewind,
)
from lowmem.generate.decoders.eager import EagerDecoder

CARD_GRAPH = "graph"
FIRST_WINDOW = 512
# Relative, in the 2-norm of the logits: a mask, or another kernel for it, sums in another order.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.03}
_WARM_UPS = 2  # the first calls load kernels and allocate workspaces, which a capture cannot do
_DUMMY_TOKENS = 8


class Graphs(Protocol):
    """Captures a step. Tests replace it with a recorder that runs on the CPU."""

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Returns the tensor that every replay fills, and the replay."""


class CardGraphs:
    """torch's graphs of a card, all in one memory pool: the only code here that a CPU cannot run.

    Raises DecoderRefused if torch has none for the device.
    """

    def __init__(self, device: torch.device) -> None:
        if not is_card(device):
            raise DecoderRefused(f"a graph needs a card; the model is on {device}")
        self.device, self._cards = device, cards_of(device)
        self._pool: Any = None
        if problem := self._cards.why_no_graph():
            raise DecoderRefused(problem)

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """See `Graphs`. Nothing runs while it is captured; an operation that waits for the host raises."""
        with self._cards.capturing(self.device, self._pool) as graph:
            output = run()
        self._pool = graph.pool()
        return output, graph.replay


@dataclass(frozen=True)
class _Window:
    """A step over the first rows of one slot."""

    view: FixedView
    pointers: list[tuple[int, int]]
    """The slot's buffers when the step was captured."""
    run: Callable[[], torch.Tensor]
    """Decodes the id in the decoder's input; returns logits [1, vocab] of its own memory."""


class GraphDecoder(Decoder):
    """Decodes one token of each sequence at a time by replaying graphs of the eager step.

    cache: its contents are kept. backend: CARD_GRAPH, or a backend of torch.compile. Raises DecoderRefused
    if the first slot's step cannot be captured or differs from the eager one.
    """

    max_rows = 1

    def __init__(
        self,
        eager: EagerDecoder,
        cache: KVCache,
        *,
        backend: str = CARD_GRAPH,
        graphs: Graphs | None = None,
    ) -> None:
        self.eager, self.backend = eager, backend
        if eager.scaling:
            raise DecoderRefused("the rotary embedding depends on the length of the sequence")
        parameters = inspect.signature(eager.model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._windows: dict[tuple[int, int], _Window] = {}  # by slot and size
        if graphs is None and backend == CARD_GRAPH:
            graphs = CardGraphs(eager.device)
        self._graphs = graphs
        self._input = torch.zeros((1, 1), dtype=torch.long, device=eager.device)
        slot = cache.slots[0]
        if slot.length == slot.capacity:
            raise DecoderRefused("the KV cache is full")
        try:
            with torch.inference_mode(), refusing():
                self._try_out(slot)
        finally:
            slot.rewind()

    def prefill(self, feeds: Sequence[Feed]) -> tuple[torch.Tensor, ...]:
        """See `Decoder.prefill`."""
        return self.eager.prefill(feeds)

    def step(self, feeds: Sequence[Feed]) -> StepOutput:
        """See `Decoder.step`. Raises DecoderRefused, and ValueError for several ids of a feed."""
        known = len(self._windows)
        rewind(feeds)
        with torch.inference_mode():
            logits = tuple([self._step(feed.slot, feed.ids) for feed in feeds])
        commit(feeds)
        return StepOutput(logits, timed=known == len(self._windows))

    def _step(self, slot: Slot, ids: Sequence[int]) -> torch.Tensor:
        if len(ids) != 1:
            raise ValueError(f"a graph decodes one token of a sequence, not {len(ids)}")
        with refusing():
            logits = self._run(self._window(slot, ids[0]), slot, ids[0])
        slot.advance(1)
        return logits

    def _run(self, window: _Window, slot: Slot, token: int) -> torch.Tensor:
        self._input.fill_(token)
        window.view.seek(slot.length)
        return window.run()

    def _try_out(self, slot: Slot) -> None:
        """Check two steps behind some tokens, so that attention has rows to read and the position moves."""
        room = slot.capacity - slot.length
        tokens = [number % self.eager.vocabulary for number in range(1, _DUMMY_TOKENS + 3)]
        if slot.length == 0 and room > 2:
            self.eager.append(slot, tokens[: min(_DUMMY_TOKENS, room - 2)], keep=1)
        for token in tokens[: -1 - min(2, slot.capacity - slot.length) : -1]:
            self._check(self._window(slot, token), slot, token)
            self.eager.append(slot, [token], keep=1)

    def _window(self, slot: Slot, token: int) -> _Window:
        """The step for the slot's length. The first of each window is made, and checked with `token`."""
        size = FIRST_WINDOW
        while size < slot.length + 1:
            size *= 2
        key = slot.index, min(size, slot.capacity)
        window = self._windows.get(key)
        if window is None:
            if slot.length == 0:  # the slot may have no buffers yet
                self.eager.append(slot, [token], keep=1)
                slot.cut(0)
            view = slot.fixed_view(key[1])
            window = _Window(view, slot.pointers(), self._captured(view, slot.length))
            self._check(window, slot, token)
            self._windows[key] = window
        if window.pointers != slot.pointers():
            raise DecoderRefused("the KV cache has new buffers")
        return window

    def _captured(self, view: FixedView, position: int) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            output = self.eager.model(
                input_ids=self._input, past_key_values=view, use_cache=True, **self._options
            )
            logits: torch.Tensor = output.logits[:, -1]
            return logits

        if self._graphs is None:
            compiled: Callable[[], torch.Tensor] = torch.compile(
                forward, backend=self.backend, fullgraph=True, dynamic=False
            )
            return lambda: compiled().clone()
        view.seek(position)
        for _ in range(_WARM_UPS):
            forward()
        output, replay = self._graphs.capture(forward)

        def run() -> torch.Tensor:
            replay()
            return output.clone()  # the next replay overwrites it

        return run

    def _check(self, window: _Window, slot: Slot, token: int) -> None:
        """Compare with the eager step in the same state. Raises DecoderRefused; the slot keeps its length."""
        length = slot.length
        expected = self.eager.append(slot, [token], keep=1)
        slot.cut(length)
        problem = difference(self._run(window, slot, token), expected)
        if problem:
            raise DecoderRefused(problem)


def difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    """How logits [1, vocab] differ from the eager ones by more than rounding; "" if they do not.

    The most likely token must be the same, or one that is as likely in the eager logits within the tolerance.
    """
    if got.shape != expected.shape or got.dtype is not expected.dtype:
        return f"logits {list(got.shape)} of {got.dtype}, eager {list(expected.shape)} of {expected.dtype}"
    tolerance = TOLERANCES[expected.dtype]
    got, expected = got.float(), expected.float()
    error = float((got - expected).norm() / expected.norm())
    if not error <= tolerance:  # true for NaN
        return f"its logits differ from the eager ones by {error:.2g} of their norm"
    short = float(expected.max() - expected[0, got.argmax()])
    if short > tolerance * float(expected.abs().max()):
        return "its most likely token is not the eager one"
    return ""
