"""The shape that the planner reads from headers is that of the model that transformers builds.

`read_shape` must not import torch, so it derives a model's sizes a second time. For every family here a tiny
model is built and saved by transformers; the probe on the meta device (`inspect`), the saved state and one
real forward pass are the oracle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from lowmem.models.architecture import inspect
from lowmem.plan.shape import read_shape

COMMON = {"vocab_size": 640, "bos_token_id": 0, "eos_token_id": 0}
# The spelling of most families; three KV heads out of six, and a head_dim that hidden / heads is not.
LLAMA = {
    **COMMON,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
WIDE_HEADS = {**LLAMA, "head_dim": 32}
NO_GROUPS = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GPT = {**COMMON, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_bigcode": {**GPT, "multi_query": True},
    "gpt_bigcode (no multi-query)": {**GPT, "multi_query": False},
    "llama": LLAMA,
    "llama (tied)": {**LLAMA, "tie_word_embeddings": True},
    "mistral": WIDE_HEADS,
    "qwen2": LLAMA,
    "qwen3": WIDE_HEADS,
    "granite": LLAMA,
    "starcoder2": LLAMA,
    "smollm3": LLAMA,
    "gpt_neox": NO_GROUPS,
    "gpt_neo": {
        **COMMON,
        "hidden_size": 96,
        "num_layers": 2,
        "num_heads": 6,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 128,
    },
    "gptj": {**GPT, "rotary_dim": 8},
    "codegen": {**GPT, "rotary_dim": 8, "n_head": 8},
    "phi": LLAMA,
    "phi3": LLAMA,
    "gemma": WIDE_HEADS,
    "gemma2": WIDE_HEADS,
    "gemma3_text": WIDE_HEADS,
    "stablelm": LLAMA,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "cohere": LLAMA,
    "glm": {**LLAMA, "head_dim": 16},
    "helium": {**LLAMA, "head_dim": 16},
    "nemotron": LLAMA,
    "apertus": LLAMA,
    "bloom": {**COMMON, "hidden_size": 96, "n_layer": 3, "n_head": 6},
    "mpt": {**COMMON, "d_model": 96, "n_layers": 3, "n_heads": 6, "max_seq_len": 128},
    "opt": {
        **COMMON,
        "hidden_size": 96,
        "ffn_dim": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 96,
    },
}


def build(family: str) -> tuple[PretrainedConfig, Any]:
    config = CONFIG_MAPPING[family.partition(" ")[0]](**FAMILIES[family])
    auto: Any = AutoModelForCausalLM
    return config, auto.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_headers_and_probe_agree(family: str, tmp_path: Path) -> None:
    config, model = build(family)
    model.save_pretrained(tmp_path)
    shape, architecture = read_shape(tmp_path), inspect(config)
    linears = [linear for layer in architecture.layers for linear in layer.linears]
    sizes = {(linear.in_features, linear.out_features) for linear in linears}
    assert shape.model_type == architecture.model_type
    assert shape.layers == len(architecture.layers)
    assert shape.linear_sizes == sizes and sum(t.linear for t in shape.tensors) == len(linears)
    assert shape.widest == max(max(pair) for pair in sizes)
    assert sum(t.numel for t in shape.tensors) == sum(
        torch.Size(s).numel() for s in architecture.shapes.values()
    )
    text = config.get_text_config()
    assert (shape.hidden, shape.heads) == (text.hidden_size, text.num_attention_heads)
    assert shape.vocab == model.get_input_embeddings().weight.shape[0]
    limit = "max_seq_len" if family == "mpt" else "max_position_embeddings"
    assert shape.positions == getattr(text, limit, None)
    with torch.no_grad():
        cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    for layer in cache.layers:
        for kept in (layer.keys, layer.values):
            assert kept.shape == (1, shape.kv_heads, 5, shape.head_dim)


FOUR = {
    **{name: value for name, value in LLAMA.items() if name != "num_hidden_layers"},
    "num_hidden_layers": 4,
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 32,
}
OWN_KV: dict[str, dict[str, Any]] = {
    "falcon": {**NO_GROUPS, "multi_query": True},
    "falcon (new decoder)": {**NO_GROUPS, "new_decoder_architecture": True, "num_kv_heads": 3},
    "falcon (all heads)": {**NO_GROUPS, "multi_query": False},
    "minicpm3": {
        **NO_GROUPS,
        "q_lora_rank": 32,
        "kv_lora_rank": 48,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 6,
    },
    "xglm": {**COMMON, "d_model": 96, "ffn_dim": 160, "num_layers": 3, "attention_heads": 6},
    "gemma4_text": {**FOUR, "global_head_dim": 32},
    "gemma4_text (shared)": {**FOUR, "global_head_dim": 32, "num_kv_shared_layers": 2},
    "gemma4_text (one head)": {
        **FOUR,
        "global_head_dim": 32,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
}


@pytest.mark.parametrize("stored", ["as transformers 5", "as before"])
@pytest.mark.parametrize("family", OWN_KV)
def test_kv_values_are_those_of_the_cache(family: str, stored: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[family.partition(" ")[0]](**OWN_KV[family])
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    if stored == "as before":  # the settings that the layers' own ones are made from
        written = json.loads((tmp_path / "config.json").read_text())
        written = {**written, **OWN_KV[family]}
        written.pop("per_layer_config", None)
        (tmp_path / "config.json").write_text(json.dumps(written))
    with torch.no_grad():
        cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    kept = [rows for layer in cache.layers for rows in (layer.keys, layer.values) if rows is not None]
    assert read_shape(tmp_path).kv_values == sum(rows.shape[1] * rows.shape[3] for rows in kept)
