"""Fixed-shape decode gives the tokens that eager decode gives, or refuses and leaves the cache as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem.config import SamplingParams
from lowmem.generate import compiled
from lowmem.generate.cache import KVCache
from lowmem.generate.compiled import CompiledDecode, CompileRefused, default_decode, difference
from lowmem.generate.engine import Engine
from tests.helpers import KINDS, tiny_model

PROMPT = list(range(3, 10))
CAPACITY = 64


HOST = ("_local_scalar_dense", "item", "is_nonzero", "equal", "lift_fresh", "nonzero")


class Recorder(TorchDispatchMode):
    """Notes each operation with the very tensors that it was given, as a CUDA graph does.

    What a capture cannot hold is an error here too: a value that the host reads, a constant from the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Every operation again on the same tensors, its results into the same memory; no Python of ours."""
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordedGraphs:
    """A CUDA graph's twin on the CPU."""

    def __init__(self) -> None:
        self.captured = 0

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        self.captured += 1
        with Recorder() as recorder:
            output = run()
        return output, recorder.replay


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """A compiler counts the models that it has seen and gives up after some."""
    yield
    torch.compiler.reset()


def cache_for(model: Any, capacity: int = CAPACITY) -> KVCache:
    return KVCache(model.config.num_hidden_layers, capacity)


def feed(model: Any, cache: KVCache, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids]), past_key_values=cache).logits[:, -1]
    return logits


def greedy(model: Any, cache: KVCache, prompt: list[int], count: int, step: Any = None) -> list[int]:
    """`count` tokens behind the prompt, decoded by `step` or eagerly."""
    tokens = [int(feed(model, cache, prompt).argmax())]
    for _ in range(count - 1):
        ids = torch.tensor([[tokens[-1]]])
        logits = feed(model, cache, ids[0].tolist()) if step is None else step(ids)
        tokens.append(int(logits.argmax()))
    return tokens


def contents(cache: KVCache) -> list[torch.Tensor]:
    return [t[:, :, : cache.length].clone() for layer in cache.kv_layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_gives_the_eager_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over three windows, behind a prompt that comes after the capture, and in a second conversation."""
    monkeypatch.setattr(compiled, "FIRST_WINDOW", 16)
    model = tiny_model(kind)
    cache, graphs = cache_for(model), RecordedGraphs()
    decode = CompiledDecode(model, cache, graphs=graphs)
    assert cache.length == 0 and graphs.captured == 1
    for prompt, count in ((PROMPT, 45), (PROMPT[::-1] + PROMPT, 20)):
        cache.cut(0)
        assert greedy(model, cache, prompt, count, decode.step) == greedy(
            model, cache_for(model), prompt, count
        )
        assert cache.length == len(prompt) + count - 1
    assert graphs.captured == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_with_it_gives_the_same_tokens(kind: str) -> None:
    """Two turns, the second behind the first one's prefix; no step falls back to the model itself."""
    model = tiny_model(kind)
    with_it, without = (Engine(model, context=CAPACITY, speculate=False) for _ in range(2))
    decode = CompiledDecode(model, with_it.cache, graphs=RecordedGraphs())
    steps: list[int] = []

    def counted(ids: torch.Tensor) -> torch.Tensor:
        logits = decode.step(ids)
        steps.append(int(ids))
        return logits

    with_it.decode = counted
    params = SamplingParams(max_new_tokens=15, temperature=0)
    prompt = PROMPT
    for _ in range(2):
        answers = [[t.id for t in engine.generate(prompt, params)] for engine in (with_it, without)]
        assert answers[0] == answers[1] and len(answers[0]) == 15
        prompt = [*prompt, *answers[0][:9], 5, 6]
    assert with_it.decode is counted and len(steps) == 2 * 14
    assert with_it.cached_tokens == without.cached_tokens > len(PROMPT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_step_gives_the_eager_tokens(kind: str) -> None:
    """torch.compile's tracing in one graph, nothing read by the host, then its eager backend."""
    model = tiny_model(kind)
    cache = cache_for(model)
    decode = CompiledDecode(model, cache, backend="eager")
    assert greedy(model, cache, PROMPT, 20, decode.step) == greedy(model, cache_for(model), PROMPT, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_inductor_step_gives_the_eager_tokens(kind: str) -> None:
    model = tiny_model(kind)
    cache = cache_for(model)
    decode = CompiledDecode(model, cache, backend="inductor")
    assert greedy(model, cache, PROMPT, 20, decode.step) == greedy(model, cache_for(model), PROMPT, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_the_check_is_passed(dtype: torch.dtype) -> None:
    """A mask rounds differently; that is no reason to refuse."""
    model = tiny_model("gpt_bigcode_mqa", dtype=dtype)
    cache = cache_for(model)
    decode = CompiledDecode(model, cache, graphs=RecordedGraphs())
    feed(model, cache, PROMPT)
    logits = decode.step(torch.tensor([[5]]))
    assert logits.dtype is dtype and logits.shape == (1, 4096)


def test_steps_mix_with_eager_ones_and_with_going_back() -> None:
    """A chat: prefill, decode, cut to a common prefix, prefill again; logits stay those of a fresh cache."""
    model = tiny_model("llama")
    cache = cache_for(model)
    decode = CompiledDecode(model, cache, graphs=RecordedGraphs())
    feed(model, cache, PROMPT)
    for token in (11, 12, 13):
        decode.step(torch.tensor([[token]]))
    cache.cut(len(PROMPT) + 1)
    feed(model, cache, [21, 22])
    got = decode.step(torch.tensor([[23]]))
    expected = feed(model, cache_for(model), [*PROMPT, 11, 21, 22, 23])
    assert torch.allclose(got, expected, atol=1e-4)
    assert cache.length == len(PROMPT) + 4
    # And eager decode behind it sees the row that the captured step wrote.
    assert torch.allclose(
        feed(model, cache, [24]), feed(model, cache_for(model), [*PROMPT, 11, 21, 22, 23, 24]), atol=1e-4
    )


def test_an_answers_logits_are_not_written_over_by_the_next() -> None:
    model = tiny_model("llama")
    cache = cache_for(model)
    decode = CompiledDecode(model, cache, graphs=RecordedGraphs())
    feed(model, cache, PROMPT)
    first = decode.step(torch.tensor([[5]]))
    kept = first.clone()
    decode.step(torch.tensor([[6]]))
    assert torch.equal(first, kept)


def test_a_cache_with_contents_keeps_them() -> None:
    """The trial at the start runs behind what is held, and takes away what it added."""
    model = tiny_model("gpt_bigcode_mqa")
    cache = cache_for(model)
    feed(model, cache, PROMPT)
    before = contents(cache)
    CompiledDecode(model, cache, graphs=RecordedGraphs())
    assert cache.length == len(PROMPT) and all(map(torch.equal, contents(cache), before))


@pytest.mark.parametrize("capacity", [1, 2, 3, 4])
def test_small_caches(capacity: int) -> None:
    model = tiny_model("llama")
    cache = cache_for(model, capacity)
    decode = CompiledDecode(model, cache, graphs=RecordedGraphs())
    logits = [decode.step(torch.tensor([[token]])) for token in range(5, 5 + capacity)]
    expected = feed(model, cache_for(model, capacity), list(range(5, 5 + capacity)))
    assert torch.allclose(logits[-1], expected, atol=1e-4)
    with pytest.raises(ValueError, match="full"):
        decode.step(torch.tensor([[1]]))
    with pytest.raises(CompileRefused, match="full"):
        CompiledDecode(model, cache, graphs=RecordedGraphs())


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
    if held:
        feed(model, cache, PROMPT[:held])
    with pytest.raises(CompileRefused, match=reason) as caught:
        CompiledDecode(model, cache, graphs=graphs)
    assert "\n" not in caught.value.reason
    assert cache.length == held
    feed(model, cache, PROMPT[held:])
    assert greedy(model, cache, [11], 10) == greedy(model, cache_for(model), [*PROMPT, 11], 10)


def test_a_step_that_ignores_the_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a window that are not filled must have no weight."""
    model = tiny_model("gpt_bigcode_mqa")
    modeling = __import__(type(model).__module__, fromlist=["_"])
    mask_of = modeling.create_causal_mask

    def unmasked(*args: Any, **kwargs: Any) -> Any:
        mask = mask_of(*args, **kwargs)
        return torch.ones_like(mask) if mask is not None and mask.shape[-1] == CAPACITY else mask

    monkeypatch.setattr(modeling, "create_causal_mask", unmasked)
    with pytest.raises(CompileRefused, match="differ"):
        CompiledDecode(model, cache_for(model), graphs=RecordedGraphs())


def test_a_later_window_that_fails_leaves_the_answer_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an answer the next window cannot be captured: the engine goes on eagerly."""
    monkeypatch.setattr(compiled, "FIRST_WINDOW", 16)
    model = tiny_model("llama")
    cache = cache_for(model)

    class OnlyOnce(RecordedGraphs):
        def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
            return super().capture(run) if self.captured == 0 else _raise()

    decode = CompiledDecode(model, cache, graphs=OnlyOnce())
    tokens = greedy(model, cache, PROMPT, 10, decode.step)
    assert cache.length == 16
    with pytest.raises(CompileRefused, match="not permitted"):
        decode.step(torch.tensor([[tokens[-1]]]))
    assert cache.length == 16 and cache.kv_layers[0].capacity == CAPACITY
    assert tokens + greedy(model, cache, tokens[-1:], 10) == greedy(model, cache_for(model), PROMPT, 20)


def test_an_interrupt_in_a_step_leaves_the_cache_as_it_was() -> None:
    """Ctrl-C comes in the middle of a forward."""
    model = tiny_model("llama")
    cache = cache_for(model)
    decode = CompiledDecode(model, cache, graphs=Wrong(lambda logits: None))
    feed(model, cache, PROMPT)
    before = contents(cache)

    def interrupted(ids: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    size, (window, _) = next(iter(decode._steps.items()))
    decode._steps[size] = (window, interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode.step(torch.tensor([[1]]))
    assert cache.length == len(PROMPT) and all(map(torch.equal, contents(cache), before))
    assert not cache.kv_layers[0].fixed and cache.kv_layers[0].capacity == CAPACITY


def test_new_buffers_are_noticed() -> None:
    """A graph reads and writes the memory that it was captured with."""
    model = tiny_model("llama")
    cache = cache_for(model)
    decode = CompiledDecode(model, cache, graphs=RecordedGraphs())
    feed(model, cache, PROMPT)
    layer = cache.kv_layers[1]
    layer.keys = layer.keys.clone()
    with pytest.raises(CompileRefused, match="buffers"):
        decode.step(torch.tensor([[1]]))


def test_a_model_that_reads_values_on_the_host_is_refused() -> None:
    """Both ways: a capture cannot hold it, and a trace would break in two."""
    model = tiny_model("llama")
    forward = model.model.layers[0].forward

    def nosy(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(hidden * (1.0 if float(hidden.sum()) else 2.0), *args, **kwargs)

    model.model.layers[0].forward = nosy
    for options in ({"graphs": RecordedGraphs()}, {"backend": "eager"}):
        cache = cache_for(model)
        with pytest.raises(CompileRefused, match=r"not permitted|data-dependent|Unsupported|item"):
            CompiledDecode(model, cache, **options)
        assert cache.length == 0


def test_on_a_cpu_decode_stays_eager() -> None:
    model = tiny_model("llama")
    decode, reason = default_decode(model, cache_for(model))
    assert decode is None and reason.startswith("eager") and "CPU" in reason
    with pytest.raises(CompileRefused, match="card"):
        CompiledDecode(model, cache_for(model))


def test_only_one_token_at_a_time() -> None:
    model = tiny_model("llama")
    decode = CompiledDecode(model, cache_for(model), graphs=RecordedGraphs())
    with pytest.raises(ValueError, match=r"\[1, 1\]"):
        decode.step(torch.tensor([[1, 2]]))


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
