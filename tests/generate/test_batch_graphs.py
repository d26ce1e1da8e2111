"""Graphs of several sequences give eager logits, and touch no other slot. Eager steps are the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowmem.config import SamplingParams
from lowmem.generate.cache.contract import Slot
from lowmem.generate.cache.dense import DenseKVCache
from lowmem.generate.decoders import capture
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.decoders.graph import GraphDecoder
from lowmem.generate.decoders.selection import SelectedDecoder
from lowmem.generate.engine import Engine
from tests.generate.recorded_graphs import RecordedGraphs
from tests.helpers import KINDS, tiny_model

CAPACITY = 64
PROMPTS = [list(range(3, 3 + length)) for length in (5, 20, 9, 31, 12)]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "FIRST_WINDOW", 16)


class Pair:
    """A model's graphs, and eager steps of a cache of its own that get the same tokens."""

    def __init__(self, model: Any, slots: int, graphs: Any = None) -> None:
        layers = model.config.num_hidden_layers
        self.eager = EagerDecoder(model)
        self.cache, self.plain = (DenseKVCache(layers, CAPACITY, slots) for _ in range(2))
        self.decoder = GraphDecoder(self.eager, self.cache, graphs=graphs or RecordedGraphs())

    def read(self, prompts: dict[int, list[int]]) -> None:
        for cache in (self.cache, self.plain):
            self.eager.prefill([Feed(cache.slots[index], ids) for index, ids in prompts.items()])

    def step(self, tokens: dict[int, int]) -> bool:
        """Whether it was one batch. The logits are those of eager steps."""
        got = self.decoder.step([Feed(self.cache.slots[i], [token]) for i, token in tokens.items()])
        right = self.eager.step([Feed(self.plain.slots[i], [token]) for i, token in tokens.items()])
        torch.testing.assert_close(got.logits, right.logits, rtol=1e-4, atol=1e-4)
        assert all(logits.shape == right.logits[0].shape for logits in got.logits)
        return bool(got.rounding)


def rows_of(slot: Slot) -> tuple[torch.Tensor, ...]:
    return slot.save(slot.length)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_the_logits_of_eager_steps(kind: str) -> None:
    """Sequences of different lengths, through three windows; one leaves, another takes its slot."""
    pair = Pair(tiny_model(kind), slots=3)
    pair.read(dict(enumerate(PROMPTS[:3])))
    for turn in range(20):
        assert pair.step({0: turn, 1: 40 + turn, 2: 80 + turn}), pair.decoder.batches.why_not
    pair.cache.slots[1].cut(4)
    pair.plain.slots[1].cut(4)
    pair.read({1: PROMPTS[4]})
    for turn in range(20):
        assert pair.step({2: turn, 1: 7})  # in any order
    assert [slot.tokens for slot in pair.cache.slots] == [slot.tokens for slot in pair.plain.slots]


@pytest.mark.parametrize("held", [1, 30, CAPACITY])
def test_slots_that_are_not_in_the_step_keep_their_rows(held: int) -> None:
    """To the bit, full ones too, and longer ones than the window."""
    pair = Pair(tiny_model("llama"), slots=4)
    pair.read({0: PROMPTS[0], 1: [5] * held, 3: PROMPTS[2]})
    before = rows_of(pair.cache.slots[1])
    assert pair.step({0: 1, 3: 2})
    assert all(map(torch.equal, rows_of(pair.cache.slots[1]), before))
    assert pair.cache.slots[2].length == 0
    pair.cache.slots[1].cut(held // 2)
    pair.plain.slots[1].cut(held // 2)
    assert pair.step({0: 1, 1: 3, 3: 2})


def test_few_sequences_in_far_slots_are_decoded_one_by_one() -> None:
    pair = Pair(tiny_model("llama"), slots=16)
    pair.read({0: PROMPTS[0], 1: PROMPTS[1], 15: PROMPTS[2]})
    assert pair.step({0: 1, 1: 2})
    assert not pair.step({0: 1, 15: 2})
    assert not pair.step({15: 2})
    assert not pair.decoder.batches.why_not


def test_graphs_are_made_once_for_each_number_of_slots_and_window() -> None:
    graphs = RecordedGraphs()
    pair = Pair(tiny_model("llama"), slots=4, graphs=graphs)
    alone = graphs.captured
    pair.read(dict.fromkeys(range(4), PROMPTS[0]))
    for _ in range(9):
        pair.step({0: 1, 1: 2})
    assert graphs.captured == alone + 1
    for _ in range(9):
        pair.step(dict.fromkeys(range(4), 3))
    assert graphs.captured == alone + 3  # the longest reaches the next window
    feeds = [Feed(slot, [1]) for slot in pair.cache.slots]
    assert pair.decoder.step(feeds).timed


def test_a_batch_does_not_pass_the_end_of_a_sliding_window() -> None:
    """Its mask would show the layers what is out of their window. One by one they are right."""
    model = tiny_model("starcoder2")
    model.config.sliding_window = 16
    pair = Pair(model, slots=2)
    pair.read({0: PROMPTS[0], 1: PROMPTS[2]})
    together = [pair.step({0: turn, 1: 50 + turn}) for turn in range(20)]
    assert together == [True] * 7 + [False] * 13
    assert not pair.decoder.batches.why_not


class FailsInBatches(RecordedGraphs):
    """Spoils the logits of several rows, or cannot capture them."""

    def __init__(self, *, raises: bool) -> None:
        super().__init__()
        self.raises = raises

    def capture(self, run: Any) -> Any:
        output, replay = super().capture(run)
        if len(output) == 1:
            return output, replay
        if self.raises:
            raise RuntimeError("out of memory")

        def spoiled() -> None:
            replay()
            output[-1] *= 2

        return output, spoiled


@pytest.mark.parametrize("raises", [True, False])
def test_a_batch_that_fails_is_decoded_one_by_one(raises: bool) -> None:
    pair = Pair(tiny_model("llama"), slots=2, graphs=FailsInBatches(raises=raises))
    pair.read({0: PROMPTS[0], 1: PROMPTS[1]})
    for turn in range(3):
        assert not pair.step({0: turn, 1: turn})
    assert pair.decoder.batches.why_not.startswith("out of memory" if raises else "its logits differ")


@pytest.mark.parametrize("kind", KINDS)
def test_requests_at_once_get_their_tokens(kind: str) -> None:
    """In an engine: the tokens of each alone, greedy and seeded."""
    model = tiny_model(kind)
    engine = Engine(model, context=CAPACITY, slots=4, speculate=False)
    assert isinstance(engine.decoder, SelectedDecoder)
    engine.decoder.fast = decoder = GraphDecoder(engine.decoder.eager, engine.cache, graphs=RecordedGraphs())
    asked = [
        (prompt, SamplingParams(max_new_tokens=6 + 5 * place, temperature=0.9 * (place % 2), seed=place))
        for place, prompt in enumerate(PROMPTS[:4])
    ]
    alone = [[token.id for token in engine.generate(*one)] for one in asked]
    sequences = [engine.start(*one) for one in asked]
    found: list[list[int]] = [[] for _ in asked]
    while not all(sequence.ended for sequence in sequences):
        engine.advance()
        for sequence, tokens in zip(sequences, found, strict=True):
            while (token := sequence.take()) is not None:
                tokens.append(token.id)
            if sequence.ended:
                engine.end(sequence)
    assert found == alone
    assert engine.decoder.fast is decoder and not decoder.batches.why_not
