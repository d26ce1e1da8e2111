"""Log-probabilities of a prompt equal those of one forward of transformers, whatever scales the positions."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, LowmemError
from lowmem.generate import engine as engine_module
from lowmem.generate.engine import Engine
from tests.generate import test_position_scaling as scaled
from tests.generate.decoding import score

model = scaled.model  # the fixture


def engine_of(model: Any) -> Engine:
    return Engine(copy.deepcopy(model), context=scaled.POSITIONS)


def prompt_of(length: int) -> list[int]:
    return random.Random(length).choices(range(scaled.VOCABULARY), k=length)


@pytest.mark.parametrize("length", [1, 2, 7, scaled.SWITCH, scaled.SWITCH + 1, scaled.SWITCH + 9])
def test_every_token_is_scored_as_in_one_forward(
    model: Any, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "SCORED_ROWS", 7)
    prompt = prompt_of(length)
    with torch.inference_mode():
        logits = copy.deepcopy(model)(input_ids=torch.tensor([prompt])).logits[0]
    expected = logits.float().log_softmax(-1)[:-1]
    engine = engine_of(model)
    list(engine.generate(prompt_of(9), SamplingParams(temperature=0, max_new_tokens=3)))  # rows to replace
    seen: list[tuple[int, int]] = []
    tokens = score(engine, prompt, 3, lambda *at: seen.append(at))
    assert [token.id for token in tokens] == prompt
    assert tokens[0].logprob is None and tokens[0].top == ()
    for token, row in zip(tokens[1:], expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        best = row.topk(3)
        assert [name for name, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert seen[-1] == (length, length)


def test_a_scored_prompt_is_continued_as_any_other(model: Any) -> None:
    engine = engine_of(model)
    for length in (5, scaled.SWITCH + 3, scaled.SWITCH - 2):
        prompt = prompt_of(length)
        score(engine, prompt, 0)
        params = SamplingParams(temperature=0, max_new_tokens=12)
        answer = [token.id for token in engine.generate(prompt, params)]
        assert answer == scaled._expected(model, prompt, 12)
        assert engine.sequence is not None and engine.sequence.cached_tokens == length - 1


def test_a_prompt_that_cannot_be_answered_is_refused_at_once(model: Any) -> None:
    engine = engine_of(model)
    for prompt in ([], [scaled.VOCABULARY], [1] * (scaled.POSITIONS + 1)):
        with pytest.raises(InvalidRequestError):
            score(engine, prompt, 1)


def test_output_that_is_not_finite_is_an_error(model: Any) -> None:
    engine = engine_of(model)
    with torch.no_grad():
        engine.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(LowmemError, match="not finite"):
        score(engine, [1, 2, 3], 1)


def test_an_older_request_may_not_go_on(model: Any) -> None:
    engine = engine_of(model)
    tokens = engine.generate([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=9))
    next(tokens)
    score(engine, [4, 5], 0)
    with pytest.raises(RuntimeError, match="another request"):
        list(tokens)
