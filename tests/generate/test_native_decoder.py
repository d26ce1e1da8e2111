"""The native decode step: float64 is the oracle, no row depends on others; what it cannot do is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.activations import ACT2FN

from lowmem.generate.cache.contract import Slot
from lowmem.generate.cache.dense import DenseKVCache
from lowmem.generate.decoders.contract import DecoderRefused, Feed
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.decoders.native import NativeDecoder
from lowmem.generate.decoders.native_families import why_not
from lowmem.generate.decoders.native_weights import MAX_ROWS
from lowmem.kernels.native.header import WIDTHS
from lowmem.loading.loader import LoadOptions, load
from tests.generate.native_helpers import (
    BIGCODE,
    ERRORS,
    NATIVE,
    bigcode,
    bound,
    contents,
    error,
    filled,
    oracle,
    random_ids,
)
from tests.helpers import TINY_STARCHAT, tiny_model
from tests.kernels.native_oracle import ISAS, using
from tests.rtn_helpers import write_rtn_checkpoint

pytestmark = NATIVE


# ---- the step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", BIGCODE)
@torch.inference_mode()
def test_logits_and_cache_are_float64s(kind: str, isa: str) -> None:
    """Contexts before, at and behind the edges of attention's chunks; single keys decide, so that one too
    many or too few shows."""
    model = bigcode(kind, sharp=4.0)
    with using(isa) as there:
        if not there:
            pytest.skip(f"no {isa}")
        for length, rows in ((1, 1), (9, 2), (254, 1), (255, 1), (256, 1), (250, 11), (600, 5)):
            slot = filled(model, length)
            ids = random_ids(rows, seed=length)
            logits = bound(model, slot).step(ids)
            assert slot.length == length + rows
            expected, left = oracle(model, slot, ids)
            assert logits.dtype is torch.float32
            assert error(logits, expected) < ERRORS[isa], (length, rows)
            for stored, wanted in zip(contents(slot, rows), left, strict=True):
                assert error(stored, wanted) < ERRORS[isa] + 0.004  # bfloat16


@pytest.mark.parametrize(("heads", "hidden"), [(1, 16), (3, 96), (20, 320), (49, 784)])
@torch.inference_mode()
def test_any_number_of_heads(heads: int, hidden: int) -> None:
    """Fewer than fill a vector, and more than are taken at a time, in one row and in several."""
    model = bigcode(heads=heads, hidden=hidden, sharp=3.0)
    for rows in (1, 3, 16):
        slot = filled(model, 300)
        logits = bound(model, slot).step(random_ids(rows))
        assert error(logits, oracle(model, slot, random_ids(rows))[0]) < 0.01


@pytest.mark.parametrize("bits", WIDTHS)
@torch.inference_mode()
def test_packed_linears_are_the_dequantized_ones(bits: int, tmp_path: Path) -> None:
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "q", bits=bits)
    ids, found = random_ids(5), {}
    for width in (None, 8, 12, 16):  # of the integers that activations become
        model = load(tmp_path / "q", LoadOptions(dtype=torch.bfloat16, activation_bits=width)).model
        slot = filled(model, 40, capacity=64)
        logits = bound(model, slot).step(ids)
        found[width] = error(logits, oracle(model, slot, ids)[0])
    assert max(found[12], found[16]) < 0.005 < found[8] < 0.05
    assert found[None] == found[16 if bits > 4 else {4: 12}.get(bits, 8)]


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"])
@torch.inference_mode()
def test_activations_are_told_apart(name: str) -> None:
    """The two gelus differ by 5e-4 at most: inputs where they do, and an error that is less."""
    model = bigcode()
    model.config.activation_function = name
    for block in model.transformer.h:
        block.mlp.act = ACT2FN[name]
        block.mlp.c_fc.bias.data[:] = torch.linspace(-6, 6, 256).to(torch.bfloat16)
        block.mlp.c_proj.weight.data *= 8
    with using("portable C"):
        slot = filled(model, 5)
        logits = bound(model, slot).step([3, 4])
    assert error(logits, oracle(model, slot, [3, 4])[0]) < 2e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", BIGCODE)
@torch.inference_mode()
def test_a_row_depends_on_no_other_row_nor_on_threads(kind: str, isa: str) -> None:
    model = bigcode(kind, hidden=96, heads=6)
    ids = random_ids(12)
    torch.set_num_threads(1)
    with using(isa) as there:
        if not there:
            pytest.skip(f"no {isa}")
        for length in (20, 249):  # within a chunk of keys, and over its edge
            results = []
            for threads, parts in ((1, [12]), (2, [1] * 12), (3, [5, 1, 6]), (2, [12])):
                slot = filled(model, length)  # by torch, with one thread: its bits depend on them
                torch.set_num_threads(threads)
                step, at, logits = bound(model, slot), 0, []
                for part in parts:
                    logits.append(step.step(ids[at : at + part]))
                    at += part
                results.append([torch.cat(logits), *contents(slot, 12)])
                torch.set_num_threads(1)
            for result in results[1:]:
                assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@torch.inference_mode()
def test_the_real_small_model_is_nearer_to_float32_than_eager_bfloat16() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_STARCHAT)
    text = tokenizer((TINY_STARCHAT / "heldout.txt").read_text()[:3000]).input_ids[:208]
    exact = AutoModelForCausalLM.from_pretrained(TINY_STARCHAT, dtype=torch.float32).eval()
    expected = exact(input_ids=torch.tensor([text])).logits[0, 160:].log_softmax(-1)
    model = AutoModelForCausalLM.from_pretrained(TINY_STARCHAT, dtype=torch.bfloat16).eval()
    eager = model(input_ids=torch.tensor([text])).logits[0, 160:]
    slot = DenseKVCache(model.config.n_layer, 256).slots[0]
    EagerDecoder(model).prefill([Feed(slot, text[:160])])
    step = bound(model, slot)
    ours = torch.cat([step.step(text[at : at + 16]) for at in range(160, 208, 16)])

    def divergence(logits: torch.Tensor) -> float:
        other = logits.float().log_softmax(-1)
        return float((expected.exp() * (expected - other)).sum(-1).mean())

    assert divergence(ours) < divergence(eager) < 0.001


# ---- what is refused --------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_step_checks_ids_room_and_buffers() -> None:
    model = bigcode()
    slot = filled(model, 10, capacity=16)
    step = bound(model, slot)
    before = contents(slot, 10)
    for ids in ([], [1] * (MAX_ROWS + 1), [512], [-1], [1] * 7):
        with pytest.raises(ValueError):
            step.step(ids)
    assert slot.length == 10 and all(map(torch.equal, contents(slot, 10), before))
    step.step([1] * 6)
    slot.layers[0].keys = slot.layers[0].keys.clone()  # type: ignore[union-attr]
    slot.cut(0)
    with pytest.raises(ValueError, match="new buffers"):
        step.step([1])
    other = DenseKVCache(2, 16).slots[0]
    for layer in range(2):
        other.view.update(*[torch.zeros(1, 1, 1, 16)] * 2, layer)
    with pytest.raises(DecoderRefused, match="bfloat16"):
        bound(model, other).step([1])


def positions_of_16(model: Any) -> None:
    model.transformer.wpe.weight.data = model.transformer.wpe.weight.data[:16].clone()


@torch.inference_mode()
def test_no_position_beyond_the_models_is_read() -> None:
    model = bigcode()
    slot = filled(model, 10, capacity=32)
    positions_of_16(model)
    step = bound(model, slot)
    step.step([1] * 6)
    with pytest.raises(ValueError, match="do not fit in a slot of 16"):
        step.step([1])


def unknown_activation(model: Any) -> None:
    model.config.activation_function = "relu"


def hooked(model: Any) -> None:
    model.transformer.h[0].register_forward_hook(lambda *_: None)


def other_norm(model: Any) -> None:
    model.transformer.ln_f = torch.nn.RMSNorm(64, dtype=torch.bfloat16)


def other_linear(model: Any) -> None:
    class Adapted(torch.nn.Linear):
        """Adds something of its own."""

    model.transformer.h[1].mlp.c_fc = Adapted(64, 256, dtype=torch.bfloat16)


def float_bias(model: Any) -> None:
    model.transformer.h[1].mlp.c_fc.bias.data = model.transformer.h[1].mlp.c_fc.bias.data.float()


def transposed(model: Any) -> None:
    weight = model.transformer.h[1].attn.c_proj.weight
    weight.data = weight.data.T.contiguous().T


def training(model: Any) -> None:
    model.train()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unknown_activation, "activation relu"),
        (hooked, "hooks"),
        (other_norm, "a norm is RMSNorm"),
        (other_linear, "a linear is Adapted"),
        (float_bias, r"bfloat16 tensor of \[256\]"),
        (transposed, r"bfloat16 tensor of \[64, 64\]"),
        (training, "eval mode"),
    ],
)
@torch.inference_mode()
def test_what_the_step_does_not_know_is_refused(change: Callable[[Any], None], reason: str) -> None:
    model = bigcode()
    slot = filled(model, 5)
    change(model)
    with pytest.raises(DecoderRefused, match=reason):
        bound(model, slot)


def test_other_models_and_dtypes_keep_the_eager_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float32" in why_not(tiny_model("gpt_bigcode_mqa"), 64)
    assert "multiple of 16" in why_not(tiny_model("gpt_bigcode_mqa", heads=8, dtype=torch.bfloat16), 64)
    assert why_not(bigcode(), 64) == ""
    monkeypatch.setenv("LOWMEM_CPU_KERNEL", "reference")
    assert why_not(bigcode(), 64) == "LOWMEM_CPU_KERNEL=reference"


@torch.inference_mode()
def test_a_packed_linear_that_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt_bigcode_mqa", hidden=128, heads=4)
    write_rtn_checkpoint(model, tmp_path / "q", act_order_seed=3)
    scattered = load(tmp_path / "q", LoadOptions(dtype=torch.bfloat16)).model
    with pytest.raises(DecoderRefused, match="layout of the native kernels"):
        bound(scattered, filled(scattered, 5))
    monkeypatch.setenv("LOWMEM_CPU_KERNEL", "reference")
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "r")
    plain = load(tmp_path / "r", LoadOptions(dtype=torch.bfloat16)).model
    monkeypatch.delenv("LOWMEM_CPU_KERNEL")
    with pytest.raises(DecoderRefused, match="layout of the native kernels"):
        bound(plain, filled(plain, 5))


@pytest.mark.parametrize(("spoiled", "refused"), [((1,), False), (range(0, 16, 3), False), (range(10), True)])
@pytest.mark.parametrize("rows", [16, 2])
@torch.inference_mode()
def test_a_few_tokens_may_amplify_the_eager_rounding(
    spoiled: Sequence[int], refused: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half of the first 16 tokens the logits must agree; a shorter prompt is repeated."""
    model = bigcode()
    eager = EagerDecoder(model)
    append = eager.append

    def amplified(slot: Slot, ids: Sequence[int], keep: int) -> torch.Tensor:
        logits = append(slot, ids, keep)
        logits[list(spoiled)] *= -1
        return logits

    monkeypatch.setattr(eager, "append", amplified)
    (slot,) = DenseKVCache(2, 64).slots
    decoder, feed = NativeDecoder(eager, 64), Feed(slot, random_ids(rows))
    if refused:
        with pytest.raises(DecoderRefused, match="differ from the eager ones"):
            decoder.step([feed])
    else:
        assert decoder.step([feed]).logits[0].shape[0] == slot.length == rows


@torch.inference_mode()
def test_a_step_that_differs_from_the_model_is_refused_and_leaves_nothing() -> None:
    """A model of this name whose forward is another one."""
    model = bigcode()
    slot = filled(model, 10)
    decoder = NativeDecoder(EagerDecoder(model), slot.capacity)
    model.transformer.h[0].mlp.c_proj.forward = lambda x: torch.zeros((*x.shape[:-1], 64), dtype=x.dtype)
    with pytest.raises(DecoderRefused, match="differ from the eager ones"):
        decoder.step([Feed(slot, [1, 2])])
    slot.rewind()
    assert slot.length == 10
    del model.transformer.h[0].mlp.c_proj.forward
    (logits,) = decoder.step([Feed(slot, [1, 2])]).logits
    assert slot.length == len(slot.tokens) == 12 and logits.shape == (2, 512)
