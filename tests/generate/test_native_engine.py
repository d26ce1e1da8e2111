"""The native decode step in the engine, its threads, and reading: no token depends on who computes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem.config import SamplingParams
from lowmem.generate.cache.dense import DenseSlot
from lowmem.generate.decoders.native_model import NativeModel
from lowmem.generate.decoders.selection import SelectedDecoder
from lowmem.generate.engine import Engine
from lowmem.generate.sequence import Token
from lowmem.kernels.native import library as native
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.loading.loader import LoadOptions, load
from tests.generate.decoding import drafting, kept_rows
from tests.generate.native_helpers import NATIVE, bigcode, random_ids
from tests.helpers import tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

pytestmark = NATIVE


# ---- in the engine ----------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_new_tokens=60)
WARM = SamplingParams(temperature=0.7, top_k=0, max_new_tokens=60, seed=5)


def why_eager(engine: Engine) -> str:
    assert isinstance(engine.decoder, SelectedDecoder)
    return engine.decoder.why_eager


def answer(model: Any, params: SamplingParams, *, draft: bool) -> tuple[list[Token], Engine]:
    part = random_ids(24, vocab=64, seed=3)
    engine = Engine(model, context=256, speculate=draft)
    engine.drafting.paces = drafting()
    return list(engine.generate([*part, *part[:12]], params)), engine


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_drafts_change_no_token_and_no_bit(packed: bool, params: SamplingParams, tmp_path: Path) -> None:
    model = bigcode()
    if packed:
        write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa", positions=1024), tmp_path / "q")
        model = load(tmp_path / "q", LoadOptions(dtype=torch.bfloat16)).model
    plain, before = answer(model, params, draft=False)
    tokens, after = answer(model, params, draft=True)
    assert why_eager(before) == why_eager(after) == ""
    assert tokens == plain
    assert params is WARM or after.sequence.accepted_tokens > 10
    for one, other in zip(*kept_rows(before, after), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "starcoder2"])
def test_packed_models_of_other_families_need_no_pairs(kind: str, tmp_path: Path) -> None:
    """Their eager steps have one row; what drafts leave behind is the same to the last bit all the same."""
    write_rtn_checkpoint(tiny_model(kind, hidden=128), tmp_path / "q")
    model = load(tmp_path / "q", LoadOptions(dtype=torch.bfloat16)).model
    rows: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    for params in (GREEDY, WARM):
        plain, before = answer(model, params, draft=False)
        assert set(rows[1:]) == {1}
        tokens, after = answer(model, params, draft=True)
        assert [t.id for t in tokens] == [t.id for t in plain]
        for one, other in zip(*kept_rows(before, after), strict=True):
            assert torch.equal(one, other)
        rows.clear()


def test_the_first_step_is_checked_once_and_later_ones_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bigcode()
    forwards: list[int] = []
    real = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        forwards.append(1)
        return real(*args, **options)

    monkeypatch.setattr(model, "forward", forward)
    tokens, engine = answer(model, GREEDY, draft=False)
    assert len(tokens) == 60 and len(forwards) == 2  # the prefill and the check
    list(engine.generate(random_ids(20), GREEDY))
    assert len(forwards) == 3


def test_a_refused_step_leaves_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bigcode()
    monkeypatch.setenv("LOWMEM_CPU_KERNEL", "reference")
    eager, _ = answer(model, GREEDY, draft=False)
    monkeypatch.delenv("LOWMEM_CPU_KERNEL")

    def wrong(self: NativeModel, feeds: Any, wanted: Any) -> torch.Tensor:
        for feed in feeds:
            feed.slot.advance(len(feed.ids))
        return torch.zeros((sum(wanted), 512))

    monkeypatch.setattr(NativeModel, "forward", wrong)
    tokens, engine = answer(model, GREEDY, draft=False)
    assert tokens == eager
    assert "differ from the eager ones" in why_eager(engine)


@pytest.mark.parametrize("at", ["before", "behind", "between"])
def test_an_interrupted_step_leaves_a_cache_that_goes_on_right(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bigcode()
    expected, _ = answer(model, GREEDY, draft=False)
    engine = Engine(model, context=256, speculate=False)
    steps = [0]
    real_forward, real_advance = NativeModel.forward, DenseSlot.advance

    def forward(self: NativeModel, feeds: Any, wanted: Any) -> torch.Tensor:
        steps[0] += 1
        if steps[0] == 7 and at == "before":
            raise KeyboardInterrupt
        logits = real_forward(self, feeds, wanted)
        if steps[0] == 7 and at == "behind":
            raise KeyboardInterrupt
        return logits

    def advance(self: DenseSlot, count: int) -> None:
        if steps[0] == 7 and at == "between":
            self.layers[0].length += count
            raise KeyboardInterrupt
        real_advance(self, count)

    monkeypatch.setattr(NativeModel, "forward", forward)
    monkeypatch.setattr(DenseSlot, "advance", advance)
    part = random_ids(24, vocab=64, seed=3)
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate([*part, *part[:12]], GREEDY))
    assert list(engine.generate([*part, *part[:12]], GREEDY)) == expected
    assert why_eager(engine) == "" and steps[0] > 60


def test_weights_come_into_the_kernels_order_between_tokens(tmp_path: Path) -> None:
    """The first token is there before any is moved, and none of those that follow changes."""
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "q")
    model = load(tmp_path / "q", LoadOptions(dtype=torch.bfloat16)).model
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    engine = Engine(model, context=256, speculate=False)
    tokens = engine.generate(random_ids(20), GREEDY)
    first = next(tokens)
    assert all(linear.in_file_order for linear in linears)
    answered = [first, *tokens]
    assert not any(linear.in_file_order for linear in linears)
    engine.reset()
    assert list(engine.generate(random_ids(20), GREEDY)) == answered


# ---- threads, and reading ---------------------------------------------------------------------------------


def exclusive_or(data: bytes) -> int:
    padded = data + bytes(-len(data) % 8)
    return int(np.bitwise_xor.reduce(np.frombuffer(padded, np.uint64), initial=np.uint64(0)))


@pytest.mark.parametrize("own", [False, True], ids=["torch's threads", "own threads"])
def test_reading_reads_every_byte_once(own: bool) -> None:
    memory = np.random.default_rng(0).integers(0, 256, (5 << 20) + 77, dtype=np.uint8)
    with native.running() as library:
        try:
            for threads in (1, 2, 5):
                library.lm_set_threads(threads, None if own else native.loaded().gomp)
                for start, size in (
                    (0, 0),
                    (1, 1),
                    (3, 7),
                    (8, 8),
                    (5, 255),
                    (2, 256),
                    (1, 5 << 20),
                    (7, 5 << 20),
                ):
                    part = memory[start : start + size]
                    assert library.lm_read(part.ctypes.data, size) == exclusive_or(part.tobytes())
        finally:
            native.loaded().threads = 0  # set again by the next caller


FORK = """
import os, numpy as np, torch
from lowmem.kernels.native import library as native
library = native.library()
library.lm_set_threads(3, None)
data = np.arange(1 << 19, dtype=np.uint64)
expected = int(np.bitwise_xor.reduce(data))
assert library.lm_read(data.ctypes.data, data.nbytes) == expected
child = os.fork()
assert library.lm_read(data.ctypes.data, data.nbytes) == expected
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_gets_threads_of_its_own() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60, env=environment)
