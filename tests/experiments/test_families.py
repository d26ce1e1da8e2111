"""The sweep over transformers' families: some in every run, all of them in slow ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from lowmem.benchmarks.experiments.families.record import EXPERIMENT, PAGE, describe, page, record
from lowmem.benchmarks.experiments.families.trial import Outcome, try_variant
from lowmem.benchmarks.experiments.families.variants import Variant, families, variants

FAST = (
    "llama (tied)",
    "gpt_bigcode (untied)",
    "falcon (alibi)",
    "gemma2",
    "minicpm3",
    "gpt_neox (sequential residual)",
    "mpt",
    "olmo2",
    "phi (qk norm)",
    "qwen2 (windows)",
    "smollm3",
    "cohere (qk norm)",
    "falcon",
    "opt (projected)",
    "starcoder2",
)
RUNS = ("gpt2", "mixtral", "qwen3_moe", "gemma3n_text (shared keys)", "gemma4_text (shared keys)")
"""They run, and convert refuses them."""
REFUSED = ("lfm2", "falcon_h1", "bert")


def _variant(name: str) -> Variant:
    return next(variant for variant in variants(name.partition(" ")[0]) if variant.name == name)


@pytest.mark.parametrize("name", FAST)
def test_a_family_is_right(name: str, tmp_path: Path) -> None:
    outcome = try_variant(_variant(name), tmp_path)
    assert outcome.right, describe(outcome)


@pytest.mark.parametrize("name", RUNS)
def test_a_family_only_runs(name: str, tmp_path: Path) -> None:
    outcome = try_variant(_variant(name), tmp_path)
    assert outcome.only_runs, describe(outcome)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_with_one_reason(name: str, tmp_path: Path) -> None:
    outcome = try_variant(_variant(name), tmp_path)
    assert outcome.refused, describe(outcome)


def test_a_wrong_token_is_a_fault() -> None:
    assert Outcome("x", "ok", "ok", "[1], not [2]", "ok", 0.0).fault
    assert Outcome("x", "ok", "ok", "ok", "KL divergence 0.2", 0.2).fault
    assert not Outcome("x", "ok", "ok", "ok", "ok", 0.0).fault


def test_the_page_is_that_of_the_record() -> None:
    found = EXPERIMENT.read()
    assert page(found) == PAGE.read_text(encoding="utf-8")
    assert not [outcome.name for outcome in found.outcomes if outcome.fault]
    assert {outcome.name.partition(" ")[0] for outcome in found.outcomes} == set(families())


@pytest.mark.slow
def test_every_family(tmp_path: Path) -> None:
    found = record(families(), tmp_path)
    assert not [describe(outcome) for outcome in found.outcomes if outcome.fault]
