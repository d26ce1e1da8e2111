"""config.json, read and checked before a library builds a model from it.

transformers creates a module for every layer that a config counts, and tables of the lengths that it gives:
one large number can use up the machine's memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.headers.santacoder import as_gpt_bigcode, is_first_layout
from lowmem.errors import SourceError

MAX_COUNT = 4096
"""Layers and similar; Llama 3.1 with 405 billion parameters has 126 layers."""
MAX_EXPERTS = 2**16
"""Doge has 16384 experts, which are rows of an embedding there."""
MAX_SIZE = 2**40
"""A width, a vocabulary, a context."""
_MAX_DEPTH = 4
# Counts of modules, as different families name them.
_COUNTS = re.compile(r"(?:^|_)(?:layers?|experts|labels|blocks|tp)$")
# Sizes that are at least 1 in every language model.
_SIZES = frozenset(
    (
        *("num_hidden_layers", "n_layer", "num_layers", "hidden_size", "n_embd", "d_model"),
        *("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "n_inner", "vocab_size", "max_position_embeddings", "n_positions"),
    )
)


def read_config(file: Path) -> dict[str, Any]:
    """The object in a config.json, with its sizes checked; raises SourceError for a size that no model has.

    Other values, and keys that are not known here, are left to transformers' own checks. SantaCoder's first
    layout is returned as the gpt_bigcode config that it amounts to; ArchitectureError where there is none.
    """
    config = read_json(file)
    _check(config, file, top=True, depth=0)
    return as_gpt_bigcode(config) if is_first_layout(config) else config


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that describe the text model: its own, where they are nested, over those around them.

    The head is the wrapper's, and so is the key that ties it.
    """
    text, tied = config.get("text_config"), config.get("tie_word_embeddings")
    if not isinstance(text, dict):
        return dict(config)
    return {**config, **text, **({} if tied is None else {"tie_word_embeddings": tied})}


def _check(config: Mapping[str, Any], file: Path, *, top: bool, depth: int) -> None:
    for key, value in config.items():
        if isinstance(value, dict) and depth < _MAX_DEPTH:
            _check(value, file, top=key == "text_config", depth=depth + 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        most = _most(key)
        least = 1 if top and key in _SIZES else -MAX_SIZE
        if (key in _SIZES or most < MAX_SIZE) and not least <= value <= most:
            raise SourceError(
                f"{file}: {key[:100]} is {str(value)[:40]}, which no model has",
                "The file is damaged or malicious: download it again",
            )


def _most(key: str) -> int:
    """The largest value of a key that a model can have."""
    if not _COUNTS.search(key):
        return MAX_SIZE
    return MAX_EXPERTS if key.endswith("experts") else MAX_COUNT
