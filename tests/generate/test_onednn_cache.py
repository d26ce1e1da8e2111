"""What torch's libraries keep for prompts of many lengths stays small."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lowmem.generate import onednn_cache
from lowmem.generate.engine import Engine
from tests.helpers import REPO, tiny_model

MANY_LENGTHS = """
import os
from lowmem.generate.onednn_cache import limit_primitive_caches
import torch
from lowmem.benchmarks.experiments.endurance.soak_worker import _heap
if {keep}:
    limit_primitive_caches()
weight = torch.ones(512, 128, dtype=torch.bfloat16)
torch.nn.functional.linear(torch.ones(2, 128, dtype=torch.bfloat16), weight)
before = _heap()
for rows in range(3, 203):
    torch.nn.functional.linear(torch.ones(rows, 128, dtype=torch.bfloat16), weight)
print(_heap() - before)
"""


def heap_after_many_lengths(keep: bool) -> int:
    """Bytes that 200 products of as many numbers of rows leave in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", MANY_LENGTHS.format(keep=keep)],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


@pytest.mark.slow
def test_products_of_many_lengths_limit_primitive_caches_routines() -> None:
    """A chat with a model in bfloat16 kept one for every length of prompt that there had been, up to 1024."""
    few, many = heap_after_many_lengths(True), heap_after_many_lengths(False)
    if many < 4 << 20:
        pytest.skip("this CPU's bfloat16 products are not oneDNN's")
    assert few < 0.6 * many


def test_an_engine_keeps_few_routines(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in onednn_cache._VARIABLES:
        monkeypatch.setenv(variable, "")  # so that what there was comes back
        monkeypatch.delenv(variable)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    Engine(tiny_model("gpt_bigcode_mqa", layers=1), context=32)
    kept = {variable: os.environ[variable] for variable in onednn_cache._VARIABLES}
    assert kept == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "7"}
