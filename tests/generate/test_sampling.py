"""Sampling against a computation of its own in numpy float64, and by the frequencies it draws."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from lowmem.config import SamplingParams, check_sampling
from lowmem.errors import InvalidRequestError, LowmemError
from lowmem.generate.noise import gumbel
from lowmem.generate.sampling import (
    Sampler,
    distribution,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    nucleus,
    penalize,
)


def probabilities(
    logits: torch.Tensor, params: SamplingParams, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """logits [vocab] → the float32 distribution [vocab] that is sampled."""
    likely, ids = distribution(logits, params, seen)
    return likely if ids is None else torch.zeros_like(logits, dtype=torch.float32).scatter(0, ids, likely)


def numpy_distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Token by token in float64: keep the k best, then the fewest of those that make up top_p."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = list(order[: top_k or len(order)])
    weights = np.exp(scaled - scaled.max())
    total = sum(weights[token] for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        nucleus.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    result = np.zeros(len(logits))
    for token in nucleus:
        result[token] = weights[token]
    result /= result.sum()
    return result


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**31),
    st.integers(2, 40),
    st.floats(0.1, 3),
    st.integers(0, 45),
    st.floats(0.05, 1),
)
def test_distribution_is_numpys(seed: int, vocab: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=vocab).astype(np.float32) * 3
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    got = probabilities(torch.from_numpy(logits), params).double().numpy()
    expected = numpy_distribution(logits, temperature, top_k, top_p)
    # A nucleus that ends within float32's rounding of top_p may have one token more or less.
    cumulative = np.cumsum(np.sort(numpy_distribution(logits, temperature, top_k, 1.0))[::-1])
    if top_p < 1 and np.abs(cumulative - top_p).min() < 1e-5:
        return
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


def test_same_filters_as_transformers() -> None:
    """A model card's settings mean the same here as in transformers' generate."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.zeros(50, 1, dtype=torch.long)
    assert torch.equal(keep_top_k(logits, 7), TopKLogitsWarper(7)(ids, logits))
    for p in (0.2, 0.5, 0.95):
        assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(ids, logits))


def test_filters_that_are_off_change_nothing() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0]])
    assert keep_top_k(logits, 0) is logits and keep_top_k(logits, 3) is logits
    assert keep_top_p(logits, 1.0) is logits


def test_the_most_likely_token_always_stays() -> None:
    logits = torch.tensor([[0.0, 0.1, 0.0]])
    assert keep_top_p(logits, 1e-9).isfinite().tolist() == [[False, True, False]]
    assert keep_top_k(logits, 1).isfinite().tolist() == [[False, True, False]]


def transformers_distribution(logits: torch.Tensor, params: SamplingParams, ids: list[int]) -> torch.Tensor:
    """What transformers' generate samples from: its processors in the order in which it applies them."""
    from transformers.generation import logits_process as hf

    scores, before = logits.float()[None], torch.tensor([ids])
    processors: list[object] = [hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    processors.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(hf.TopPLogitsWarper(params.top_p))
    processors.append(hf.MinPLogitsWarper(params.min_p))
    for processor in processors:
        scores = processor(before, scores)  # type: ignore[operator]
    return scores.softmax(-1)[0]


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.integers(2, 60),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 65),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.5, 2),
    rounded=st.booleans(),
)
def test_distribution_is_transformers(
    seed: int,
    vocab: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    rounded: bool,
) -> None:
    """Also with bfloat16's many ties (`rounded`), where the k likeliest are more than k."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=generator) * 3
    if rounded:  # which of tied tokens leaves a nucleus is the sort's choice, there as here
        logits, top_p = (logits * 2).round() / 2, 1.0
    ids = torch.randint(0, vocab, (5,), generator=generator).tolist()
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    seen = torch.zeros(vocab, dtype=torch.bool)
    seen[ids] = True
    got, expected = probabilities(logits, params, seen), transformers_distribution(logits, params, ids)
    if not torch.equal(got > 0, expected > 0):
        # A token at the very border of the nucleus or of min_p is float32's to decide.
        loose = [
            transformers_distribution(logits, SamplingParams(**{**vars(params), "top_p": p, "min_p": m}), ids)
            for p in {min(1.0, top_p * 1.00001), top_p * 0.99999}
            for m in {min(1.0, min_p * 1.00001), min_p * 0.99999}
        ]
        differs = (got > 0) != (expected > 0)  # less than float32's rounding of their sum
        negligible = float(torch.maximum(got, expected)[differs].sum()) < 1e-7
        assert negligible or any(torch.equal(got > 0, other > 0) for other in loose)
        return
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_single_filters_are_transformers() -> None:
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.zeros(50, 1, dtype=torch.long)
    for p in (0.02, 0.3, 1.0):
        assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(ids, logits))
    before = torch.tensor([[3, 299, 3, 8]]).expand(50, -1)
    seen = torch.zeros(300, dtype=torch.bool)
    seen[[3, 299, 8]] = True
    for penalty in (0.7, 1.3):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(before, logits.clone())
        assert torch.equal(penalize(logits, seen, penalty), expected)


def test_top_k_never_sorts_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, sizes = torch.randn(5000, generator=torch.Generator().manual_seed(0)), []
    real = torch.Tensor.sort

    def sort(tensor: torch.Tensor, *args: object, **options: object) -> object:
        sizes.append(tensor.shape[-1])
        return real(tensor, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch.Tensor, "sort", sort)
    likely, ids = distribution(logits, SamplingParams())
    assert ids is not None and likely.shape == ids.shape == (50,)
    assert all(size == 50 for size in sizes)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0, 60.0])
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.95, 1 - 1e-6])
def test_the_nucleus_is_found_without_a_sort_of_all(spread: float, p: float) -> None:
    """Of logits that are all alike, of one that has everything, and of whatever lies between."""
    for seed in range(4):
        logits = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * spread + 3 * seed
        ids = nucleus(logits, p)
        assert ids is not None
        kept = keep_top_p(logits, p).isfinite()
        order = logits.softmax(-1).sort(descending=True)
        # Where the mass comes within float32's rounding of p, and among equals, a few more or fewer may stay.
        unsure = (order.values.double().cumsum(-1) - p).abs() < 1e-5
        if spread == 0:
            assert abs(len(ids) - int(kept.sum())) <= 1 + int(unsure.sum())
        else:
            differing = set(ids.tolist()) ^ set(kept.nonzero()[:, 0].tolist())
            assert differing <= set(order.indices[unsure.nonzero()[:, 0]].tolist()) | set(
                order.indices[(unsure.nonzero()[:, 0] + 1).clamp(max=4999)].tolist()
            )


def test_a_nucleus_of_what_is_not_finite_is_left_to_others() -> None:
    for bad in (torch.nan, torch.inf):
        assert nucleus(torch.tensor([1.0, bad, 2.0]), 0.5) is None
    assert nucleus(torch.tensor([1.0, -torch.inf, 5.0]), 0.9).tolist() == [2]  # type: ignore[union-attr]


def greedy(**options: float) -> SamplingParams:
    return SamplingParams(temperature=0, **options)  # type: ignore[arg-type]


def test_greedy_ignores_the_filters() -> None:
    params = greedy(top_k=1, top_p=0.1, min_p=0.9)
    assert Sampler(params, [], 3, "cpu").choose(torch.tensor([0.0, 5.0, 1.0])).id == 1
    assert Sampler(params, [], 3, "cpu").choose(torch.tensor([9.0, 5.0, 1.0])).id == 0


def test_the_penalty_is_over_prompt_and_answer_and_for_greedy_too() -> None:
    sampler = Sampler(greedy(repetition_penalty=2), [1], 4, "cpu")
    logits = torch.tensor([-1.0, 5.0, 3.0, 2.6])
    assert [sampler.choose(logits).id for _ in range(3)] == [
        2,
        3,
        1,
    ]  # 1 is 2.5 all along, 2 is 1.5 from then on


def test_openais_penalties_count_the_answer_alone() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, from OpenAI's documentation, beside the bias."""
    rows = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 2, 12)
    params = greedy(presence_penalty=0.3, frequency_penalty=0.7, logit_bias=((3, 1.5), (11, -100)))  # type: ignore[arg-type]
    sampler = Sampler(params, list(range(12)), 12, "cpu")
    counts = torch.zeros(12)
    bias = torch.zeros(12)
    bias[3], bias[11] = 1.5, -100
    for row in rows:
        expected = int((row + bias - 0.7 * counts - 0.3 * (counts > 0)).argmax())
        chosen = sampler.choose(row)
        assert chosen.id == expected != 11
        counts[expected] += 1
    assert (counts > 1).sum() > 3
    warm = SamplingParams(temperature=1, top_k=0, top_p=1, seed=1, logit_bias=((5, -100.0),))
    flat = torch.zeros(12)
    drawn = {Sampler(replace(warm, seed=seed), [], 12, "cpu").choose(flat).id for seed in range(99)}
    assert drawn == set(range(12)) - {5}


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    plain = Sampler(greedy(logprobs=3), [], 3, "cpu").choose(logits)
    moved = Sampler(greedy(logprobs=3, logit_bias=((0, 9.0),)), [], 3, "cpu").choose(logits)  # type: ignore[arg-type]
    assert moved.id == 0 and moved.top == plain.top


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    params = SamplingParams(temperature=0.8, top_k=4, top_p=0.97)
    sampler = Sampler(SamplingParams(**{**vars(params), "seed": 1}), [], 5, "cpu")
    chosen = np.bincount([sampler.choose(logits).id for _ in range(3000)], minlength=5) / 3000
    np.testing.assert_allclose(chosen, numpy_distribution(logits.numpy(), 0.8, 4, 0.97), atol=0.03)


def test_noise_is_gumbels() -> None:
    """By its distribution function, over ids, places and keys, and without correlation between neighbours."""
    ids = torch.arange(50_000)
    for noise in (gumbel(5, 0, ids), torch.stack([gumbel(9, n, ids[:1])[0] for n in range(5000)])):
        uniform = (-(-noise).exp()).exp()
        assert noise.dtype is torch.float64 and noise.isfinite().all()
        assert kstest(uniform.numpy(), "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(uniform[1:], uniform[:-1])[0, 1]) < 0.05
    keys = torch.stack([gumbel(random.Random(seed).getrandbits(64), 3, ids[:1])[0] for seed in range(5000)])
    assert kstest((-(-keys).exp()).exp().numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(gumbel(5, 2, ids)[:100], gumbel(5, 2, ids[:100]))


def splitmix(key: int, place: int, token: int) -> float:
    """`gumbel` for one token, in Python's integers."""
    mask = 2**64 - 1
    mixed = token * 0x9E3779B97F4A7C15 + key + (place + 1) * 0xD1B54A32D192ED03 & mask
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
    mixed ^= mixed >> 31
    return -math.log(-math.log1p(-((mixed >> 11) + 0.5) / 2**53))


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20), st.integers(0, 2**20))
def test_noise_is_that_of_python_integers(key: int, place: int, token: int) -> None:
    found = float(gumbel(key, place, torch.tensor([token]))[0])
    assert found == pytest.approx(splitmix(key, place, token), rel=1e-12, abs=1e-12)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf])
    params = SamplingParams(temperature=1, top_k=0, top_p=1, seed=1)
    sampler = Sampler(params, [], 5, "cpu")
    assert {sampler.choose(logits).id for _ in range(300)} == {1, 3}


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0])
def test_a_draft_with_the_same_noise_is_as_often_right_as_theory_says(noise: float) -> None:
    """Of two distributions p and q: the sum over i of 1 / sum over j of max(p_j / p_i, q_j / q_i)."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(40, generator=generator) * 3
    others = logits + torch.randn(40, generator=generator) * noise
    params = SamplingParams(temperature=0.9, top_k=0, top_p=1, seed=2)
    p, q = probabilities(logits, params).double(), probabilities(others, params).double()
    expected = float((1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(1)).sum())
    distance = float((p - q).abs().sum()) / 2
    assert (1 - distance) / (1 + distance) <= expected <= 1 - distance
    sampler, right = Sampler(params, [], 40, "cpu"), 0
    for _ in range(1000):
        draft = [sampler.guess(others, ahead) for ahead in range(2)]
        right += sum(sampler.choose(logits).id == token for token in draft)
    assert right / 2000 == pytest.approx(expected, abs=0.04)


def test_a_guess_has_penalties_and_filters_and_changes_nothing() -> None:
    logits = torch.tensor([1.0, 5.0, 4.0, 3.0])
    params = greedy(repetition_penalty=2, logit_bias=((3, 1.6),))  # type: ignore[arg-type]
    sampler = Sampler(params, [1], 6, "cpu")
    assert sampler.guess(logits, 0) == sampler.guess(logits, 5) == 3
    assert sampler.guess(logits[:3], 0) == 2  # a draft's vocabulary may be the smaller one
    warm = Sampler(SamplingParams(temperature=1, top_k=2, top_p=1, seed=3), [], 4, "cpu")
    assert {warm.guess(logits, n) for n in range(99)} == {1, 2}
    assert [warm.guess(logits, n) for n in range(9)] == [warm.choose(logits).id for _ in range(9)]


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = torch.zeros(1000)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1, top_k=0, top_p=1, seed=seed), [], 1000, "cpu")
        return [sampler.choose(logits).id for _ in range(64)]

    assert draws(5) == draws(5) != draws(6)
    assert draws(None) != draws(None)


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(1)).bfloat16()
    params = SamplingParams(temperature=0.7, top_k=50, top_p=0.9)
    assert probabilities(logits, params).dtype is torch.float32
    assert torch.equal(probabilities(logits, params), probabilities(logits.float(), params))


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**31), temperature=st.sampled_from([0.0, 0.2, 1.0]), scale=st.floats(0, 0.05))
def test_a_clear_choice_is_the_same_on_logits_that_are_off(
    seed: int, temperature: float, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, generator=generator) * 3
    params = SamplingParams(temperature=temperature, top_k=0, top_p=1, seed=seed)
    # Two logits off by half of it each move their gap by all of it.
    wrong = logits + (torch.rand(40, generator=generator) - 0.5) * scale * float(logits.max().abs())
    clear = Sampler(params, [], 40, "cpu").choose_clear(logits, 1.05 * scale + 1e-6)
    if clear is not None:
        assert Sampler(params, [], 40, "cpu").choose(wrong).id == clear.id


def test_an_unclear_choice_changes_nothing() -> None:
    params = SamplingParams(temperature=1, top_k=0, top_p=1, seed=7, repetition_penalty=1.5)
    one, other = (Sampler(params, [0], 50, "cpu") for _ in range(2))
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        assert one.choose_clear(logits, 1e6) is None
        assert one.choose(logits) == other.choose(logits)
    tie = torch.tensor([1.0, 2.0, 2.0])
    assert Sampler(greedy(), [], 3, "cpu").choose_clear(tie, 1e-9) is None
    assert Sampler(greedy(), [], 3, "cpu").choose_clear(torch.tensor([1.0, 2.5, 2.0]), 0.1).id == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
def test_what_is_not_finite_is_an_error(temperature: float, bad: float | None) -> None:
    logits = torch.full((8,), -torch.inf) if bad is None else torch.zeros(8)
    logits[3] = -torch.inf if bad is None else bad
    with pytest.raises(LowmemError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature), [], 8, "cpu").choose(logits)
    masked = torch.tensor([-torch.inf, 1.0])
    assert Sampler(SamplingParams(temperature=temperature), [], 2, "cpu").choose(masked).id == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": float("nan")},
        {"logprobs": -1},
        {"logprobs": 21},
        {"stop": ("a", "")},
        {"stop": "abc"},
    ],
    ids=str,
)
def test_invalid_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(bad))):
        check_sampling(SamplingParams(**bad))  # type: ignore[arg-type]
