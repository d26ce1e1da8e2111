"""Several sequences at once: what the worker times, and the table of the times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowmem.benchmarks.experiments import batches
from lowmem.benchmarks.experiments.common import origin_here, repeated
from lowmem.benchmarks.experiments.workers.lowmem_worker import open_runtime
from lowmem.benchmarks.experiments.workers.protocol import prompts_of

from tests.helpers import TINY_STARCHAT


@pytest.fixture
def few_threads() -> int:
    return torch.get_num_threads()


def test_the_worker_times_steps_of_all_sequences(few_threads: int) -> None:
    runtime = open_runtime("dense", Path(TINY_STARCHAT), 64, few_threads, 3)
    for count in (1, 3):
        seconds = runtime.together(count, 12, 5)["seconds"]
        assert len(seconds) == 5 and min(seconds) > 0
        assert [slot.length for slot in runtime.engine.cache.slots[:count]] == [12 + 5] * count
    assert runtime.engine.free == 3
    assert runtime.first_token(8, 0)["seconds"] > 0
    with pytest.raises(RuntimeError, match="too soon"):
        runtime.first_token(8, 10)


def test_prompts_begin_differently() -> None:
    prompts = prompts_of(8, 20, 4096)
    assert [len(ids) for ids in prompts] == [20] * 8
    assert len({ids[0] for ids in prompts}) == 8


def test_the_table_compares_the_same_round() -> None:
    timings = (
        batches.Timing("lowmem", 1, repeated([10.0, 5.0, 8.0])),
        batches.Timing("lowmem", 4, repeated([32.0, 15.0, 24.0])),
        batches.Timing("llama.cpp", 1, repeated([7.0, 4.0, 6.0])),
        batches.Timing("llama.cpp", 4, repeated([20.0, 15.0, 24.0])),
    )
    origin = origin_here("batches", ["--llama-python", "/somewhere/python"], "x")
    record = batches.BatchesRecord(origin, 2, 3, "0.3", (), timings, repeated([0.5]), repeated([1.25]))
    text = batches.render(record)
    assert "4 sequences: 3.00 × of lowmem with 1, goal ≥ 3.0 ×: met." in text
    assert "4 sequences: 1.00 × of llama.cpp with 4, goal ≥ 1.35 ×: missed." in text
    assert "1.00 × (1.00 × to 1.60 ×)" in text and "somewhere" not in text
    assert "| 8 |  |  |  |  |  |" in text and "1.25" in text
