"""The measurement of batches runs, on a tiny model."""

from __future__ import annotations

import pytest
from lowmem.benchmarks.experiments import batches

from lowmem.generate.engine import Engine
from tests.helpers import tiny_model


def test_rates_and_waits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SMALL_VOCAB", 512)
    monkeypatch.setattr(batches, "LONG", 200)
    monkeypatch.setattr(batches, "PROMPT", 12)
    engine = Engine(tiny_model("llama", vocab=512), context=256, slots=4, chunk=16, speculate=False)
    assert batches.decode_rate(engine, 3) > 0
    assert batches.first_token(engine, beside=False) > 0
    assert batches.first_token(engine, beside=True) > 0
    assert engine.free == 4
