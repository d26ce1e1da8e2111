"""Captured steps give the tokens of eager steps, or are refused and leave the cache as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lowmem.config import SamplingParams
from lowmem.generate.cache.dense import DenseKVCache, DenseSlot
from lowmem.generate.decoders import capture
from lowmem.generate.decoders.capture import difference
from lowmem.generate.decoders.contract import Decoder, DecoderRefused, Feed
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.decoders.graph import GraphDecoder
from lowmem.generate.decoders.selection import SelectedDecoder
from lowmem.generate.engine import Engine
from tests.generate.recorded_graphs import RecordedGraphs
from tests.helpers import KINDS, tiny_model

PROMPT = list(range(3, 10))
CAPACITY = 64


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """A compiler counts the models that it has seen and gives up after some."""
    yield
    torch.compiler.reset()


def cache_for(model: Any, capacity: int = CAPACITY) -> DenseKVCache:
    return DenseKVCache(model.config.num_hidden_layers, capacity)


def graphs_for(model: Any, cache: DenseKVCache, graphs: Any = None, **options: Any) -> GraphDecoder:
    if not options:
        options = {"graphs": graphs or RecordedGraphs()}
    return GraphDecoder(EagerDecoder(model), cache, **options)


def feed(model: Any, slot: DenseSlot, ids: list[int]) -> torch.Tensor:
    return EagerDecoder(model).prefill([Feed(slot, ids)])[0]


def step(decoder: Decoder, slot: DenseSlot, token: int) -> torch.Tensor:
    return decoder.step([Feed(slot, [token])]).logits[0]


def greedy(decoder: Decoder, slot: DenseSlot, prompt: list[int], count: int) -> list[int]:
    """`count` tokens behind the prompt."""
    tokens = [int(decoder.prefill([Feed(slot, prompt)])[0].argmax())]
    while len(tokens) < count:
        tokens.append(int(step(decoder, slot, tokens[-1]).argmax()))
    return tokens


def eager_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    return greedy(EagerDecoder(model), cache_for(model).slots[0], prompt, count)


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_gives_the_eager_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over three windows, behind a prompt that comes after the capture, and in a second conversation."""
    monkeypatch.setattr(capture, "FIRST_WINDOW", 16)
    model = tiny_model(kind)
    cache, graphs = cache_for(model), RecordedGraphs()
    decoder, (slot,) = graphs_for(model, cache, graphs), cache.slots
    assert slot.length == 0 and graphs.captured == 1
    for prompt, count in ((PROMPT, 45), (PROMPT[::-1] + PROMPT, 20)):
        cache.reset()
        assert greedy(decoder, slot, prompt, count) == eager_tokens(model, prompt, count)
        assert slot.length == len(prompt) + count - 1
    assert graphs.captured == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_with_it_gives_the_same_tokens(kind: str) -> None:
    """Two turns, the second behind the first one's prefix; no step falls back to the model itself."""
    model = tiny_model(kind)
    with_it, without = (Engine(model, context=CAPACITY, speculate=False) for _ in range(2))
    assert isinstance(with_it.decoder, SelectedDecoder)
    with_it.decoder.fast = decoder = graphs_for(model, with_it.cache)
    params = SamplingParams(max_new_tokens=15, temperature=0)
    prompt = PROMPT
    for _ in range(2):
        answers = [[t.id for t in engine.generate(prompt, params)] for engine in (with_it, without)]
        assert answers[0] == answers[1] and len(answers[0]) == 15
        prompt = [*prompt, *answers[0][:9], 5, 6]
    assert with_it.decoder.fast is decoder
    assert with_it.sequence.cached_tokens == without.sequence.cached_tokens > len(PROMPT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_step_gives_the_eager_tokens(kind: str) -> None:
    """torch.compile's tracing in one graph, nothing read by the host, then its eager backend."""
    model = tiny_model(kind)
    cache = cache_for(model)
    decoder = graphs_for(model, cache, backend="eager")
    assert greedy(decoder, cache.slots[0], PROMPT, 20) == eager_tokens(model, PROMPT, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_inductor_step_gives_the_eager_tokens(kind: str) -> None:
    model = tiny_model(kind)
    cache = cache_for(model)
    decoder = graphs_for(model, cache, backend="inductor")
    assert greedy(decoder, cache.slots[0], PROMPT, 20) == eager_tokens(model, PROMPT, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_the_check_is_passed(dtype: torch.dtype) -> None:
    """A mask changes the rounding; that must not be refused."""
    model = tiny_model("gpt_bigcode_mqa", dtype=dtype)
    cache = cache_for(model)
    decoder, (slot,) = graphs_for(model, cache), cache.slots
    feed(model, slot, PROMPT)
    logits = step(decoder, slot, 5)
    assert logits.dtype is dtype and logits.shape == (1, 4096)


def test_steps_mix_with_eager_ones_and_with_going_back() -> None:
    """A chat: prefill, decode, cut to a common prefix, prefill again; logits stay those of a fresh cache."""
    model = tiny_model("llama")
    cache = cache_for(model)
    decoder, (slot,) = graphs_for(model, cache), cache.slots
    feed(model, slot, PROMPT)
    for token in (11, 12, 13):
        step(decoder, slot, token)
    slot.cut(len(PROMPT) + 1)
    feed(model, slot, [21, 22])
    got = step(decoder, slot, 23)
    expected = feed(model, cache_for(model).slots[0], [*PROMPT, 11, 21, 22, 23])
    assert torch.allclose(got, expected, atol=1e-4)
    assert slot.length == len(PROMPT) + 4
    # An eager step behind it sees the row that the captured step wrote.
    fresh = feed(model, cache_for(model).slots[0], [*PROMPT, 11, 21, 22, 23, 24])
    assert torch.allclose(feed(model, slot, [24]), fresh, atol=1e-4)


def test_an_answers_logits_are_not_written_over_by_the_next() -> None:
    model = tiny_model("llama")
    cache = cache_for(model)
    decoder, (slot,) = graphs_for(model, cache), cache.slots
    feed(model, slot, PROMPT)
    first = step(decoder, slot, 5)
    kept = first.clone()
    step(decoder, slot, 6)
    assert torch.equal(first, kept)


def test_a_cache_with_contents_keeps_them() -> None:
    """The trial at the start runs behind what the slot holds, and removes what it added."""
    model = tiny_model("gpt_bigcode_mqa")
    cache = cache_for(model)
    (slot,) = cache.slots
    feed(model, slot, PROMPT)
    before = slot.save(len(PROMPT))
    graphs_for(model, cache)
    assert slot.length == len(PROMPT) and all(map(torch.equal, slot.save(len(PROMPT)), before))


@pytest.mark.parametrize("capacity", [1, 2, 3, 4])
def test_small_caches(capacity: int) -> None:
    model = tiny_model("llama")
    cache = cache_for(model, capacity)
    decoder, (slot,) = graphs_for(model, cache), cache.slots
    logits = [step(decoder, slot, token) for token in range(5, 5 + capacity)]
    expected = feed(model, cache_for(model, capacity).slots[0], list(range(5, 5 + capacity)))
    assert torch.allclose(logits[-1], expected, atol=1e-4)
    with pytest.raises(ValueError, match="room for 0"):
        step(decoder, slot, 1)
    with pytest.raises(DecoderRefused, match="full"):
        graphs_for(model, cache)


class Wrong(RecordedGraphs):
    """A graph whose replays give something else."""

    def __init__(self, spoil: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.spoil = spoil

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        output, replay = super().capture(run)

        def spoiled() -> None:
            replay()
            self.spoil(output)

        return output, spoiled


def _raise(*_: Any) -> Any:
    raise RuntimeError("CUDA error: operation not permitted\nand much more")


class FailsToCapture(RecordedGraphs):
    capture = _raise


@pytest.mark.parametrize(
    "graphs, reason",
    [
        (Wrong(lambda logits: logits.zero_()), "differ"),
        (Wrong(lambda logits: logits.mul_(1.01)), "differ"),
        (Wrong(lambda logits: logits[0, 0].fill_(float("nan"))), "differ"),
        (Wrong(_raise), "not permitted"),
        (FailsToCapture(), "not permitted"),
    ],
)
@pytest.mark.parametrize("held", [0, 5])
def test_what_fails_is_refused_and_the_cache_is_right(graphs: Any, reason: str, held: int) -> None:
    model = tiny_model("llama")
    cache = cache_for(model)
    (slot,) = cache.slots
    if held:
        feed(model, slot, PROMPT[:held])
    with pytest.raises(DecoderRefused, match=reason) as caught:
        graphs_for(model, cache, graphs)
    assert "\n" not in caught.value.reason
    assert slot.length == held
    feed(model, slot, PROMPT[held:])
    expected = eager_tokens(model, [*PROMPT, 11], 10)
    assert greedy(EagerDecoder(model), slot, [11], 10) == expected


def test_a_step_that_ignores_the_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a window that are not filled must have no weight."""
    model = tiny_model("gpt_bigcode_mqa")
    modeling = __import__(type(model).__module__, fromlist=["_"])
    mask_of = modeling.create_causal_mask

    def unmasked(*args: Any, **kwargs: Any) -> Any:
        mask = mask_of(*args, **kwargs)
        return torch.ones_like(mask) if mask is not None and mask.shape[-1] == CAPACITY else mask

    monkeypatch.setattr(modeling, "create_causal_mask", unmasked)
    with pytest.raises(DecoderRefused, match="differ"):
        graphs_for(model, cache_for(model))


def test_a_later_window_that_fails_leaves_the_answer_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an answer the next window cannot be captured: the answer goes on eagerly."""
    monkeypatch.setattr(capture, "FIRST_WINDOW", 16)
    model = tiny_model("llama")
    cache = cache_for(model)
    (slot,) = cache.slots

    class OnlyOnce(RecordedGraphs):
        def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
            return super().capture(run) if self.captured == 0 else _raise()

    decoder = graphs_for(model, cache, OnlyOnce())
    tokens = greedy(decoder, slot, PROMPT, 10)
    assert slot.length == 16
    with pytest.raises(DecoderRefused, match="not permitted"):
        step(decoder, slot, tokens[-1])
    slot.rewind()
    assert slot.length == len(slot.tokens) == 16
    assert tokens + greedy(EagerDecoder(model), slot, tokens[-1:], 10) == eager_tokens(model, PROMPT, 20)


def test_new_buffers_are_noticed() -> None:
    """A graph reads and writes the memory that it was captured with."""
    model = tiny_model("llama")
    cache = cache_for(model)
    decoder, (slot,) = graphs_for(model, cache), cache.slots
    feed(model, slot, PROMPT)
    layer = slot.layers[1]
    assert layer.keys is not None
    layer.keys = layer.keys.clone()
    with pytest.raises(DecoderRefused, match="buffers"):
        step(decoder, slot, 1)


def test_a_model_that_reads_values_on_the_host_is_refused() -> None:
    """Both ways: a capture cannot hold it, and a trace would break in two."""
    model = tiny_model("llama")
    forward = model.model.layers[0].forward

    def nosy(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(hidden * (1.0 if float(hidden.sum()) else 2.0), *args, **kwargs)

    model.model.layers[0].forward = nosy
    for options in ({"graphs": RecordedGraphs()}, {"backend": "eager"}):
        cache = cache_for(model)
        with pytest.raises(DecoderRefused, match=r"not permitted|data-dependent|Unsupported|item"):
            graphs_for(model, cache, **options)
        assert cache.slots[0].length == 0


def test_a_cpu_has_no_cuda_graphs() -> None:
    model = tiny_model("llama")
    with pytest.raises(DecoderRefused, match="card"):
        GraphDecoder(EagerDecoder(model), cache_for(model))
    selected = SelectedDecoder(model, cache_for(model), graphs=True)
    assert selected.fast is None and "card" in selected.why_eager


def test_difference() -> None:
    logits = torch.tensor([[1.0, 5.0, 4.9999, -2.0]])
    assert difference(logits.clone(), logits) == ""
    assert difference(logits[:, [0, 2, 1, 3]], logits) == ""  # as likely, as far as rounding can tell
    assert "differ" in difference(logits + torch.tensor([[0.0, 0.0, 0.5, 0.0]]), logits)
    assert "logits" in difference(logits.half(), logits)
    flat = torch.zeros(1, 10000)
    flat[0, :3] = torch.tensor([100.0, 10.0, 10.02])
    swapped = flat.clone()
    swapped[0, 0] = 9.99
    assert "differ" in difference(swapped, flat)
