"""Sampling against a computation of its own in numpy float64, and by the frequencies it draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.generate.sampling import (
    check_sampling,
    choose,
    keep_top_k,
    keep_top_p,
    probabilities,
    seeded_generator,
)


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
    return result / result.sum()


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
    got = probabilities(torch.from_numpy(logits)[None], params)[0].double().numpy()
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


def test_greedy_ignores_the_filters() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [9.0, 5.0, 1.0]])
    assert choose(logits, SamplingParams(temperature=0, top_k=1, top_p=0.1)).tolist() == [1, 0]


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    params = SamplingParams(temperature=0.8, top_k=4, top_p=0.97)
    draws = choose(logits.expand(40_000, -1), params, seeded_generator(3, "cpu"))
    frequencies = np.bincount(draws.numpy(), minlength=5) / 40_000
    np.testing.assert_allclose(frequencies, numpy_distribution(logits.numpy(), 0.8, 4, 0.97), atol=0.01)


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = torch.zeros(64, 1000)
    params = SamplingParams(temperature=1, top_k=0, top_p=1)

    def draw(seed: int | None) -> list[int]:
        return choose(logits, params, seeded_generator(seed, "cpu")).tolist()  # type: ignore[no-any-return]

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    params = SamplingParams(temperature=0.7, top_k=50, top_p=0.9)
    assert probabilities(logits, params).dtype is torch.float32
    assert torch.equal(probabilities(logits, params), probabilities(logits.float(), params))


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
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(bad))):
        check_sampling(SamplingParams(**bad))  # type: ignore[arg-type]
