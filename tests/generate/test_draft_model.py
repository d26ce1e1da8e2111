"""Draft models: they change no token, read what they need, and stop where they do not pay."""

from __future__ import annotations

import random
from collections.abc import Sequence as Sequences
from typing import Any

import pytest
import torch

from lowmem.config import SamplingParams
from lowmem.generate.draft_model import Ask, DraftModel
from lowmem.generate.drafting import PROBING, Drafting
from lowmem.generate.engine import Engine
from lowmem.generate.lookup import Lookup
from lowmem.generate.sampling import Sampler
from lowmem.generate.sequence import Sequence
from tests.generate.decoding import drafting
from tests.helpers import tiny_model

CONTEXT, VOCAB = 160, 512


@pytest.fixture(scope="module")
def large() -> Any:
    return tiny_model("llama", vocab=VOCAB)


@pytest.fixture(scope="module")
def small() -> Any:
    """Another model, with fewer tokens and positions."""
    torch.manual_seed(5)
    return tiny_model("gpt_bigcode_mqa", vocab=VOCAB - 100, positions=120)


def answer(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    return [token.id for token in engine.generate(prompt, params)]


def drafted(model: Any, draft: Any, slots: int = 1) -> Engine:
    """An engine that asks the draft model at every step."""
    engine = Engine(model, context=CONTEXT, slots=slots)
    engine.use_draft(draft)
    engine.drafting.paces = drafting()
    return engine


SETTINGS = [
    SamplingParams(temperature=0, max_new_tokens=40),
    SamplingParams(temperature=0, max_new_tokens=40, repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(temperature=0.8, top_k=0, top_p=1, seed=3, max_new_tokens=40),
    SamplingParams(temperature=1.2, top_k=40, top_p=0.9, seed=4, max_new_tokens=40),
]


@pytest.mark.parametrize("params", SETTINGS, ids=["greedy", "penalties", "plain", "filters"])
def test_no_token_changes(large: Any, small: Any, params: SamplingParams) -> None:
    """Whatever the draft proposes: the model itself, another one, and one of fewer tokens and positions."""
    engines = [drafted(large, draft) for draft in (large, small)]
    for seed in range(4):
        prompt = random.Random(seed).choices(range(1, VOCAB), k=1 + 36 * seed)
        expected = answer(Engine(large, context=CONTEXT, speculate=False), prompt, params)
        for engine in engines:
            assert answer(engine, prompt, params) == expected
            assert engine.drafting.why_not == ""


@pytest.mark.parametrize("params", SETTINGS, ids=["greedy", "penalties", "plain", "filters"])
def test_a_model_that_drafts_for_itself_is_right(
    large: Any, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft draws with the large model's noise, so equal logits give equal tokens.

    Penalties are an exception: tokens of the draft itself do not count yet.
    """
    monkeypatch.setattr(Lookup, "draft", lambda self, ids, length: [])
    engine = drafted(large, large)
    answer(engine, random.Random(1).choices(range(1, VOCAB), k=20), params)
    sequence = engine.sequence
    assert sequence is not None and sequence.drafted_tokens >= 30
    if not params.frequency_penalty:
        assert sequence.accepted_tokens == sequence.drafted_tokens
        assert sequence.proposed.rate > 0.9


def test_sampled_answers_have_the_models_distribution(large: Any, small: Any) -> None:
    """Of the second and third token, over 1500 answers with drafts, against the exact probabilities."""
    few = tuple((token, -100.0) for token in range(4, VOCAB))  # so that four tokens are left
    engine, prompt = drafted(large, small), [7, 8, 9]
    found: dict[tuple[int, ...], int] = {}
    for seed in range(1500):
        params = SamplingParams(
            temperature=3.0, top_k=0, top_p=1, seed=seed, max_new_tokens=3, logit_bias=few
        )
        key = tuple(answer(engine, prompt, params))
        found[key] = found.get(key, 0) + 1
    with torch.inference_mode():
        for first in range(4):
            for second in range(4):
                logits = [
                    large(torch.tensor([[*prompt, *before]])).logits[0, -1, :4] for before in ((), (first,))
                ]
                likely = [(row.float() / 3).softmax(-1) for row in logits]
                expected = float(likely[0][first] * likely[1][second])
                share = sum(n for key, n in found.items() if key[:2] == (first, second)) / 1500
                assert share == pytest.approx(expected, abs=0.045)


def test_sequences_of_a_batch_get_what_they_get_alone(large: Any, small: Any) -> None:
    engine, choice = drafted(large, small, slots=3), random.Random(6)
    prompts = [choice.choices(range(1, VOCAB), k=choice.randint(1, 90)) for _ in range(9)]
    waiting, running, answers = list(range(9)), dict[int, Sequence](), [list[int]() for _ in range(9)]
    while waiting or running:
        if waiting and engine.free and choice.random() < 0.5:
            number = waiting.pop(0)
            running[number] = engine.start(prompts[number], SETTINGS[number % 4])
        engine.advance()
        for number, sequence in list(running.items()):
            while (token := sequence.take()) is not None:
                answers[number].append(token.id)
            if sequence.ended:
                engine.end(running.pop(number))
    for number, prompt in enumerate(prompts):
        alone = answer(Engine(large, context=CONTEXT, speculate=False), prompt, SETTINGS[number % 4])
        assert answers[number] == alone


def test_a_draft_reads_each_token_once(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And, of a long text, a part at a time, so that a step waits for a bounded time."""
    monkeypatch.setattr("lowmem.generate.draft_model.PREFILL_CHUNK", 16)
    draft = DraftModel(large, context=CONTEXT, slots=1, vocabulary=VOCAB)
    ids = random.Random(2).choices(range(1, VOCAB), k=60)
    sampler = Sampler(SETTINGS[0], ids, VOCAB, "cpu")
    fed: list[int] = []
    step, prefill = draft.decoder.step, draft.decoder.prefill
    monkeypatch.setattr(draft.decoder, "step", lambda feeds: fed.append(len(feeds[0].ids)) or step(feeds))
    monkeypatch.setattr(
        draft.decoder, "prefill", lambda feeds: fed.append(len(feeds[0].ids)) or prefill(feeds)
    )
    found = [draft.propose([Ask(0, ids, 3, sampler.guess)])[0] for _ in range(4)]
    assert [len(one) for one in found] == [0, 0, 0, 3]
    assert fed == [16, 16, 16, 11, 1, 1, 1] or sum(fed) == 60 + 2
    fed.clear()
    draft.propose([Ask(0, [*ids, *found[3][:2], 5], 2, sampler.guess)])  # two were right
    assert fed == [1, 1]
    fed.clear()
    draft.propose([Ask(0, [*ids[:30], 3], 1, sampler.guess)])  # another answer to the beginning
    assert fed == [1]


def test_a_draft_that_raises_is_left_out(large: Any, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = drafted(large, small)

    def fail(asks: object) -> None:
        raise RuntimeError("out of memory")

    assert engine.drafting.model is not None
    monkeypatch.setattr(engine.drafting.model, "propose", fail)
    prompt = [5, 6, 7]
    expected = answer(Engine(large, context=CONTEXT, speculate=False), prompt, SETTINGS[0])
    assert answer(engine, prompt, SETTINGS[0]) == expected
    assert engine.drafting.model is None and "out of memory" in engine.drafting.why_not


class Clocked:
    """Stands for a draft model: proposals take a tenth of a step a token, and are right or wrong as told."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.right, self.step_seconds = clock, False, 0.1
        self.tokens = 0

    def reading_seconds(self, asks: Sequences[Ask]) -> float:
        return 0.0

    def propose(self, asks: Sequences[Ask]) -> list[list[int]]:
        self.clock[0] += self.step_seconds * max(ask.length for ask in asks)
        self.tokens += sum(ask.length for ask in asks)
        return [[1 if self.right else 2] * ask.length for ask in asks]


def simulate(drafts: Drafting, model: Clocked, steps: int, clock: list[float]) -> tuple[float, int]:
    """(seconds, tokens) of some steps of a model that always says 1; a drafted row costs 0.05 of a step."""
    logits = torch.zeros(12, 8)
    logits[:, 1] = 9.0
    params = SamplingParams(temperature=0, max_new_tokens=10**6)
    sequence = Sequence([5], params, Sampler(params, [5], 8, "cpu"), drafts=True)
    sequence.look_up = list  # type: ignore[method-assign, assignment]
    sequence.slot = Slot()  # type: ignore[assignment]
    sequence.proposed.rate, sequence.read = drafts.rate, 1
    begun = clock[0]
    sequence.choose(logits[:1])
    for _ in range(steps):
        sequence.tokens.clear()
        (feed,) = drafts.feeds([sequence])
        seconds = 1 + 0.05 * (len(feed.ids) - 1)
        clock[0] += seconds
        sequence.choose(logits[: len(feed.ids)])
        drafts.took(1, seconds, timed=True)
    return clock[0] - begun, sequence.new_tokens - 1


class Slot:
    """Of a cache without end."""

    index, capacity = 0, 10**9

    def cut(self, length: int) -> None:
        """Nothing is kept."""


def test_drafting_stops_where_it_does_not_pay_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("lowmem.generate.drafting.time.perf_counter", lambda: clock[0])
    drafts, model = Drafting(), Clocked(clock)
    drafts.model = model  # type: ignore[assignment]
    seconds, tokens = simulate(drafts, model, 200, clock)
    assert tokens == 200 and model.tokens > 0
    assert seconds / tokens < 1.03  # 1.0 without a draft model
    seconds, tokens = simulate(drafts, model, 1000, clock)  # the next answer knows that
    assert seconds / tokens < 1 + 1.5 * PROBING
    model.right = True
    seconds, tokens = simulate(drafts, model, 1000, clock)
    assert tokens / seconds > 2
