"""Divergence against plain numpy on whole distributions, and its standard errors against simulated texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lowmem.benchmarks.quality.divergence import EDGES, Tokens, compare, standard_error, summarize


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits of the reference, logits of another model, token rows): 5 rows of 40 tokens, vocabulary 11."""
    generator = np.random.default_rng(5)
    reference = generator.normal(0, 1, (5, 40, 11)) * generator.uniform(0, 6, (5, 40, 1))
    other = reference + generator.normal(0, 0.3, reference.shape)
    return reference, other, generator.integers(0, 11, (5, 40))


def parts(reference: np.ndarray, other: np.ndarray, step: int):
    flat = [torch.tensor(values.reshape(-1, values.shape[-1])) for values in (reference, other)]
    return zip(flat[0].split(step), flat[1].split(step), strict=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    power = np.exp(logits - logits.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


@pytest.mark.parametrize("step", [1, 7, 200])
def test_equals_a_plain_computation_for_any_chunk_size(case, step):
    reference, other, ids = case
    p, q = softmax(reference), softmax(other)
    quality = summarize("text", compare(torch.tensor(ids), parts(reference, other, step)))
    kld = (p * np.log(p / q)).sum(-1)
    rows, places = np.indices((5, 39))
    right_p, right_q = p[rows, places, ids[:, 1:]], q[rows, places, ids[:, 1:]]
    same = p.argmax(-1) == q.argmax(-1)
    assert quality.tokens == 200
    assert quality.kld.mean == pytest.approx(kld.mean(), rel=1e-9)
    assert quality.kld.median == pytest.approx(np.median(kld), rel=1e-9)
    assert quality.kld.p90 == pytest.approx(np.percentile(kld, 90), rel=1e-9)
    assert quality.kld.p99 == pytest.approx(np.percentile(kld, 99), rel=1e-9)
    assert quality.kld.max == pytest.approx(kld.max(), rel=1e-9)
    assert quality.same_top1 == pytest.approx(same.mean())
    assert quality.ppl == pytest.approx(np.exp(-np.log(right_q).mean()))
    assert quality.reference_ppl == pytest.approx(np.exp(-np.log(right_p).mean()))
    assert quality.ppl_ratio == pytest.approx(quality.ppl / quality.reference_ppl)
    assert quality.rms_dp == pytest.approx(np.sqrt(((right_q - right_p) ** 2).mean()))
    confidence = p.max(-1)
    for bucket in quality.buckets:
        top = bucket.high if bucket.high < 1 else 1.1
        inside = (confidence >= bucket.low) & (confidence < top)
        assert bucket.tokens == inside.sum()
        if bucket.tokens:
            assert bucket.kld == pytest.approx(kld[inside].mean(), rel=1e-9)
            assert bucket.same_top1 == pytest.approx(same[inside].mean())
    assert sum(bucket.tokens for bucket in quality.buckets) == 200
    assert [bucket.low for bucket in quality.buckets] == list(EDGES[:-1])


def test_a_model_has_no_divergence_from_itself(case):
    reference, _, ids = case
    quality = summarize("text", compare(torch.tensor(ids), parts(reference, reference, 16)))
    assert quality.kld.max == 0 and quality.same_top1 == 1
    assert quality.ppl_ratio == 1 and quality.ppl_ratio_standard_error == 0 and quality.rms_dp == 0


def test_a_probability_of_zero_adds_no_divergence():
    """exp(-800) is 0 in float64, and 0 · log 0 must be 0, not NaN."""
    reference = np.array([[[0.0, -800.0, -1.0], [0.0, -1.0, -2.0]]])
    other = np.array([[[0.0, -2000.0, -1.0], [0.0, -1.0, -2.0]]])
    quality = summarize("text", compare(torch.tensor([[0, 0]]), parts(reference, other, 2)))
    assert quality.kld.mean == pytest.approx(0, abs=1e-12)


def test_missing_or_non_finite_logits_are_refused(case):
    reference, other, ids = case
    with pytest.raises(ValueError, match="200"):
        compare(torch.tensor(ids), parts(reference[:4], other[:4], 10))
    broken = other.copy()
    broken[2, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        compare(torch.tensor(ids), parts(reference, broken, 10))


def test_standard_errors_equal_the_spread_of_repeated_measurements():
    """Tokens of a row share a shift. The reported error must be close to the spread over many texts;
    treating tokens as independent would give a third of it."""
    generator = np.random.default_rng(0)

    def text() -> np.ndarray:
        return generator.normal(0, 1, (24, 1)) + generator.normal(0, 1, (24, 64))

    texts = [text() for _ in range(300)]
    real = np.std([values.mean() for values in texts])
    reported = np.mean([standard_error(values) for values in texts])
    assert reported == pytest.approx(real, rel=0.15)
    alone = np.mean([values.std() / np.sqrt(values.size) for values in texts])
    assert alone < 0.4 * real


def test_the_standard_error_of_the_perplexity_ratio():
    generator = np.random.default_rng(1)
    ratios, reported = [], []
    for _ in range(300):
        hard = generator.normal(3, 2, (24, 64))  # hard for both models, so the ratio has no error
        loss = hard + 0.05 + generator.normal(0, 0.1, (24, 1)) + generator.normal(0, 0.3, (24, 64))
        none = np.zeros((24, 65))
        quality = summarize("text", Tokens(none, none > 0, none, loss, hard, none[:, 1:]))
        ratios.append(quality.ppl_ratio)
        reported.append(quality.ppl_ratio_standard_error)
    assert np.mean(reported) == pytest.approx(np.std(ratios), rel=0.15)
    assert np.mean(ratios) == pytest.approx(np.exp(0.05), rel=0.01)


def test_a_single_row_uses_its_tokens_as_samples():
    values = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / 2)
    assert standard_error(np.array([[1.0]])) == 0
