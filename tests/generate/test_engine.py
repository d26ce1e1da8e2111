"""The engine: transformers' generate is the oracle; every way an answer can end, and what is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, LowmemError
from lowmem.generate import engine as engine_module
from lowmem.generate import sequence as sequence_module
from lowmem.generate.cache import contract as cache_contract
from lowmem.generate.cache import dense
from lowmem.generate.cache.contract import Slot
from lowmem.generate.decoders import contract as decoder_contract
from lowmem.generate.decoders import eager as eager_module
from lowmem.generate.decoders import selection
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.decoders.selection import SelectedDecoder
from lowmem.generate.engine import Engine
from lowmem.generate.sequence import Token
from lowmem.loading.loader import LoadOptions, load
from lowmem.models.positions import context_length
from tests.helpers import KINDS, TINY_STARCHAT, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

GREEDY = SamplingParams(temperature=0, max_new_tokens=40)
SHORT = SamplingParams(temperature=0, max_new_tokens=8)


class Counting(nn.Module):
    """Always says one more than the last id; 16 positions, 12 ids, and a record of what it was fed.

    Its cache holds the ids themselves, so that `held` tells what the engine has left in it.
    """

    def __init__(self, nan_at: int = -1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 1)
        text = SimpleNamespace(max_position_embeddings=16, num_hidden_layers=2)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.fed: list[list[int]] = []
        self.nan_at = nan_at

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        self.fed.append(input_ids[0].tolist())
        for layer in range(2):
            states = input_ids.float()[:, None, :, None]
            past_key_values.update(states, states, layer)
        logits = nn.functional.one_hot((input_ids + 1) % 12, 12).float()
        if int(input_ids[0, -1]) == self.nan_at:
            logits[:] = torch.nan
        return SimpleNamespace(logits=logits)


def counting(model: Counting, **options: Any) -> Engine:
    return Engine(model, context=16, speculate=False, **options)


def ids(tokens: Iterator[Token]) -> list[int]:
    return [token.id for token in tokens]


def prompt_of(length: int, vocab: int = 512, seed: int = 2) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(1, vocab, (length,), generator=generator)]


def transformers_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return [int(token) for token in output[0, len(prompt) :]]


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_transformers_at_any_chunk(kind: str, chunk: int) -> None:
    model = tiny_model(kind, vocab=512)
    prompt = prompt_of(9)
    tokens = list(Engine(model, context=256, chunk=chunk).generate(prompt, GREEDY))
    assert [token.id for token in tokens] == transformers_tokens(model, prompt, 40)
    assert [token.finish_reason for token in tokens] == [None] * 39 + ["length"]


@pytest.mark.parametrize("speculate", [False, True])
def test_greedy_tokens_of_a_packed_model_are_those_of_the_dequantized_one(
    tmp_path: Path, speculate: bool
) -> None:
    dense = write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "q")
    packed = load(tmp_path / "q").model
    prompt = prompt_of(20, vocab=4096)
    engine = Engine(packed, context=128, chunk=8, speculate=speculate)
    assert ids(engine.generate(prompt, GREEDY)) == transformers_tokens(dense, prompt, 40)


def test_seeded_sampling_repeats() -> None:
    model = tiny_model("gpt_bigcode_mqa", vocab=512)
    engine = Engine(model, context=64)

    def draw(seed: int) -> list[int]:
        params = SamplingParams(temperature=1.5, max_new_tokens=20, top_k=0, top_p=1, seed=seed)
        return ids(engine.generate([5, 6, 7], params))

    assert draw(4) == draw(4) != draw(5)


def test_prefill_is_the_first_next_and_decode_feeds_one_token() -> None:
    model = Counting()
    tokens = counting(model).generate([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=3))
    assert model.fed == []
    assert next(tokens) == Token(4, None)
    assert model.fed == [[1, 2, 3]]
    assert list(tokens) == [Token(5, None), Token(6, "length")]
    assert model.fed == [[1, 2, 3], [4], [5]]


def test_prefill_is_fed_in_chunks_and_told() -> None:
    model, progress = Counting(), []
    engine = counting(model, chunk=4)
    next(engine.generate(list(range(1, 11)), GREEDY, lambda done, total: progress.append((done, total))))
    assert model.fed == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert progress == [(4, 10), (8, 10), (10, 10)]
    progress.clear()
    next(engine.generate([1, 2, 3, 4, 5, 0], GREEDY, lambda done, total: progress.append((done, total))))
    assert model.fed[3:] == [[0]] and progress == [(6, 6)]


def test_stops_at_a_stop_id_and_gives_it() -> None:
    tokens = list(counting(Counting(), stop_ids=[9, 5]).generate([1], GREEDY))
    assert [token.id for token in tokens] == [2, 3, 4, 5]
    assert tokens[-1].finish_reason == "stop"


def test_a_stop_id_as_the_last_allowed_token_is_a_stop() -> None:
    engine = counting(Counting(), stop_ids=[3])
    assert list(engine.generate([1], SamplingParams(temperature=0, max_new_tokens=2)))[-1] == Token(3, "stop")


@pytest.mark.parametrize("length", [1, 10, 15, 16])
def test_ends_where_the_context_ends(length: int) -> None:
    """16 positions: the last token read is at the 16th, so 17 - length tokens can be given."""
    model = Counting()
    tokens = list(counting(model).generate([1] * length, GREEDY))
    assert len(tokens) == 17 - length
    assert tokens[-1].finish_reason == "context"
    assert sum(map(len, model.fed)) == 16


@pytest.mark.parametrize("speculate", [False, True])
def test_context_limit_of_a_real_model_is_no_index_error(speculate: bool) -> None:
    model = tiny_model("gpt_bigcode_mqa", vocab=512, positions=16)
    engine = Engine(model, context=16, speculate=speculate)
    tokens = list(engine.generate([1] * 10, GREEDY))
    assert len(tokens) == 7 and tokens[-1].finish_reason == "context"


def test_a_smaller_context_than_the_model_has() -> None:
    engine = Engine(Counting(), context=12)
    assert list(engine.generate([1] * 10, GREEDY))[-1].finish_reason == "context"
    with pytest.raises(InvalidRequestError, match=r"13 tokens.*12.*--context 13 or more, up to 16"):
        engine.generate([1] * 13, GREEDY)
    with pytest.raises(InvalidRequestError, match=r"17 tokens.*positions for 16"):
        engine.generate([1] * 17, GREEDY)
    with pytest.raises(InvalidRequestError, match=r"17 tokens.*16 positions.*--context 16"):
        Engine(Counting(), context=17)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1] * 17, "17 tokens.*16"), ([12], "vocabulary of 12"), ([-1], "vocabulary of 12")],
    ids=["empty", "long", "high", "negative"],
)
def test_bad_prompts_are_refused_at_once(prompt: list[int], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        counting(Counting()).generate(prompt, GREEDY)


def test_bad_settings_are_refused_at_once() -> None:
    with pytest.raises(InvalidRequestError, match="top_p"):
        counting(Counting()).generate([1], SamplingParams(top_p=0))


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_output_that_is_not_finite_is_said(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=1, max_new_tokens=5)
    tokens = counting(Counting(nan_at=3)).generate([1], params)
    assert [next(tokens).id, next(tokens).id] == [2, 3]
    with pytest.raises(LowmemError, match="not finite"):
        next(tokens)


def test_inference_mode_does_not_leak_to_the_caller() -> None:
    model = tiny_model("llama", vocab=512)
    tokens = Engine(model, context=64).generate([1, 2], GREEDY)
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    tokens.close()  # type: ignore[attr-defined]
    assert torch.is_grad_enabled()


def test_context_length_of_each_kind() -> None:
    for kind in ("gpt_bigcode_mqa", "llama", "starcoder2"):
        assert context_length(tiny_model(kind, vocab=512, positions=128)) == 128


def test_logprobs_are_those_of_the_models_distribution() -> None:
    """Temperature, penalty and filters do not show in them."""
    model = tiny_model("llama", vocab=512)
    prompt = prompt_of(5)
    params = SamplingParams(
        temperature=0.3, top_k=3, repetition_penalty=1.3, seed=1, max_new_tokens=6, logprobs=2
    )
    tokens = list(Engine(model, context=64).generate(prompt, params))
    whole = prompt + [token.id for token in tokens]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
    for place, token in enumerate(tokens, len(prompt) - 1):
        best = expected[place].topk(2)
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-4)
        assert [id for id, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert next(Engine(model, context=64).generate(prompt, GREEDY)).top == ()


# What the KV cache keeps from one request to the next


def fed_tokens(model: Any, run: Callable[[], object]) -> int:
    """How many tokens went through the model while `run` ran."""
    fed: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: fed.append(args[0].numel())
    )
    run()
    handle.remove()
    return sum(fed)


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "llama"])
def test_a_kept_cache_gives_the_tokens_of_a_fresh_engine(kind: str) -> None:
    model = tiny_model(kind, vocab=512)
    engine = Engine(model, context=256, chunk=16, speculate=False)
    first = prompt_of(40)
    answer = ids(engine.generate(first, SHORT))
    turn = [*first, *answer, 7, 8, 9]  # all but the answer's last token are in the cache
    edited = [*turn[:20], 500, *turn[21:]]
    requests = [(turn, 40 + 7), (turn, 50), (edited, 20), (edited[:30], 29), (prompt_of(12, seed=3), 0)]
    for prompt, cached in requests:
        got: list[int] = []

        def run(prompt: list[int] = prompt, got: list[int] = got) -> None:
            got += ids(engine.generate(prompt, SHORT))

        fed = fed_tokens(model, run)
        assert got == ids(Engine(model, context=256).generate(prompt, SHORT))
        assert engine.sequence.cached_tokens == cached
        assert fed == len(prompt) - cached + 7  # the answer's last token is never read
        assert engine.cache.slots[0].length == len(engine.cache.slots[0].tokens) == len(prompt) + 7


def test_reset_forgets() -> None:
    model = Counting()
    engine = counting(model)
    for cached in (0, 0):
        ids(engine.generate([1, 2, 3], SHORT))
        assert engine.sequence.cached_tokens == cached
        engine.reset()
    assert engine.cache.slots[0].length == 0


def test_closed_early_and_never_started() -> None:
    model = tiny_model("gpt_bigcode_mqa", vocab=512)
    engine, prompt = Engine(model, context=128), prompt_of(30)
    expected = ids(Engine(model, context=128).generate(prompt, GREEDY))
    engine.generate(prompt_of(8, seed=5), GREEDY)
    for steps in (1, 3, 30):
        tokens = engine.generate(prompt, GREEDY)
        assert [next(tokens).id for _ in range(steps)] == expected[:steps]
        tokens.close()  # type: ignore[attr-defined]
        assert ids(engine.generate(prompt, GREEDY)) == expected


def test_an_older_request_ends_when_another_begins() -> None:
    engine = counting(Counting())
    old = engine.generate([1, 2], GREEDY)
    next(old)
    new = engine.generate([5], GREEDY)
    with pytest.raises(RuntimeError, match="another request"):
        next(old)
    assert next(new).id == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_an_exception_between_two_layers_leaves_the_cache_right(
    error: type[BaseException], call: int
) -> None:
    """The first layer has its new rows then, and the second has not."""
    model = tiny_model("llama", vocab=512, layers=3)
    prompt = prompt_of(30)
    expected = ids(Engine(model, context=128).generate(prompt, GREEDY))
    engine, calls = Engine(model, context=128, chunk=16), [0]

    def fail(*_: object) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise error

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        ids(engine.generate(prompt, GREEDY))
    assert len({layer.length for layer in engine.cache.slots[0].layers}) == 2
    handle.remove()
    assert ids(engine.generate(prompt, GREEDY)) == expected
    assert engine.sequence.cached_tokens == (0 if call == 1 else 16 if call == 2 else 29)


def test_an_interrupt_at_any_line_leaves_the_engine_usable() -> None:
    """KeyboardInterrupt at each line of engine, sequence, decoder and cache that a request runs."""
    model = tiny_model("gpt_bigcode_mqa", vocab=512, hidden=32, layers=2)
    engine = Engine(model, context=64, chunk=8)
    modules = (
        engine_module,
        sequence_module,
        cache_contract,
        dense,
        decoder_contract,
        eager_module,
        selection,
    )
    files = {module.__file__ for module in modules}
    params = SamplingParams(temperature=0, max_new_tokens=5)
    first = prompt_of(13)
    second = [*first[:10], *prompt_of(6, seed=9)]
    expected = {len(p): ids(Engine(model, context=64).generate(p, params)) for p in (first, second)}
    lines = [0]

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines[0] -= 1
            if lines[0] == 0:
                raise KeyboardInterrupt
        return trace

    stop, interrupted = 1, 0
    while True:
        lines[0] = stop
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            ids(engine.generate(first if stop % 2 else second, params))
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(before)
        if lines[0] > 0:  # the request ended before the line came
            break
        for prompt in (second, first):
            assert ids(engine.generate(prompt, params)) == expected[len(prompt)], f"line event {stop}"
        stop += 1 + stop // 40  # every line at first, then samples
    assert interrupted > 25


# A fast decoder, and what happens when it fails


class Fast(EagerDecoder):
    """Raises behind the forward of step `fail_at`."""

    max_rows = 1

    def __init__(self, model: Any, fail_at: int = -1, error: type[BaseException] = RuntimeError) -> None:
        super().__init__(model)
        self.steps, self.fail_at, self.error = 0, fail_at, error

    def _step(self, slot: Slot, ids: Any) -> torch.Tensor:
        logits = super()._step(slot, ids)
        self.steps += 1
        if self.steps == self.fail_at:
            raise self.error
        return logits


def with_fast(model: Any, *failing: Any, speculate: bool = False) -> tuple[Engine, SelectedDecoder, Fast]:
    engine = Engine(model, context=64, speculate=speculate)
    assert isinstance(engine.decoder, SelectedDecoder)
    engine.decoder.fast = fast = Fast(model, *failing)
    return engine, engine.decoder, fast


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "llama"])
def test_steps_go_to_the_fast_decoder(kind: str, speculate: bool) -> None:
    model = tiny_model(kind, vocab=512)
    prompt = prompt_of(9)
    engine, decoder, fast = with_fast(model, speculate=speculate)
    expected = ids(Engine(model, context=64).generate(prompt, GREEDY))
    for _ in range(2):
        assert ids(engine.generate(prompt, GREEDY)) == expected
    assert fast.steps == 2 * 39 or (speculate and fast.steps > 2)
    assert decoder.fast is fast


@pytest.mark.parametrize("fail_at", [1, 4])
def test_a_failing_step_is_repeated_eagerly_and_so_are_all_later_ones(fail_at: int) -> None:
    model = tiny_model("gpt_bigcode_mqa", vocab=512)
    prompt = prompt_of(9)
    engine, decoder, fast = with_fast(model, fail_at)
    assert ids(engine.generate(prompt, GREEDY)) == ids(Engine(model, context=64).generate(prompt, GREEDY))
    assert decoder.fast is None and decoder.why_eager == "RuntimeError" and fast.steps == fail_at


def test_an_interrupted_fast_decoder_stays_and_goes_on_right() -> None:
    model = tiny_model("gpt_bigcode_mqa", vocab=512)
    prompt = prompt_of(9)
    engine, decoder, fast = with_fast(model, 4, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        ids(engine.generate(prompt, GREEDY))
    assert ids(engine.generate(prompt, GREEDY)) == ids(Engine(model, context=64).generate(prompt, GREEDY))
    assert fast.steps > 20 and decoder.fast is fast


def test_the_real_small_model_answers_as_transformers_does() -> None:
    loaded = load(TINY_STARCHAT, LoadOptions(dtype=torch.float32))
    prompt = loaded.tokenizer("def add(a, b):\n").input_ids
    engine = Engine(loaded.model, context=256, chunk=4)
    assert ids(engine.generate(prompt, GREEDY)) == transformers_tokens(loaded.model, prompt, 40)
