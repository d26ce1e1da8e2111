"""The longest sequence that a model has positions for, from its config and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


def longest_sequence(config: Mapping[str, object]) -> int | None:
    """The number of positions; None for a model without a limit.

    config: the keys of config.json, of the text model. Dynamic NTK scaling stretches the positions as the
    sequence grows; its factor says how far the model is meant to go.
    """
    counts = (config.get(name) for name in _NAMES)
    positions = next((count for count in counts if type(count) is int and count > 0), None)
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if positions is None or not isinstance(rope, Mapping):
        return positions
    # Models with several kinds of layers have settings for each.
    by_kind = [part for part in rope.values() if isinstance(part, Mapping)]
    return int(positions * max([_dynamic_factor(part) for part in [rope, *by_kind]]))


def context_length(model: Any) -> int:
    """The number of positions that prompt and answer share; 2^31 - 1 for a model without a limit."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "rope_parameters")
    return longest_sequence({name: getattr(config, name, None) for name in names}) or 2**31 - 1


def _dynamic_factor(rope: Mapping[str, object]) -> float:
    factor = rope.get("factor")
    if rope.get("rope_type", rope.get("type")) == "dynamic" and isinstance(factor, (int, float)):
        return factor if 1 < factor < 2**20 else 1
    return 1
