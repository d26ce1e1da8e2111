"""Decoding with a head and an embedding in 8 bits: every decoder gives the same tokens, drafts or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config import SamplingParams
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.decoders.native import NativeDecoder
from lowmem.generate.engine import Engine
from lowmem.kernels.native import library as native
from lowmem.kernels.quantized_tables import QuantizedEmbedding, QuantizedHead
from lowmem.loading.loader import LoadOptions, load
from tests.generate.decoding import score
from tests.generate.native_helpers import bound, error, filled, oracle, random_ids
from tests.helpers import TINY_STARCHAT, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

needs_library = pytest.mark.skipif(not native.available(), reason="the library is not compiled")
PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt_bigcode at 4 bits; its vocabulary of 4100 is no multiple of a tile."""
    path = tmp_path_factory.mktemp("quantized-head")
    model = tiny_model("gpt_bigcode_mqa", vocab=4100, positions=1024, dtype=torch.float16)
    write_rtn_checkpoint(model, path)
    return path


def loaded(folder: Path, dtype: torch.dtype = torch.bfloat16, bits: int = 8) -> Any:
    return load(folder, LoadOptions(dtype=dtype, head_bits=bits)).model


def greedy(model: Any, **options: Any) -> list[int]:
    engine = Engine(model, context=128, **options)
    return [t.id for t in engine.generate(PROMPT, SamplingParams(temperature=0, max_new_tokens=24))]


def in_float32(model: Any) -> Any:
    """The model with its tables as plain modules, for the float64 oracle of the native step."""
    table = model.transformer.wte.table.dequantize()
    for name, module in (
        ("wte", torch.nn.Embedding(*table.shape)),
        ("lm_head", torch.nn.Linear(1, 1, False)),
    ):
        module.weight = torch.nn.Parameter(table, requires_grad=False)
        setattr(model.transformer if name == "wte" else model, name, module)
    return model


@needs_library
@torch.inference_mode()
def test_a_native_step_is_float64s(folder: Path) -> None:
    """Its only rounding beside attention's is that of looked-up rows to float16."""
    model = loaded(folder)
    for rows in (1, 5, 16):
        slot = filled(model, 40, capacity=64)
        ids = random_ids(rows, vocab=4100)
        logits = bound(model, slot).step(ids)
        assert logits.shape == (rows, 4100)
        expected, _ = oracle(in_float32(loaded(folder)), slot, ids)
        assert error(logits, expected) < 0.005


@needs_library
@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others(folder: Path) -> None:
    model, ids = loaded(folder), random_ids(9, vocab=4100)
    found = []
    for parts in ([9], [1] * 9, [4, 5]):
        step, at, logits = bound(model, filled(model, 30, capacity=64)), 0, []
        for part in parts:
            logits.append(step.step(ids[at : at + part]))
            at += part
        found.append(torch.cat(logits))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_library
def test_the_native_decoder_runs_and_agrees_with_the_eager_one(folder: Path) -> None:
    model = loaded(folder)
    engine = Engine(model, context=128)
    tokens = [t.id for t in engine.generate(PROMPT, SamplingParams(temperature=0, max_new_tokens=24))]
    assert isinstance(engine.decoder.fast, NativeDecoder) and engine.decoder.why_eager == ""  # type: ignore[attr-defined]
    eager = Engine(model, context=128)
    eager.decoder = EagerDecoder(model)
    assert [t.id for t in eager.generate(PROMPT, SamplingParams(temperature=0, max_new_tokens=24))] == tokens
    assert greedy(model, speculate=False) == tokens


@pytest.mark.parametrize("kernel", ["native", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kernel_decodes(
    kernel: str, dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 to the same tokens as the model with the dequantized tables in plain modules."""
    if kernel == "native" and not native.available():
        pytest.skip("the library is not compiled")
    monkeypatch.setenv("LOWMEM_CPU_KERNEL", kernel)
    model = loaded(folder, dtype)
    assert isinstance(model.transformer.wte, QuantizedEmbedding) and isinstance(model.lm_head, QuantizedHead)
    tokens = greedy(model)
    assert len(tokens) == 24
    if dtype is torch.float32:
        assert tokens == greedy(in_float32(loaded(folder, dtype)))


@torch.inference_mode()
def test_scores_are_those_of_the_same_head(folder: Path) -> None:
    """Log-probabilities of a prompt, in parts of 128 rows: by the prefill kernel, or torch's slices."""
    model = loaded(folder, torch.float32)
    ids = random_ids(300, vocab=4100)
    engine = Engine(model, context=512)
    found = [t.logprob for t in score(engine, ids, 0)][1:]
    logits = in_float32(loaded(folder, torch.float32))(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    assert torch.allclose(torch.tensor(found), expected, atol=1e-3)


@torch.inference_mode()
def test_the_real_small_model_hardly_changes() -> None:
    """KL divergence on held-out code, far below that of 4-bit linears (0.0025)."""
    exact = load(TINY_STARCHAT, LoadOptions(dtype=torch.float32))
    text = exact.tokenizer((TINY_STARCHAT / "heldout.txt").read_text()[:6000]).input_ids[:512]
    ids = torch.tensor([text])
    expected = exact.model(ids).logits[0].log_softmax(-1)
    other = loaded(TINY_STARCHAT, torch.float32)(ids).logits[0].log_softmax(-1)
    kld = float((expected.exp() * (expected - other)).sum(-1).mean())
    assert 1e-7 < kld < 0.0003


def test_the_eager_decoder_feeds_ids_of_any_count(folder: Path) -> None:
    model = loaded(folder)
    (logits,) = EagerDecoder(model).prefill([Feed(Engine(model, context=64).cache.slots[0], PROMPT, keep=3)])
    assert logits.shape == (3, 4100)
