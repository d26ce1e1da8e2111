"""Prefixes that are kept beside the KV cache: the same bits come back, in the bytes that they may take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.config import SamplingParams
from lowmem.generate.cache.dense import DenseKVCache, DenseSlot
from lowmem.generate.engine import Engine
from lowmem.generate.prefix_store import PrefixStore, common_prefix
from tests.helpers import tiny_model

GREEDY = SamplingParams(max_new_tokens=8, temperature=0)
KIND = "gpt_bigcode_mqa"


def prompts(count: int, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 4000, (length,), generator=generator).tolist() for _ in range(count)]


def filled(layers: int, tokens: int, seed: int, capacity: int = 128) -> DenseSlot:
    """A slot with random rows."""
    slot = DenseKVCache(layers, capacity).slots[0]
    generator = torch.Generator().manual_seed(seed)
    for layer in range(layers):
        rows = [torch.randn(1, 2, tokens, 4, generator=generator) for _ in range(2)]
        slot.view.update(*rows, layer)
    return slot


def answer(engine: Engine, prompt: list[int]) -> list[tuple[int, Any]]:
    params = SamplingParams(max_new_tokens=8, temperature=0, logprobs=3)
    return [(token.id, token.top) for token in engine.generate(prompt, params)]


def test_what_is_kept_comes_back_bit_by_bit() -> None:
    store, ids = PrefixStore(1 << 20), list(range(50))
    first = filled(3, 50, seed=1)
    store.save(ids, first)
    other = filled(3, 60, seed=2)
    other.cut(0)
    assert store.restore([*range(30), 999], other) == 30
    assert other.length == 30
    assert other.tokens == list(range(30))
    assert all(torch.equal(was, now) for was, now in zip(first.save(30), other.save(30), strict=True))


def test_nothing_known_is_nothing_restored() -> None:
    store, cache = PrefixStore(1 << 20), filled(2, 40, seed=1)
    assert store.restore([1, 2], cache) == 0 and store.longest([1, 2]) == 0
    store.save(list(range(40)), cache)
    cache.cut(0)
    assert store.restore([9, 1, 2], cache) == 0 and cache.length == 0


def test_a_longer_sequence_replaces_what_it_continues_and_a_shorter_one_is_not_kept_twice() -> None:
    store, cache = PrefixStore(1 << 20), filled(2, 60, seed=1)
    store.save(list(range(30)), cache)
    small = store.nbytes
    store.save(list(range(60)), cache)
    assert store.nbytes == 2 * small
    store.save(list(range(30)), cache)
    assert store.nbytes == 2 * small and store.longest(list(range(100))) == 60


def test_one_text_with_small_changes_does_not_evict_another() -> None:
    """An editor sends its file again at every keystroke."""
    cache = filled(2, 40, seed=1)
    store = PrefixStore(2 * cache.saved_bytes(128))
    chat = list(range(40))
    store.save(chat, cache)
    for key in range(20):
        store.save([*range(100, 132), *(1000 * key + at for at in range(8))], cache)
    assert store.longest(chat) == 40 and store.longest(list(range(100, 140))) == 32


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(16, 60)), max_size=25), st.integers(0, 20_000))
def test_it_never_holds_more_than_it_may(steps: list[tuple[int, int]], most: int) -> None:
    store, cache = PrefixStore(most), filled(2, 60, seed=1)
    for first, length in steps:
        store.save([first * 1000 + at for at in range(length)], cache)
        assert store.nbytes <= most


def test_the_one_used_least_goes_first() -> None:
    cache = filled(2, 40, seed=1)
    one = 2 * 2 * 2 * 40 * 4 * 4  # layers, keys and values, heads, tokens, numbers, bytes
    store = PrefixStore(2 * one)
    a, b, c = ([start + at for at in range(40)] for start in (0, 100, 200))
    store.save(a, cache)
    store.save(b, cache)
    empty = filled(2, 40, seed=2)
    empty.cut(0)
    assert store.restore(a, empty) == 40
    store.save(c, cache)
    assert [store.longest(ids) for ids in (a, b, c)] == [40, 0, 40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conversations_in_turn_are_answered_as_one_after_the_other(dtype: torch.dtype) -> None:
    """The same bits as of an engine of its own for each, which computes as much of it anew."""
    model = tiny_model(KIND, dtype=dtype)
    shared = Engine(model, context=200, speculate=False)
    shared.store = PrefixStore(1 << 20)
    own = [Engine(model, context=200, speculate=False) for _ in range(3)]
    texts = prompts(3)
    for turn in range(3):
        for number, engine in enumerate(own):
            expected = answer(engine, texts[number])
            assert answer(shared, texts[number]) == expected
            assert shared.sequence.cached_tokens == engine.sequence.cached_tokens
            assert (engine.sequence.cached_tokens >= 40) == (turn > 0)
            texts[number] = [*texts[number], *(token for token, _ in expected), 7, 8, 9 + number]


def test_without_room_it_is_as_if_it_were_not_there() -> None:
    model = tiny_model(KIND)
    engine = Engine(model, context=200, speculate=False)
    engine.store = PrefixStore(100)
    first, second = prompts(2)
    before = answer(engine, first)
    answer(engine, second)
    assert answer(engine, first) == before
    assert engine.sequence.cached_tokens == 0 and engine.store.nbytes == 0


def test_an_interrupted_prefill_is_kept_up_to_where_it_is_right() -> None:
    """What a client that left has had computed is of use when it asks again."""
    model = tiny_model(KIND)
    engine = Engine(model, context=200, speculate=False, chunk=16)
    engine.store = PrefixStore(1 << 20)
    first, second = prompts(2, length=60)
    expected = answer(Engine(model, context=200, speculate=False, chunk=16), first)

    class Left(Exception):
        pass

    def leave(done: int, total: int) -> None:
        if done == 32:
            raise Left

    with pytest.raises(Left):
        next(iter(engine.generate(first, GREEDY, leave)))
    answer(engine, second)
    assert answer(engine, first) == expected
    assert engine.sequence.cached_tokens == 32


def test_reset_forgets_what_is_kept_too() -> None:
    engine = Engine(tiny_model(KIND), context=200, speculate=False)
    engine.store = PrefixStore(1 << 20)
    for prompt in prompts(2):
        answer(engine, prompt)
    assert engine.store.nbytes
    engine.reset()
    assert engine.store.nbytes == 0


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0 and common_prefix([1, 2], [1, 2, 3]) == 2
