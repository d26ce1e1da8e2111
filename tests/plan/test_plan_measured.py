"""The planner's promise against what processes really take: within 5 % or 64 MiB, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from lowmem.benchmarks.experiments.full_size import peak_memory as memory
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions
from lowmem.benchmarks.experiments.starchat.random_weights import write_packed, write_source

from lowmem.plan.request import ModelRequest, plan_for
from tests.helpers import TINY_STARCHAT

CONTEXT = 1024
DIMENSIONS = Dimensions(layers=2, n_embd=2048, heads=16)


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """StarChat Alpha's layout at a third of its width: 450 MB in 16 bits, and at 4 bits beside it."""
    base = tmp_path_factory.mktemp("shaped")
    write_packed(base / "model-4bit", DIMENSIONS, 4, 128)
    return write_source(base / "model", DIMENSIONS)


@pytest.fixture(autouse=True)
def no_cache_and_one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def check(model: Path, labels: set[str]) -> None:
    rows = memory.measure(str(model), CONTEXT, only=labels)
    assert {row.label for row in rows} == labels
    for row in rows:
        assert row.within, row
        # The measurement saw the model: what is there all the time is the least that it can be.
        assert row.peak > 0.9 * (row.weights + row.kv_cache), row


@pytest.mark.slow
def test_predicted_memory_is_what_a_process_takes(shaped: Path) -> None:
    check(shaped, {"bfloat16", "4-bit g128", "NF4 bnb"})


@pytest.mark.slow
def test_predicted_memory_of_the_other_forms(shaped: Path) -> None:
    for bits, group_size in ((8, 128), (2, 32)):
        write_packed(shaped.with_name(f"model-{bits}bit"), DIMENSIONS, bits, group_size)
    check(shaped, {"8-bit g128", "2-bit g32", "int8 bnb"})


@pytest.mark.slow
def test_predicted_memory_of_the_embedded_model() -> None:
    plan = plan_for(ModelRequest(str(TINY_STARCHAT), device="cpu"))
    check(TINY_STARCHAT, {option.candidate.label for option in plan.options})


def test_the_context_shows_in_the_plan(shaped: Path) -> None:
    """8192 tokens instead of 128: the KV cache to the byte."""
    short, long = (
        plan_for(ModelRequest(str(shaped), device="cpu", context=n)).chosen.need for n in (128, 8192)
    )
    assert long.kv_cache - short.kv_cache == 2 * 2 * 128 * 2 * (8192 - 128)
    assert long.weights == short.weights and long.workspace >= short.workspace


def test_positions_that_are_never_looked_up_stay_in_the_file(shaped: Path) -> None:
    """A packed model's float16 table of 8192 positions: the rows of the context alone are in the plan."""

    def weights(context: int, dtype: str | None = None) -> int:
        request = ModelRequest(
            str(shaped.with_name("model-4bit")), device="cpu", context=context, dtype=dtype
        )
        return plan_for(request).chosen.need.weights

    assert weights(8192) - weights(1024) == (8192 - 1024) * DIMENSIONS.n_embd * 2
    assert weights(8192, "float32") == weights(1024, "float32")  # cast whole
