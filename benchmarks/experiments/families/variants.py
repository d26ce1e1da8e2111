"""The tiny models of the sweep: one of each family, and one per option that changes the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

VOCABULARY = 4096
"""Of tiny-starchat's tokenizer, which every model gets."""
POSITIONS = 1024
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BASE: dict[str, Any] = {
    **_TOKENS,
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_HEADS = {"head_dim": 32}
_WINDOW = {"sliding_window": 48}
_BOTH = ("sliding_attention", "full_attention")
_MIXED = {**_WINDOW, "layer_types": list(_BOTH)}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_FOUR = {
    "num_hidden_layers": 4,
    "sliding_window": 48,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
_GPT: dict[str, Any] = {
    **_TOKENS,
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
}
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": POSITIONS // 4,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 10000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": POSITIONS // 8,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 256,
}
_MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 32,
}

OWN: Mapping[str, Mapping[str, Any]] = {
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": {**_GPT, "rotary_dim": 8},
    "codegen": {**_GPT, "rotary_dim": 8},
    "openai-gpt": _GPT,
    "gpt_neo": {
        **_TOKENS,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 48,
        "max_position_embeddings": POSITIONS,
    },
    "bloom": {**_TOKENS, "vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {
        **_TOKENS,
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": POSITIONS,
    },
    "ctrl": {
        **_TOKENS,
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "dff": 128,
        "n_positions": POSITIONS,
    },
    "dbrx": {
        **_TOKENS,
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": POSITIONS,
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
    },
    "mamba": {
        **_TOKENS,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 16,
    },
    "falcon_mamba": {
        **_TOKENS,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 16,
    },
    "mamba2": {
        **_TOKENS,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 1,
        "state_size": 16,
    },
    "rwkv": {
        **_TOKENS,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "attention_hidden_size": 64,
        "context_length": POSITIONS,
    },
    "xlstm": {**_TOKENS, "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4},
}
"""The settings of families that spell them in their own way; all others get BASE."""

MORE: Mapping[str, Mapping[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "dots3_note_text": {"num_key_value_heads": 4},
    "glm4_moe_lite": _MLA,
    "longcat_flash": {**_MLA, "num_layers": 1, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 64},
    "minicpm3": _MLA,
    "youtu": _MLA,
    "dots1": _HEADS,
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "cohere_compass_text": {"rope_parameters": {"full_attention": _PLAIN}},
    "gemma3n_text": {**_HEADS, **_FOUR, **_PER_LAYER, "num_kv_shared_layers": 0, "laurel_rank": 32},
    "gemma4_text": {**_HEADS, **_FOUR, **_PER_LAYER, "global_head_dim": 64},
    "gemma4_unified_text": {**_HEADS, **_MIXED, "global_head_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
    "cohere2": _MIXED,
    "exaone4": _MIXED,
    "gemma": _HEADS,
    "gemma2": {
        **_HEADS,
        **_WINDOW,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {**_HEADS, **_MIXED},
    "vaultgemma": {**_HEADS, **_MIXED},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "helium": {"head_dim": 16},
    "gpt_oss": {**_MIXED, "head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mistral": _WINDOW,
    "ministral": {**_MIXED, **_HEADS},
    "olmo3": _MIXED,
    "phi3": _WINDOW,
    "qwen3": _HEADS,
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": _WINDOW,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "xglm": {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
}
"""Settings beside BASE."""

OPTIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "llama": {
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "one KV head": {"num_key_value_heads": 1, "head_dim": 32},
        "wide heads": _HEADS,
        "linear scaling": {"rope_parameters": _LINEAR},
        "dynamic NTK": {"rope_parameters": _DYNAMIC, "max_position_embeddings": 256},
        "yarn": {"rope_parameters": _YARN},
        "llama3 scaling": {"rope_parameters": _LLAMA3},
    },
    "gpt_bigcode": {"no multi-query": {"multi_query": False}, "untied": {"tie_word_embeddings": False}},
    "gpt2": {"scaled by layer": {"scale_attn_by_inverse_layer_idx": True}},
    "gpt_neox": {
        "sequential residual": {"use_parallel_residual": False},
        "tied": {"tie_word_embeddings": True},
    },
    "falcon": {
        "alibi": {"alibi": True, "multi_query": True, "parallel_attn": True},
        "new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "sequential": {"parallel_attn": False, "bias": True, "multi_query": False},
    },
    "gemma3n_text": {"shared keys": {"num_kv_shared_layers": 2}},
    "gemma4_text": {
        "shared keys": {"num_kv_shared_layers": 2},
        "keys as values": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    },
    "minicpm3": {"no q rank": {"q_lora_rank": None}},
    "mistral": {"no window": {"sliding_window": None}},
    "qwen2": {
        "windows": {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
        "tied": {"tie_word_embeddings": True},
    },
    "qwen3": {"windows": {**_HEADS, **_WINDOW, "use_sliding_window": True, "max_window_layers": 1}},
    "phi": {"qk norm": {"qk_layernorm": True}},
    "phi3": {
        "longrope": {"rope_parameters": _LONG, "original_max_position_embeddings": 256},
        "partial rotary": {"partial_rotary_factor": 0.5},
    },
    "stablelm": {
        "parallel": {"use_parallel_residual": True},
        "qk norm": {"qk_layernorm": True},
        "biases": {"use_qkv_bias": True},
    },
    "starcoder2": {"no window": {"sliding_window": None}, "no bias": {"use_bias": False}},
    "cohere": {"qk norm": {"use_qk_norm": True}},
    "olmo": {"clipped": {"clip_qkv": 1.0}},
    "persimmon": {"no qk norm": {"qk_layernorm": False}},
    "opt": {"norm after": {"do_layer_norm_before": False}, "projected": {"word_embed_proj_dim": 32}},
    "mpt": {"clipped": {"attn_config": {"clip_qkv": 1.0}}},
    "granite": {
        "scaled": {
            "embedding_multiplier": 4.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.1,
        }
    },
    "nemotron": {"biases": {"attention_bias": True, "mlp_bias": True}},
    "bloom": {"residual after norm": {"apply_residual_connection_post_layernorm": True}},
    "granitemoehybrid": {
        "attention only": {
            "layer_types": ["full_attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
        }
    },
}
"""Further models of a family: option by option."""


@dataclass(frozen=True)
class Variant:
    """One tiny model of the sweep."""

    family: str
    """transformers' model type."""
    option: str
    """What differs from the family's first model; "" for that one."""
    settings: Mapping[str, Any]
    """Of its config."""

    @property
    def name(self) -> str:
        """Family and option."""
        return f"{self.family} ({self.option})" if self.option else self.family


def families() -> list[str]:
    """Every model type that transformers has a causal language model for, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def variants(family: str) -> Iterator[Variant]:
    """The models of a family."""
    first = OWN.get(family) or {**_known(family, {**BASE, **_EXPERTS}), **MORE.get(family, {})}
    yield Variant(family, "", first)
    for option, settings in OPTIONS.get(family, {}).items():
        yield Variant(family, option, {**first, **settings})


def _known(family: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the family's config has; others would be stored without meaning."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    names = {*kind.__dataclass_fields__, *kind.attribute_map}
    return {name: value for name, value in settings.items() if name in names}
