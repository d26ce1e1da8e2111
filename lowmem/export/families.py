"""The model families that llama.cpp computes as transformers does, and their settings in its keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.errors import SourceError

if TYPE_CHECKING:
    import torch

_GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""llama.cpp has one GELU, the tanh approximation from a float16 table; all of these are within 1e-3 of it."""


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls a family, and how it computes it."""

    architecture: str
    """llama.cpp's name, the prefix of its keys."""
    activations: tuple[str, ...]
    """transformers' names of what it computes."""
    digits: str = "smollm"
    """The name it gives GPT-2's split after single digits; the two differ in how they clean up spaces."""
    rotates_pairs: bool = False
    """It rotates neighbouring pairs of a head where transformers rotates its two halves."""
    rope_factors: bool = False
    """It reads a factor for each rotary frequency (Llama 3)."""


FAMILIES = {
    "gpt_bigcode": Family("starcoder", _GELUS, digits="starcoder"),
    "llama": Family("llama", ("silu",), rotates_pairs=True, rope_factors=True),
    "mistral": Family("llama", ("silu",), rotates_pairs=True, rope_factors=True),
    "qwen2": Family("qwen2", ("silu",)),
    "qwen3": Family("qwen3", ("silu",)),
    "starcoder2": Family("starcoder2", _GELUS, digits="starcoder"),
}
"""By transformers' model_type."""


def family_of(config: Any, display: str) -> Family:
    """The family of a model. Raises SourceError for one that llama.cpp computes otherwise, or not at all.

    display: the model as the user named it.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise SourceError(
            f"{display} is of type {config.model_type!r}, which cannot be exported",
            f"Models of the types {', '.join(FAMILIES)} can",
        )
    if reason := _difference(config, family):
        raise SourceError(
            f"llama.cpp would compute {display} differently: {reason}", "Run it with lowmem instead"
        )
    return family


def _difference(config: Any, family: Family) -> str:
    """Why llama.cpp's results would not be the model's; "" if they are."""
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if activation not in family.activations:
        return f"its activation is {activation!r}, not {family.activations[0]!r}"
    if config.model_type == "gpt_bigcode" and not config.scale_attn_weights:
        return "its attention is not scaled (scale_attn_weights)"
    if config.model_type == "starcoder2" and not config.use_bias:
        return "its linears have no biases (use_bias)"
    if config.hidden_size % config.num_attention_heads and not getattr(config, "head_dim", None):
        return f"its {config.hidden_size} features are not a multiple of its heads"
    kind = _rope(config).get("rope_type", "default")
    known = ("default", "linear", "yarn", *(["llama3"] if family.rope_factors else []))
    if kind not in known:
        return f"its rotary embedding is of type {kind!r}, not {', '.join(known)}"
    if _rope(config).get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates a part of each head only (partial_rotary_factor)"
    if kind == "yarn" and (more := sorted(_rope(config).keys() - _YARN)):
        return f"its rotary embedding has the setting {more[0]!r}"
    return ""


_YARN = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}


def _rope(config: Any) -> dict[str, Any]:
    """The settings of the rotary embedding; empty for a model that learns its positions."""
    return dict(getattr(config, "rope_parameters", None) or {})


def head_width(config: Any) -> int:
    """Features of an attention head."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def window_of(config: Any) -> int | None:
    """The tokens that an attention with a sliding window sees, if those are fewer than the positions.

    llama.cpp has no window for these families, so a context within the window is computed right.
    """
    window = getattr(config, "sliding_window", None)
    return window if window and window < config.max_position_embeddings else None


def add_dimensions(writer: Any, config: Any) -> None:
    """Write the keys of the model's dimensions with gguf's writer."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(window_of(config) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt_bigcode":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_head_count_kv(1 if config.multi_query else config.num_attention_heads)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.model_type == "starcoder2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, config)


def _add_rope(writer: Any, config: Any) -> None:
    import gguf

    rope, width = _rope(config), head_width(config)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )


def rope_factors(config: Any) -> torch.Tensor | None:
    """float32 [head width / 2], by which llama.cpp divides each rotary frequency; None where it divides none.

    Llama 3 stretches its low frequencies; the factors come from transformers' own frequencies.
    """
    if _rope(config).get("rope_type") != "llama3":
        return None
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = head_width(config)
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    factors: torch.Tensor = 1.0 / _rope(config)["rope_theta"] ** exponents / scaled
    return factors


def row_order(name: str, rows: int, config: Any) -> torch.Tensor | None:
    """The model's rows of a tensor in llama.cpp's order, int64 [rows]; None where both orders are the same.

    name: the model's, of a weight or bias with `rows` outputs.
    """
    if config.model_type == "gpt_bigcode":
        # With several KV heads the model stores q, k, v of each head; llama.cpp expects all q, all k, all v.
        # With one KV head both orders are the same.
        if ".c_attn." in name and not config.multi_query:
            return _swapped(rows, config.num_attention_heads, 3)
        return None
    if not FAMILIES[config.model_type].rotates_pairs:
        return None
    if ".q_proj." in name:
        return _swapped(rows, config.num_attention_heads, 2, inside=True)
    if ".k_proj." in name:
        return _swapped(rows, config.num_key_value_heads, 2, inside=True)
    return None


def _swapped(count: int, heads: int, parts: int, *, inside: bool = False) -> torch.Tensor:
    """The numbers of rows [heads, parts, n] as [parts, heads, n]; inside: as [heads, n, parts]."""
    import torch

    rows = torch.arange(count).view(heads, parts, -1)
    return (rows.transpose(1, 2) if inside else rows.transpose(0, 1)).reshape(-1)


def notes_on(config: Any) -> Iterator[str]:
    """Lines for the user on what the file cannot hold."""
    if window := window_of(config):
        yield (
            f"the context is limited to {window} tokens, the sliding window of its attention: llama.cpp has "
            "none for these models"
        )
