"""What every KV cache must do. transformers without a cache is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowmem.generate.cache import dense
from lowmem.generate.cache.contract import FixedView, Slot
from lowmem.generate.cache.dense import DenseKVCache
from tests.helpers import KINDS, tiny_model

CACHES = [DenseKVCache]
every_cache = pytest.mark.parametrize("make", CACHES)


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 512, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def feed(model: Any, slot: Slot, ids: torch.Tensor) -> torch.Tensor:
    """Append ids [1, rows]; returns the logits [rows, vocab]."""
    logits: torch.Tensor = model(input_ids=ids, past_key_values=slot.view, use_cache=True).logits[0]
    slot.commit(ids[0].tolist())
    return logits


@torch.inference_mode()
def fixed_step(model: Any, slot: Slot, view: FixedView, ids: torch.Tensor) -> torch.Tensor:
    view.seek(slot.length)
    place = torch.tensor([[slot.length]])
    logits: torch.Tensor = model(
        input_ids=ids, past_key_values=view, position_ids=place, use_cache=True
    ).logits
    slot.advance(1)
    slot.commit(ids[0].tolist())
    return logits[0]


@every_cache
@pytest.mark.parametrize(("kind", "window"), [*((kind, None) for kind in KINDS), ("starcoder2", 12)])
def test_logits_are_those_without_a_cache(make: Any, kind: str, window: int | None) -> None:
    model = tiny_model(kind, vocab=512)
    ids = ids_of(40)
    with torch.inference_mode():
        whole = model(input_ids=ids).logits[0]
        if window is not None:
            model.config.sliding_window = window
        expected = model(input_ids=ids).logits[0]
    assert torch.equal(expected, whole) == (window is None)
    (slot,) = make(2, 40).slots
    got = torch.cat([feed(model, slot, ids[:, a:b]) for a, b in ((0, 16), (16, 30), (30, 31), (31, 40))])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert slot.length == 40 and slot.tokens == ids[0].tolist()


@every_cache
def test_cut_drops_tokens(make: Any) -> None:
    model, slot = tiny_model("llama", vocab=512), make(2, 64).slots[0]
    ids, other = ids_of(20), ids_of(10, seed=1)
    feed(model, slot, ids)
    slot.cut(10)
    assert slot.tokens == ids[0, :10].tolist()
    after = feed(model, slot, other)
    fresh = make(2, 64).slots[0]
    feed(model, fresh, ids[:, :10])
    torch.testing.assert_close(after, feed(model, fresh, other), rtol=1e-4, atol=1e-4)
    for length in (-1, 21):
        with pytest.raises(ValueError, match="cannot cut"):
            slot.cut(length)
    assert slot.length == len(slot.tokens) == 20


@every_cache
@torch.inference_mode()
def test_slots_do_not_touch_each_other(make: Any) -> None:
    """Sequences that take turns get the bits of a cache of their own, whatever is cut beside them."""
    model = tiny_model("gpt_bigcode_mqa", vocab=512)
    shared, own = make(2, 32, slots=3), [make(2, 32).slots[0] for _ in range(3)]
    parts = [ids_of(4, seed=seed).split([2, 1, 1], dim=1) for seed in range(3)]
    for turn in range(3):
        for slot, alone, part in zip(shared.slots, own, parts, strict=True):
            assert torch.equal(feed(model, slot, part[turn]), feed(model, alone, part[turn]))
    assert shared.nbytes == sum(slot.saved_bytes(32) for slot in own)
    shared.slots[1].cut(1)
    shared.slots[2].cut(0)
    assert [slot.length for slot in shared.slots] == [4, 1, 0]
    more = ids_of(6, seed=9)
    assert torch.equal(feed(model, shared.slots[0], more), feed(model, own[0], more))
    feed(model, shared.slots[2], more)
    own[1].cut(1)
    assert torch.equal(feed(model, shared.slots[1], more), feed(model, own[1], more))
    shared.reset()
    assert [(slot.length, slot.tokens) for slot in shared.slots] == [(0, [])] * 3


@every_cache
def test_an_interrupted_forward_counts_as_the_shortest_layer_and_is_rewound(make: Any) -> None:
    slot, rows = make(3, 16).slots[0], torch.zeros(1, 1, 4, 8)
    for layer in range(3):
        slot.view.update(rows, rows, layer)
    slot.commit([1, 2, 3, 4])
    slot.view.update(rows, rows, 0)  # and then the forward was interrupted
    assert slot.length == 4
    with pytest.raises(ValueError):
        slot.cut(5)
    slot.rewind()
    assert [slot.view.get_seq_length(layer) for layer in range(3)] == [4, 4, 4]
    assert slot.tokens == [1, 2, 3, 4]


@every_cache
def test_rows_that_do_not_fit_are_refused_and_nothing_is_written(make: Any) -> None:
    slot, rows = make(1, 6).slots[0], torch.ones(1, 1, 4, 8)
    slot.view.update(rows, rows, 0)
    with pytest.raises(ValueError, match="8 tokens do not fit in a slot of 6"):
        slot.view.update(2 * rows, rows, 0)
    assert slot.length == 4
    slot.advance(2)
    assert slot.save(6)[0][0, 0, 4:].abs().max() == 0
    for layers, capacity, slots in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError):
            make(layers, capacity, slots)


@every_cache
@pytest.mark.parametrize("kind", KINDS)
def test_fixed_views_give_the_logits_of_growing_ones(make: Any, kind: str) -> None:
    model = tiny_model(kind, vocab=512)
    ids = ids_of(20)
    slot, fixed = make(2, 40, slots=2).slots
    for one in (slot, fixed):
        feed(model, one, ids[:, :12])
    view = fixed.fixed_view(32)
    for step in range(12, 20):
        if step == 16:  # back, and once more
            fixed.cut(14)
            slot.cut(14)
            feed(model, slot, ids[:, 14:16])
            for again in (14, 15):
                fixed_step(model, fixed, view, ids[:, again : again + 1])
        expected = feed(model, slot, ids[:, step : step + 1])
        got = fixed_step(model, fixed, view, ids[:, step : step + 1])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert fixed.length == slot.length == 20 and fixed.tokens == slot.tokens
    more = ids_of(3, seed=2)
    torch.testing.assert_close(feed(model, fixed, more), feed(model, slot, more), rtol=1e-4, atol=1e-4)


@every_cache
def test_saved_rows_come_back_in_any_slot(make: Any) -> None:
    model = tiny_model("llama", vocab=512)
    first, second, other = make(2, 64, slots=3).slots
    assert first.saved_bytes(10) == 0
    ids = ids_of(30)
    feed(model, first, ids)
    rows = first.save(20)
    assert sum(t.nbytes for t in rows) == first.saved_bytes(20) > 0
    feed(model, second, ids_of(9, seed=3))
    feed(model, other, ids_of(9, seed=3))
    second.load(rows, ids[0, :15].tolist())
    assert second.length == 15 and second.tokens == ids[0, :15].tolist()
    assert all(torch.equal(a, b) for a, b in zip(second.save(15), first.save(15), strict=True))
    first.cut(15)
    more = ids_of(4, seed=5)
    assert torch.equal(feed(model, second, more), feed(model, first, more))
    assert other.length == 9


def test_pointers_and_layout_of_a_dense_cache() -> None:
    """A slot's buffers follow those of the slot before it, and hold what was appended."""
    cache, rows = DenseKVCache(2, 16, slots=2), torch.rand(1, 3, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no buffers"):
        cache.slots[0].layout()
    for slot in cache.slots:
        for layer in range(2):
            slot.view.update(rows, rows, layer)
        assert slot.layout() == dense.Layout((3, 16, 8), torch.bfloat16, torch.device("cpu"))
    first, second = (slot.pointers() for slot in cache.slots)
    size = 3 * 16 * 8 * 2
    assert [(b[0] - a[0], b[1] - a[1]) for a, b in zip(first, second, strict=True)] == [(size, size)] * 2
    assert cache.nbytes == 2 * 2 * 2 * size
    cache.slots[0].layers[1].keys = rows
    with pytest.raises(ValueError, match="not stored alike"):
        cache.slots[0].layout()


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "llama"])
def test_a_one_row_step_packs_the_heads_that_share_a_kv_head(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own grouped queries take 22 times as long on a CPU, for a StarChat layer at 8192 tokens."""
    model, slot = tiny_model(kind, vocab=512), DenseKVCache(2, 32).slots[0]
    feed(model, slot, ids_of(12))
    shapes: list[tuple[int, ...]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attention(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        assert not options.get("enable_gqa")
        shapes.append(tuple(query.shape))
        return real(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    feed(model, slot, ids_of(1))
    heads = {"gpt_bigcode_mqa": (1, 1, 4, 16), "llama": (1, 2, 2, 16)}[kind]
    assert shapes == [heads, heads]
