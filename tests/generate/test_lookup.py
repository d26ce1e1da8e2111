"""Prompt-lookup drafts: where they come from, when they are made, and that they never change a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem.config import SamplingParams
from lowmem.generate.engine import Engine
from lowmem.generate.lookup import Lookup
from lowmem.generate.pace import LENGTHS, Acceptance, Pace
from lowmem.generate.sequence import Token
from tests.generate.decoding import drafting, kept_rows
from tests.helpers import KINDS, TINY_STARCHAT, tiny_model


def naive_draft(ids: list[int], length: int) -> list[int]:
    """Look for the last 3, then 2 tokens from the end backwards, and copy on into what is copied."""
    for size in (3, 2):
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == ids[-size:]:
                whole = list(ids)
                for i in range(length):
                    whole.append(whole[end + i])
                return whole[len(ids) :]
    return []


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(-1, 12), st.integers(0, 40))
def test_drafts_are_those_of_a_naive_search(ids: list[int], length: int, split: int) -> None:
    lookup = Lookup()
    for part in (ids[:split], ids):
        assert lookup.draft(part, length) == naive_draft(part, length)


def paced(single: float, several: float) -> Pace:
    pace = Pace()
    for _ in range(9):
        pace.took(0, single)
        for length in LENGTHS:
            pace.took(length, several)
    return pace


def test_acceptance_is_a_running_mean() -> None:
    sure, hopeless = Acceptance(), Acceptance()
    assert sure.rate == Acceptance.START
    for _ in range(60):
        sure.saw(True)
        hopeless.saw(False)
    assert sure.rate > 0.99 and hopeless.rate < 0.01


def test_pace_drafts_where_it_pays() -> None:
    assert paced(1.0, 1.1).length(20, 0.98) == 10  # a draft costs next to nothing, and is right
    assert paced(1.0, 1.1).length(20, 0.02) == 0
    assert paced(1.0, 12.0).length(20, 0.98) == 0  # a step of many rows costs more than its tokens
    assert paced(1.0, 1.1).length(3, 0.98) == 3
    assert paced(1.0, 1.1).length(0, 0.98) == paced(1.0, 1.1).length(-1, 0.98) == 0


def test_pace_takes_the_length_that_is_best() -> None:
    """Long drafts are seldom right to their end: if rows are expensive the short ones are the best."""
    pace = Pace()
    for _ in range(9):
        pace.took(0, 1.0)
        for length in LENGTHS:
            pace.took(length, 0.9 + 0.2 * length)
    assert pace.length(20, 0.66) == 2


def test_pace_needs_a_measured_step_first_and_tries_again_later() -> None:
    assert Pace().length(10, Acceptance.START) == 0
    pace = paced(1.0, 5.0)
    assert pace.length(10, Acceptance.START) == 0
    for _ in range(1000):
        if pace.length(10, Acceptance.START):
            break
    else:
        raise AssertionError("a busy moment rules drafts out for ever")
    unlucky, acceptance = paced(1.0, 1.1), Acceptance()
    for right in [False] * 30 + [True] * 10:
        acceptance.saw(right)
    assert unlucky.length(10, acceptance.rate) > 0


def answer(
    model: Any, prompt: list[int], params: SamplingParams, *, draft: bool, **options: Any
) -> tuple[list[Token], Engine]:
    engine = Engine(model, speculate=draft, **{"context": 256, **options})
    engine.drafting.paces = drafting()
    return list(engine.generate(prompt, params)), engine


def prompt_of(length: int, vocab: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    part = torch.randint(1, vocab, (length,), generator=generator).tolist()
    return [*part, *part[: length // 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_same_with_and_without(kind: str) -> None:
    drafted = accepted = 0
    for seed in range(4):
        model = tiny_model(kind, vocab=64, hidden=32, seed=seed)
        for params in (
            SamplingParams(temperature=0, max_new_tokens=60),
            SamplingParams(temperature=0, max_new_tokens=60, repetition_penalty=1.05, logprobs=2),
            SamplingParams(temperature=0.3, max_new_tokens=60, seed=seed),
            SamplingParams(temperature=0.4, top_k=0, min_p=0.02, max_new_tokens=60, seed=seed),
        ):
            prompt = prompt_of(24, 64, seed)
            plain, _ = answer(model, prompt, params, draft=False)
            tokens, engine = answer(model, prompt, params, draft=True)
            assert [(t.id, t.finish_reason) for t in tokens] == [(t.id, t.finish_reason) for t in plain]
            assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in plain], abs=1e-3)
            drafted, accepted = (
                drafted + engine.sequence.drafted_tokens,
                accepted + engine.sequence.accepted_tokens,
            )
            assert engine.sequence.accepted_tokens <= engine.sequence.drafted_tokens
            again = list(engine.generate(prompt, params))  # behind drafts that the cache has held
            assert [t.id for t in again] == [t.id for t in plain]
    assert accepted > 100 and drafted > accepted  # both ends of a draft have been met


def test_every_end_inside_a_draft() -> None:
    """A stop id, the last allowed token, and the context's end, at each place of a repeating answer."""
    model = tiny_model("llama", vocab=64, hidden=32, seed=1)
    prompt = prompt_of(24, 64, 1)
    params = SamplingParams(temperature=0, max_new_tokens=50)
    plain, _ = answer(model, prompt, params, draft=False)
    ids = [token.id for token in plain]
    _, engine = answer(model, prompt, params, draft=True)
    assert engine.sequence.accepted_tokens > 20
    for end in range(1, 50):
        fewer = SamplingParams(temperature=0, max_new_tokens=end)
        assert answer(model, prompt, fewer, draft=True)[0] == answer(model, prompt, fewer, draft=False)[0]
        short = {"context": len(prompt) + end - 1}
        tokens, engine = answer(model, prompt, params, draft=True, **short)
        assert tokens == answer(model, prompt, params, draft=False, **short)[0]
        assert tokens[-1].finish_reason == "context" and len(tokens) == end
        assert engine.cache.slots[0].length <= engine.context
    for stop in set(ids):
        tokens, _ = answer(model, prompt, params, draft=True, stop_ids=[stop])
        assert [token.id for token in tokens] == ids[: ids.index(stop) + 1]
        assert tokens[-1].finish_reason == "stop"


def test_closed_in_the_middle_of_a_draft() -> None:
    model = tiny_model("gpt_bigcode_mqa", vocab=64, hidden=32, seed=1)
    prompt = prompt_of(24, 64, 1)
    params = SamplingParams(temperature=0, max_new_tokens=30)
    expected = [token.id for token in answer(model, prompt, params, draft=False)[0]]
    engine = Engine(model, context=256)
    engine.drafting.paces = drafting()
    for steps in range(1, 30):
        tokens = engine.generate(prompt, params)
        assert [next(tokens).id for _ in range(steps)] == expected[:steps]
        tokens.close()  # type: ignore[attr-defined]
        if steps % 4 == 0:  # another turn that begins where the last one was left
            turn = [*prompt, *expected[:steps], 5]
            got = [token.id for token in engine.generate(turn, params)]
            assert got == [token.id for token in answer(model, turn, params, draft=False)[0]]


@pytest.mark.parametrize("temperature", [0, 0.4])
def test_the_real_small_model_copies_code_in_fewer_forwards(temperature: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_STARCHAT)
    model = AutoModelForCausalLM.from_pretrained(TINY_STARCHAT, dtype=torch.float32).eval()
    code = tokenizer((TINY_STARCHAT / "heldout.txt").read_text()[:1200]).input_ids[:250]
    prompt = [*code, *code[:50]]
    params = SamplingParams(temperature=temperature, max_new_tokens=60, seed=3)
    plain, _ = answer(model, prompt, params, draft=False, context=1024)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens, engine = answer(model, prompt, params, draft=True, context=1024)
    assert tokens == plain
    assert len(calls) < (30 if temperature == 0 else 60)
    assert engine.sequence.accepted_tokens >= 60 - len(calls)


@pytest.mark.parametrize("temperature", [0, 0.4])
def test_bfloat16_leaves_the_same_bits_behind_drafts(temperature: float) -> None:
    """One-row products and torch's attention round by the number of rows: tokens came to differ in a tenth of
    the answers, through the keys and values that drafts left behind."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_STARCHAT)
    model = AutoModelForCausalLM.from_pretrained(TINY_STARCHAT, dtype=torch.bfloat16).eval()
    text = (TINY_STARCHAT / "heldout.txt").read_text()
    for number in range(4):
        code = tokenizer(text[number * 9000 :][:1200]).input_ids[:250]
        prompt = [*code, *code[:50]]
        params = SamplingParams(temperature=temperature, max_new_tokens=60, seed=number)
        plain, before = answer(model, prompt, params, draft=False, context=1024)
        tokens, after = answer(model, prompt, params, draft=True, context=1024)
        assert tokens == plain
        for one, other in zip(*kept_rows(before, after), strict=True):
            assert torch.equal(one, other)
