"""Mixtures of experts: they run in 16 bits, and are not converted yet. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lowmem.errors import ArchitectureError

_EXPERTS = re.compile(r"\.(experts|block_sparse_moe|moe)\.|_exps\.")


def is_expert(name: str) -> bool:
    """Whether a tensor is a part of a mixture of experts, by its stored or its model's name."""
    return _EXPERTS.search(name) is not None


def refuse_experts(display: str, names: Iterable[str]) -> None:
    """Raise ArchitectureError if a tensor of `names` is an expert's: convert has no recipe for these."""
    expert = next((name for name in names if is_expert(name)), None)
    if expert is not None:
        raise ArchitectureError(
            f"{display} is a mixture of experts (it holds {expert!r}), and experts are not quantized yet",
            f"Run it in 16 bits if it fits: lowmem plan {display}",
        )
