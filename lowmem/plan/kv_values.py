"""How many numbers a model keeps for a token in its KV cache, from config.json and without torch."""

from __future__ import annotations

from collections.abc import Mapping


def kv_values(config: Mapping[str, object], layers: int, kv_heads: int, head_dim: int) -> int:
    """The numbers that all layers together keep for one token.

    config: the keys of config.json, of the text model. kv_heads, head_dim: of a usual layer. Covers latent
    attention (DeepSeek), values of another width than keys, layers with heads of their own (Gemma 4, MiMo),
    and layers that reuse the keys and values of an earlier one (Gemma 3n and 4).
    """
    latent, rotated = _size(config, "kv_lora_rank"), _size(config, "qk_rope_head_dim")
    if latent and rotated:
        return layers * (latent + rotated)
    value_dim = _size(config, "v_head_dim")
    total = 0
    for layer in range(max(1, layers - (_size(config, "num_kv_shared_layers") or 0))):
        own = _own_settings(config, layer)
        heads = _size(own, "num_key_value_heads") or kv_heads
        size = _size(own, "head_dim") or head_dim
        total += heads * (size + (value_dim or size))
    return total


def _own_settings(config: Mapping[str, object], layer: int) -> Mapping[str, object]:
    """What one layer's config says in place of the model's."""
    listed = config.get("per_layer_config")
    if isinstance(listed, Mapping):
        own = listed.get(str(layer))
        return own if isinstance(own, Mapping) else {}
    kinds = config.get("layer_types")
    kind = kinds[layer] if isinstance(kinds, list) and layer < len(kinds) else None
    if kind == "sliding_attention" and config.get("model_type") == "mimo_v2_flash":
        return {"num_key_value_heads": 2 * (_size(config, "num_key_value_heads") or 1)}
    if kind != "full_attention":
        return {}
    found = {"head_dim": config.get("global_head_dim")}
    if config.get("attention_k_eq_v", True):
        found["num_key_value_heads"] = config.get("num_global_key_value_heads")
    return found


def _size(config: Mapping[str, object], name: str) -> int | None:
    value = config.get(name)
    return value if type(value) is int and value > 0 else None
