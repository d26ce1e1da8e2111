"""Models that lowmem cannot decode: layers with other state than keys and values, and encoders.

The KV cache holds keys and values. State-space layers, short convolutions and linear attention keep a state
that cannot be cut back to a shorter prefix, so neither a cached prompt nor a draft would work. Needs no
torch: plan, convert and run refuse such a model in the same words, from its config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lowmem.checkpoint.headers.folder import read_config_json
from lowmem.errors import ArchitectureError, SourceError

STATEFUL = frozenset(
    (
        *("bailing_hybrid", "bamba", "deepseek_v4", "falcon_h1", "falcon_mamba", "glm5_next"),
        *("granitemoehybrid", "jamba", "kimi_linear", "mamba", "mamba2", "minicpm_ocr", "minicpmv4_6"),
        *("minicpmv4_7", "nemotron3_5_transcribe", "nemotron_h", "nemotron_h_omni", "olmo_hybrid"),
        *("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp"),
        *("qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya"),
    )
)
"""Model types whose transformers class says `_is_stateful` (compared in tests/models/test_layer_state.py)."""

_INDEXED = frozenset(
    (
        *("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"),
        *("inkling_text", "inkling2_text"),
    )
)
"""Further model types whose layers always keep an index or a convolution beside keys and values."""

KEYS_AND_VALUES = frozenset(
    ("attention", "full_attention", "sliding_attention", "chunked_attention", "window_attention", "dense")
)
"""The entries of a config's `layer_types` that keep keys and values alone."""

_HINT = "lowmem runs and converts models whose layers are all attention, such as llama and gpt_bigcode"


def check_layer_state(config: Mapping[str, object]) -> None:
    """Raise ArchitectureError for a model that lowmem's KV cache cannot hold.

    config: the keys of config.json, of the text model where it is nested.
    """
    kind = str(config.get("model_type", "the model"))[:100]
    if config.get("is_encoder_decoder") is True:
        raise ArchitectureError(
            f"{kind!r} is a model of an encoder and a decoder", "lowmem runs and converts decoder-only models"
        )
    types = config.get("layer_types")
    found = [name for name in types if isinstance(name, str)] if isinstance(types, (list, tuple)) else []
    others = sorted({name[:40] for name in found if name not in KEYS_AND_VALUES})
    if others:
        raise other_state(kind, others)
    if kind in STATEFUL | _INDEXED:
        raise other_state(kind)


def other_state(kind: str, layers: Sequence[str] = ()) -> ArchitectureError:
    """The refusal of a model type whose layers, of the kinds `layers`, keep more than keys and values."""
    named = f" ({', '.join(layers)})" if layers else ""
    return ArchitectureError(f"layers of {kind!r} keep other state than keys and values{named}", _HINT)


def check_checkpoint(path: Path) -> None:
    """`check_layer_state` for a checkpoint on this machine; does nothing without a readable config.json."""
    try:
        config = read_config_json(path)
    except SourceError:
        return
    text = config.get("text_config")
    check_layer_state({**config, **text} if isinstance(text, dict) else config)
