"""Several sequences at once: each gets what it gets alone, whatever shares its steps."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from lowmem.config import SamplingParams
from lowmem.errors import LowmemError
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.decoders.native import NativeDecoder
from lowmem.generate.engine import Engine
from lowmem.generate.prefix_store import MIN_TOKENS, PrefixStore
from lowmem.generate.sequence import Sequence
from lowmem.kernels.native import library as native
from lowmem.loading.loader import LoadOptions, load
from tests.generate.decoding import drafting
from tests.helpers import tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

CONTEXT, VOCAB = 160, 512
NATIVE, EAGER = "native", "eager"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A 4-bit model whose forwards are native, and one in float32 that transformers computes."""
    folder = tmp_path_factory.mktemp("packed") / "q"
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa", positions=256), folder)
    packed = load(folder, LoadOptions(dtype=torch.bfloat16)).model
    return {NATIVE: packed, EAGER: tiny_model("llama", vocab=VOCAB)}


@pytest.fixture(params=[NATIVE, EAGER])
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    if request.param == NATIVE and not native.available():
        pytest.skip("the library is not compiled")
    return models[request.param]


def random_request(choice: random.Random, common: list[int]) -> tuple[list[int], SamplingParams]:
    """A prompt that often begins like others and often repeats itself, and settings of all kinds."""
    own = choice.choices(range(1, VOCAB), k=choice.randint(1, 30))
    prompt = common[: choice.choice([0, 20, 60])] + own * choice.choice([1, 1, 2])
    params = SamplingParams(
        temperature=choice.choice([0, 0, 0.8, 1.5]),
        top_k=choice.choice([0, 40]),
        top_p=choice.choice([1.0, 0.9]),
        repetition_penalty=choice.choice([1.0, 1.0, 1.2]),
        seed=choice.randint(0, 99),
        max_new_tokens=choice.randint(1, 30),
    )
    return prompt[: CONTEXT - 1], params


def alone(model: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    engine = Engine(model, context=CONTEXT, speculate=False)
    return [token.id for token in engine.generate(prompt, params)]


@pytest.mark.parametrize("seed", range(4))
def test_every_sequence_gets_the_tokens_that_it_gets_alone(model: Any, seed: int) -> None:
    """Requests come, end and leave at random, in three slots, with drafts and shared prefixes."""
    choice = random.Random(seed)
    common = choice.choices(range(1, VOCAB), k=60)
    requests = [random_request(choice, common) for _ in range(14)]
    engine = Engine(model, context=CONTEXT, slots=3, chunk=choice.choice([5, 16, 64]))
    engine.drafting.paces = drafting()
    engine.store = PrefixStore(1 << 20) if seed % 2 else None
    waiting, running, answers = list(enumerate(requests)), dict[int, Sequence](), dict[int, list[int]]()
    left: set[int] = set()
    while waiting or running:
        while waiting and engine.free and choice.random() < 0.6:
            number, (prompt, params) = waiting.pop(0)
            running[number], answers[number] = engine.start(prompt, params), []
        engine.advance()
        for number, sequence in list(running.items()):
            while (token := sequence.take()) is not None:
                answers[number].append(token.id)
            if sequence.ended or choice.random() < 0.01:
                left.update([] if sequence.ended else [number])
                engine.end(running.pop(number))
    assert not [slot for slot in engine.cache.slots if slot.length < len(slot.tokens)]
    for number, (prompt, params) in enumerate(requests):
        expected = alone(model, prompt, params)
        got = answers[number]
        assert got == (expected[: len(got)] if number in left else expected), number
    if isinstance(engine.decoder.fast, NativeDecoder):  # type: ignore[attr-defined]
        assert engine.decoder.why_eager == ""  # type: ignore[attr-defined]


def test_keys_and_values_are_the_same_bits_however_they_were_computed(models: dict[str, Any]) -> None:
    """By a prompt in parts of any size, by steps, with drafts, beside others, copied and restored."""
    if not native.available():
        pytest.skip("the library is not compiled")
    model = models[NATIVE]
    engine = Engine(model, context=CONTEXT, slots=4)
    one, two, three, other = engine.cache.slots
    ids = random.Random(1).choices(range(1, VOCAB), k=120)
    decoder = engine.decoder
    decoder.prefill([Feed(one, ids)])
    for part in (ids[:1], ids[1:18], ids[18:77], ids[77:]):
        decoder.prefill([Feed(two, part, 120)])
    decoder.prefill([Feed(three, ids[:40]), Feed(other, ids[5:90])])
    while len(three.tokens) < 120:
        at = len(three.tokens)
        drafted = Feed(three, [ids[at], *ids[at + 1 : at + 4], 3, 4, 5])
        decoder.step([Feed(other, ids[:2]), drafted])
        three.cut(min(120, at + 4))
    expected = one.save(120)
    for slot in (two, three):
        assert all(map(torch.equal, slot.save(120), expected))
    other.copy(one, 100)
    other.cut(90)
    decoder.prefill([Feed(other, ids[90:], 120)])
    assert other.tokens == ids and all(map(torch.equal, other.save(120), expected))
    assert isinstance(decoder.fast, NativeDecoder)  # type: ignore[attr-defined]


def test_answers_to_one_prompt_read_it_once(model: Any) -> None:
    engine = Engine(model, context=CONTEXT, slots=4, chunk=16, speculate=False)
    prompt = random.Random(2).choices(range(1, VOCAB), k=100)
    params = SamplingParams(temperature=1.0, max_new_tokens=5, top_k=0, top_p=1)
    several = [engine.start(prompt, replace(params, seed=seed)) for seed in range(4)]
    while not all(sequence.ended for sequence in several):
        engine.advance()
        for sequence in several:
            sequence.tokens.clear()
    assert several[0].cached_tokens == 0
    assert all(sequence.cached_tokens > 99 - MIN_TOKENS for sequence in several[1:])


def test_a_short_prompt_waits_for_one_part_of_a_long_one(model: Any) -> None:
    """And a step of the others comes between two parts."""
    engine = Engine(model, context=CONTEXT, slots=3, chunk=10, speculate=False)
    greedy = SamplingParams(temperature=0, max_new_tokens=40)
    first = engine.start([7, 8], greedy)
    engine.advance()
    long = engine.start(random.Random(3).choices(range(1, VOCAB), k=150), greedy)
    engine.advance()
    short = engine.start([1, 2, 3], greedy)
    pieces, before = 0, first.new_tokens
    while short.new_tokens == 0:
        first.tokens.clear()
        engine.advance()
        pieces += 1
    assert pieces <= 4 and long.reads
    while long.reads:
        for sequence in (first, short):
            sequence.tokens.clear()
        engine.advance()
    assert first.new_tokens - before >= 150 // 16


def test_an_error_of_one_sequence_leaves_the_others(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, context=CONTEXT, slots=2, speculate=False)
    params = SamplingParams(temperature=0, max_new_tokens=12)
    good, bad = engine.start([5, 6, 7], params), engine.start([9, 10], params)
    tokens = []
    while not good.ended:
        if bad.new_tokens == 3:
            monkeypatch.setattr(bad._sampler, "choose_clear", _raise)
        engine.advance()
        bad.tokens.clear()
        while good.tokens:
            tokens.append(good.tokens.popleft().id)
    assert tokens == alone(model, [5, 6, 7], params)
    with pytest.raises(LowmemError, match="not finite"):
        bad.take()
    engine.end(bad)
    engine.end(good)
    assert engine.free == 2


def _raise(*_: object) -> None:
    raise LowmemError("the model's output is not finite", "Check it")
