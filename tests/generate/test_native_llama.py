"""The native forward of Llama and its relatives: transformers' own code in float64 is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowmem.config import SamplingParams
from lowmem.generate.decoders.contract import DecoderRefused, Feed
from lowmem.generate.decoders.native import NativeDecoder
from lowmem.generate.decoders.native_families import FAMILIES, why_not
from lowmem.generate.decoders.native_model import NativeModel
from lowmem.generate.engine import Engine
from lowmem.loading.loader import LoadOptions, load
from tests.generate.native_helpers import (
    ERRORS,
    LLAMA_LIKE,
    NATIVE,
    bound,
    contents,
    error,
    exact,
    filled,
    llama_like,
    oracle,
    random_ids,
)
from tests.helpers import tiny_model
from tests.kernels.native_oracle import ISAS, using
from tests.rtn_helpers import write_rtn_checkpoint

pytestmark = NATIVE


def packed(kind: str, folder: Path, **options: Any) -> Any:
    """A tiny model of 4 bits, loaded for the CPU in bfloat16."""
    if not folder.exists():
        write_rtn_checkpoint(tiny_model(kind, positions=1024), folder)
    return load(folder, LoadOptions(dtype=torch.bfloat16, **options)).model


def assert_is_float64s(model: Any, isa: str, lengths: list[tuple[int, int]]) -> None:
    for length, rows in lengths:
        slot = filled(model, length)
        ids = random_ids(rows, seed=length)
        logits = bound(model, slot).step(ids)
        expected, left = oracle(model, slot, ids)
        assert logits.dtype is torch.float32 and error(logits, expected) < ERRORS[isa], (length, rows)
        for stored, wanted in zip(contents(slot, rows), left, strict=True):
            assert error(stored, wanted) < ERRORS[isa] + 0.004  # bfloat16


# ---- the forward ------------------------------------------------------------------------------------------


def test_every_family_is_tried() -> None:
    assert list(FAMILIES) == LLAMA_LIKE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", LLAMA_LIKE)
@torch.inference_mode()
def test_logits_and_cache_are_float64s(kind: str, isa: str) -> None:
    model = llama_like(kind)
    with using(isa) as there:
        if not there:
            pytest.skip(f"no {isa}")
        assert_is_float64s(model, isa, [(1, 1), (250, 11)])


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"head_dim": 48}),
    "one KV head": ("llama", {"num_key_value_heads": 1}),
    "no groups": ("llama", {"num_key_value_heads": 4}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "gelu_pytorch_tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "silu": ("starcoder2", {"hidden_act": "silu"}),
    "no biases": ("starcoder2", {"use_bias": False}),
    "a window as long": ("mistral", {"sliding_window": 700}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "yarn": ("llama", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    "llama3": (
        "llama",
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 1e4}},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
@torch.inference_mode()
def test_settings_are_float64s(name: str) -> None:
    kind, settings = SETTINGS[name]
    with using("portable C"):
        assert_is_float64s(llama_like(kind, **settings), "portable C", [(300, 2)])


@pytest.mark.parametrize("kind", LLAMA_LIKE)
@torch.inference_mode()
def test_packed_linears_are_the_dequantized_ones(kind: str, tmp_path: Path) -> None:
    """Also with an embedding and a head of 8 bits."""
    ids, found = random_ids(5), {}
    for bits in (16, 8):
        model = packed(kind, tmp_path / "q", activation_bits=16, head_bits=bits)
        slot = filled(model, 40, capacity=64)
        found[bits] = bound(model, slot).step(ids)
        if bits == 16:
            assert error(found[16], oracle(model, slot, ids)[0]) < 0.005
    assert error(found[8], found[16].double()) < 0.02


@pytest.mark.parametrize(
    ("kind", "isa"), [*(("qwen3", isa) for isa in ISAS), ("granite", "AVX2"), ("starcoder2", "AVX2")]
)
@torch.inference_mode()
def test_a_row_depends_on_no_other_row_nor_on_threads(kind: str, isa: str, tmp_path: Path) -> None:
    """A prompt's rows too: 40 of them are multiplied by the kernels for prompts."""
    ids = random_ids(40)
    torch.set_num_threads(1)
    model = packed(kind, tmp_path / "q")
    with using(isa) as there:
        if not there:
            pytest.skip(f"no {isa}")
        results = []
        for threads, parts in ((1, [40]), (2, [1] * 8 + [32]), (3, [5, 1, 34])):
            slot = filled(model, 252)  # they cross a chunk of keys
            torch.set_num_threads(threads)
            step, at, logits = bound(model, slot), 0, []
            for part in parts:
                logits.append(step.step(ids[at : at + part]))
                at += part
            results.append([torch.cat(logits), *contents(slot, 40)])
            torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["qwen3", "granite", "starcoder2"])
@torch.inference_mode()
def test_every_instruction_set_gives_the_same_bits(kind: str, isa: str, tmp_path: Path) -> None:
    """But for attention: the keys and values before it, and the logits where it has one key."""
    model, found = packed(kind, tmp_path / "q", head_bits=8), []
    for name in ("portable C", isa):
        with using(name) as there:
            if not there:
                pytest.skip(f"no {name}")
            slot = filled(model, 20)
            step = bound(model, slot)
            step.step(random_ids(3))
            before = contents(slot, 3)[:2]
            slot.cut(0)
            found.append([*before, step.step([7])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---- the engine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", LLAMA_LIKE)
def test_greedy_answers_are_float64s(kind: str, dense: bool, tmp_path: Path) -> None:
    """Each token has float64's largest logit, or one that bfloat16 keys and values cannot tell from it. Eager
    answers in bfloat16 are no oracle: they round the logits themselves, so that equal ones are frequent."""
    model = llama_like(kind) if dense else packed(kind, tmp_path / "q", activation_bits=16)
    prompt, params = random_ids(30, seed=4), SamplingParams(temperature=0, max_new_tokens=24)
    engine = Engine(model, context=128, speculate=False)
    answer = [token.id for token in engine.generate(prompt, params)]
    decoder: Any = engine.decoder
    assert isinstance(decoder.fast, NativeDecoder) and not decoder.why_eager and len(answer) == 24
    with torch.inference_mode():
        logits = exact(model)(input_ids=torch.tensor([prompt + answer])).logits[0, 29:-1]
    behind = logits.amax(dim=1) - logits[range(24), answer]
    assert (behind == 0).sum() >= 22 and behind.max() < 0.01 * logits.abs().max()


# ---- what is refused --------------------------------------------------------------------------------------


def hooked(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: None)


def other_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm = nn.RMSNorm(64, dtype=torch.bfloat16)


def other_layer(model: Any) -> None:
    class Scaled(type(model.model.layers[0])):  # type: ignore[misc]
        """A layer of its own."""

    model.model.layers[1].__class__ = Scaled


def fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = 1


def other_rows(model: Any) -> None:
    model.model.embed_tokens = nn.Embedding(512, 64, dtype=torch.float32)


def unknown_activation(model: Any) -> None:
    model.config.hidden_act = "relu"


def short_window(model: Any) -> None:
    model.config.sliding_window = 63


def unknown_layers(model: Any) -> None:
    model.config.layer_types = ["full_attention", "linear_attention"]


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("llama", hooked, "hooks"),
        ("llama", other_norm, "a norm is RMSNorm"),
        ("qwen2", other_layer, "do not know Scaled"),
        ("llama", fewer_layers, "has 2 layers, and runs 1"),
        ("llama", other_rows, "not torch.float32"),
        ("granite", unknown_activation, "activation relu"),
        ("mistral", short_window, "window of 63 tokens is shorter than the context of 64"),
        ("qwen3", unknown_layers, "layers of linear_attention"),
    ],
)
@torch.inference_mode()
def test_what_the_forward_does_not_know_is_refused(
    kind: str, change: Callable[[Any], None], reason: str
) -> None:
    model = llama_like(kind)
    change(model)
    with pytest.raises(DecoderRefused, match=reason) as refused:
        NativeModel(model, 64)
    assert "\n" not in refused.value.reason


def test_other_families_and_length_dependent_rotation_are_refused() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "the type dynamic" in why_not(llama_like("llama", rope_parameters=dynamic), 64)
    assert "float32" in why_not(tiny_model("llama"), 64)
    assert "multiple of 16" in why_not(llama_like("llama", head_dim=24), 64)
    other = llama_like("llama")
    other.config.model_type = "olmo"
    assert "not olmo" in why_not(other, 64)
    other.config.model_type = "mistral"
    assert "do not know LlamaForCausalLM" in why_not(other, 64)


@torch.inference_mode()
def test_a_slot_of_another_capacity_is_refused() -> None:
    model = llama_like("llama")
    slot = filled(model, 5, capacity=64)
    with pytest.raises(DecoderRefused, match="another capacity"):
        NativeModel(model, 63).forward([Feed(slot, [1])], [1])
