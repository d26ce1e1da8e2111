"""config.json, read and held to what any model can be before a library builds one of it.

transformers makes a module for every layer that a config names, and tables as long as it says: a number is
all that it takes to keep a machine busy until its memory is gone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.checkpoint.files.reading import read_json
from lowmem.errors import SourceError

MAX_COUNT = 4096
"""Of layers, experts and the like; Llama 3.1's 405 billion parameters are in 126 layers."""
MAX_SIZE = 2**40
"""Of a width, a vocabulary, a context."""
_MAX_DEPTH = 4
# What becomes a module each, under whatever name a family has for it.
_COUNTS = re.compile(r"(?:^|_)(?:layers?|experts|labels|blocks|tp)$")
# What no language model has none of.
_SIZES = frozenset(
    (
        *("num_hidden_layers", "n_layer", "num_layers", "hidden_size", "n_embd", "d_model"),
        *("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "n_inner", "vocab_size", "max_position_embeddings", "n_positions"),
    )
)


def read_config(file: Path) -> dict[str, Any]:
    """Read a config.json and check its sizes. Raises SourceError for sizes that no model has.

    Other keys and other types are left to transformers, which checks the type of every key.
    """
    config = read_json(file)
    _check(config, file, top=True, depth=0)
    return config


def _check(config: Mapping[str, Any], file: Path, *, top: bool, depth: int) -> None:
    for key, value in config.items():
        if isinstance(value, dict) and depth < _MAX_DEPTH:
            _check(value, file, top=key == "text_config", depth=depth + 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        most = MAX_COUNT if _COUNTS.search(key) else MAX_SIZE
        least = 1 if top and key in _SIZES else -MAX_SIZE
        if (key in _SIZES or most == MAX_COUNT) and not least <= value <= most:
            raise SourceError(
                f"{file}: {key[:100]} is {str(value)[:40]}, and no model has that",
                "The file is damaged, or made to do harm: download it again",
            )
