"""The engine: the tokens of transformers' own generate, every way an answer can end, and what it keeps."""

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
from lowmem.generate import cache as cache_room
from lowmem.generate import engine as engine_room
from lowmem.generate.engine import Engine, Token, context_length
from lowmem.loading.loader import load
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


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_prefill_gives_the_logits_of_one_forward(kind: str) -> None:
    model = tiny_model(kind, vocab=512)
    prompt = prompt_of(50)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    for chunk in (7, 25, 49, 50):
        got = Engine(model, context=64, chunk=chunk)._prefill(0, prompt, None)[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


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
    model, told = Counting(), []
    engine = counting(model, chunk=4)
    next(engine.generate(list(range(1, 11)), GREEDY, lambda done, total: told.append((done, total))))
    assert model.fed == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert told == [(4, 10), (8, 10), (10, 10)]
    told.clear()
    next(engine.generate([1, 2, 3, 4, 5, 0], GREEDY, lambda done, total: told.append((done, total))))
    assert model.fed[3:] == [[0]] and told == [(6, 6)]


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
        assert engine.cached_tokens == cached
        assert fed == len(prompt) - cached + 7  # the answer's last token is never read
        assert all(layer.length == len(prompt) + 7 for layer in engine.cache.kv_layers)


def test_reset_forgets() -> None:
    model = Counting()
    engine = counting(model)
    for cached in (0, 0):
        ids(engine.generate([1, 2, 3], SHORT))
        assert engine.cached_tokens == cached
        engine.reset()
    assert engine.cache.length == 0


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
    assert len({layer.length for layer in engine.cache.kv_layers}) == 2
    handle.remove()
    assert ids(engine.generate(prompt, GREEDY)) == expected
    assert engine.cached_tokens == (0 if call == 1 else 16 if call == 2 else 29)


def test_an_interrupt_at_any_line_leaves_the_engine_usable() -> None:
    """KeyboardInterrupt at each line of engine and cache that a request passes, one after the other."""
    model = tiny_model("gpt_bigcode_mqa", vocab=512, hidden=32, layers=2)
    engine = Engine(model, context=64, chunk=8)
    rooms = {engine_room.__file__, cache_room.__file__}
    params = SamplingParams(temperature=0, max_new_tokens=5)
    first = prompt_of(13)
    second = [*first[:10], *prompt_of(6, seed=9)]
    expected = {len(p): ids(Engine(model, context=64).generate(p, params)) for p in (first, second)}
    lines = [0]

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in rooms:
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


# The hook for compiled steps


def fixed_decode(
    model: Any, engine: Engine, fail_at: int = -1, error: type[BaseException] = RuntimeError
) -> Any:
    """Decodes on whole buffers as a captured step does; raises in the middle of step `fail_at`."""
    steps = [0]

    def decode(fed: torch.Tensor) -> torch.Tensor:
        cache = engine.cache
        if not cache.fixed:
            cache.set_fixed(True)
        length = cache.length
        logits = model(
            input_ids=fed, past_key_values=cache, position_ids=torch.tensor([[length]]), use_cache=True
        ).logits[:, -1]
        steps[0] += 1
        if steps[0] == fail_at:  # the device has moved on, the host's count has not
            raise error
        cache.advance(1)
        return logits  # type: ignore[no-any-return]

    decode.steps = steps  # type: ignore[attr-defined]
    return decode


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "llama"])
def test_one_row_steps_go_through_the_hook(kind: str, speculate: bool) -> None:
    model = tiny_model(kind, vocab=512)
    prompt = prompt_of(9)
    engine = Engine(model, context=64, speculate=speculate)
    decode = fixed_decode(model, engine)
    engine.decode = decode
    expected = ids(Engine(model, context=64).generate(prompt, GREEDY))
    for _ in range(2):
        assert ids(engine.generate(prompt, GREEDY)) == expected
    # The second prompt differs from what is held in nothing: its last token is one more one-row step.
    assert decode.steps[0] == 2 * 39 + 1 or (speculate and decode.steps[0] > 2)
    assert engine.decode is decode


@pytest.mark.parametrize("fail_at", [1, 4])
def test_a_failing_hook_is_left_for_the_model_itself(fail_at: int) -> None:
    model = tiny_model("gpt_bigcode_mqa", vocab=512)
    prompt = prompt_of(9)
    engine = Engine(model, context=64, speculate=False)
    engine.decode = fixed_decode(model, engine, fail_at)
    assert ids(engine.generate(prompt, GREEDY)) == ids(Engine(model, context=64).generate(prompt, GREEDY))
    assert engine.decode is None and not engine.cache.fixed


def test_an_interrupted_hook_stays_and_goes_on_right() -> None:
    model = tiny_model("gpt_bigcode_mqa", vocab=512)
    prompt = prompt_of(9)
    engine = Engine(model, context=64, speculate=False)
    decode = fixed_decode(model, engine, 4, KeyboardInterrupt)
    engine.decode = decode
    with pytest.raises(KeyboardInterrupt):
        ids(engine.generate(prompt, GREEDY))
    assert ids(engine.generate(prompt, GREEDY)) == ids(Engine(model, context=64).generate(prompt, GREEDY))
    assert decode.steps[0] > 20
    assert engine.decode is decode


def test_the_real_small_model_answers_as_transformers_does() -> None:
    loaded = load(TINY_STARCHAT, dtype=torch.float32)
    prompt = loaded.tokenizer("def add(a, b):\n").input_ids
    engine = Engine(loaded.model, context=256, chunk=4)
    assert ids(engine.generate(prompt, GREEDY)) == transformers_tokens(loaded.model, prompt, 40)
