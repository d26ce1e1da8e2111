"""Models that lowmem cannot decode: layers with other state than keys and values, and encoders.

The KV cache holds keys and values. State-space layers, short convolutions and linear attention keep a state
that cannot be cut back to a shorter prefix, so neither a cached prompt nor a draft would work. Needs no
torch: plan, convert and run refuse such a model in the same words, from its config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lowmem.checkpoint.headers.config import text_settings
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

_LATER_LISTED = frozenset(("lfm2", "lfm2_moe", "lfm3", "minimax"))
"""Further model types of which older configs do not list the layers, most of which keep a state."""

_GGUF = frozenset(
    (
        *("arwkv7", "falcon-h1", "granitehybrid", "kimi-linear", "lfm2moe", "nemotron_h_moe", "plamo2"),
        *("qwen35", "qwen35moe", "qwen3next", "rwkv6", "rwkv6qwen2", "rwkv7"),
    )
)
"""Stateful model types under the names that GGUF files give them."""

ENCODERS = frozenset(
    (
        *("albert", "bert", "bert-generation", "big_bird", "camembert", "convbert", "data2vec-text"),
        *("deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert", "flaubert", "ibert"),
        *("jina-bert-v2", "layoutlm", "longformer", "luke", "megatron-bert", "mobilebert", "modern-bert"),
        *("modernbert", "mpnet", "neobert", "nomic-bert", "nomic_bert", "nystromformer", "rembert"),
        *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "xlm", "xlm-roberta"),
        *("xlm-roberta-xl", "xmod"),
    )
)
"""Model types whose tokens attend to the tokens after them, unless the config says `is_decoder`."""

_ENCODED = frozenset(
    (
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5", "m2m_100"),
        *("marian", "mbart", "moshi", "mt5", "musicgen", "musicgen_melody", "mvp", "nllb-moe", "pegasus"),
        *("pegasus_x", "plbart", "prophetnet", "switch_transformers", "t5", "t5gemma", "trocr", "umt5"),
        *("whisper",),
    )
)
"""Model types that need an encoder's output, or the decoder of one."""

_OTHERS = {
    "blt": "reads bytes in patches of changing length",
    "cpmant": "takes prompts in a format of its own",
    "git": "reads an image before the text",
    "hrm_text": "runs its layers several times for each token",
    "longcat_flash": "has two attentions in each layer",
    "openai-gpt": "keeps no keys and values, so each token would compute the whole text again",
    "reformer": "keeps buckets of hidden states instead of keys and values",
    "xlnet": "does not read text from left to right",
}
"""What else prevents a model type from being run, as the rest of a sentence."""

_LISTS = ("layer_types", "layers_block_type", "block_types")
"""Keys under which configs list the kinds of their layers."""

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
    reason = _OTHERS.get(kind)
    if config.get("is_encoder_decoder") is True or kind in _ENCODED:
        reason = "is a model of an encoder and a decoder"
    elif kind in ENCODERS and config.get("is_decoder") is not True:
        reason = "is an encoder, whose tokens attend to the tokens after them"
    if reason:
        raise ArchitectureError(f"{kind!r} {reason}", "Use a decoder-only model such as llama or gpt_bigcode")
    types = next((t for t in map(config.get, _LISTS) if isinstance(t, (list, tuple)) and t), None)
    if types is None:
        if kind in STATEFUL | _INDEXED | _LATER_LISTED | _GGUF:
            raise other_state(kind)
        return
    others = sorted({name[:40] for name in types if isinstance(name, str) and name not in KEYS_AND_VALUES})
    if others:
        raise other_state(kind, others)
    if kind in _INDEXED:
        raise other_state(kind)


def has_second_inputs(config: Mapping[str, object]) -> bool:
    """Whether each layer takes a second input for each token, as in Gemma 3n and 4; such a model only runs.

    config: as for `check_layer_state`.
    """
    return bool(config.get("hidden_size_per_layer_input"))


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
    check_layer_state(text_settings(config))
