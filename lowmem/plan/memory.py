"""Bytes that a model needs to run: pure integers, from headers and the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowmem.checkpoint.safetensors_file import read_header
from lowmem.errors import SourceError


def weights_bytes(folder: Path) -> int:
    """Bytes of all tensors of a safetensors checkpoint, read off its headers.

    Raises SourceError when there is none, or a header lies.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SourceError(f"{folder} holds no safetensors file", "Give the folder of a converted checkpoint")
    return sum(t.end - t.begin for file in files for t in read_header(file).tensors.values())


def kv_cache_bytes(config: Any, context: int, itemsize: int = 2) -> int:
    """Bytes of keys and values of `context` tokens, for a model whose layers all attend to all of them."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if getattr(text, "multi_query", None) is not None:  # gpt_bigcode says it in its own word
        kv_heads = 1 if text.multi_query else heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * text.num_hidden_layers * kv_heads * head_size * itemsize * context)
