"""Rotary embeddings whose frequencies depend on the length of the sequence: longrope and dynamic NTK.

transformers' rotary modules read that length from the largest position of each forward. `generate` runs a
prompt in one forward, so all its tokens are rotated for the whole prompt, and each later token for the
sequence that ends with it. Here a prompt runs in chunks, starts behind cached rows, and a step may carry a
draft. `PositionScaling` therefore tells the rotary modules the length, and names the scale that a row was
computed at, so that only rows of the right scale are reused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowmem.generate.cache.contract import UNSCALED

_DYNAMIC, _LONGROPE = "dynamic", "longrope"
_LENGTH = "lowmem_sequence_length"


class PositionScaling:
    """The length-dependent rotary embeddings of `model`, a transformers causal LM.

    Replaces the forward of the modules that have them; other models are left alone. Outside of `rotated_for`
    the modules do what they did before.
    """

    def __init__(self, model: Any) -> None:
        self._modules: list[nn.Module] = []
        self._switches: set[int] = set()  # lengths up to which longrope uses its short factors
        self._grows_from: int | None = None  # the length from which dynamic NTK scales every token anew
        for module in model.modules():
            found = list(_length_dependent(module))
            for kind, original in found:
                if kind == _LONGROPE:
                    self._switches.add(original)
                else:
                    self._grows_from = min(original, self._grows_from or original)
            if found:
                self._modules.append(module)
                if not hasattr(module, _LENGTH):  # not by an earlier PositionScaling
                    setattr(module, _LENGTH, None)
                    module.forward = _for_length(module, any(kind == _DYNAMIC for kind, _ in found))
        self.recomputes = bool(self._switches) and _drops_cache(model)
        """The model computes the whole sequence anew when an answer crosses longrope's switch."""

    def __bool__(self) -> bool:
        return bool(self._switches) or self._grows_from is not None

    def scale(self, length: int) -> int:
        """Equal for two lengths at which the model rotates all positions alike."""
        if self._grows_from is not None and length > self._grows_from:
            return len(self._switches) + length
        return UNSCALED + sum(length > switch for switch in self._switches)

    @contextmanager
    def rotated_for(self, length: int) -> Iterator[None]:
        """Rotate the positions of the block's forwards as in a sequence of `length` tokens.

        No forward of the block may have a later position.
        """
        for module in self._modules:
            setattr(module, _LENGTH, length)
        try:
            yield
        finally:
            for module in self._modules:
                setattr(module, _LENGTH, None)


def _for_length(module: nn.Module, dynamic: bool) -> Callable[..., Any]:
    """A forward for `module` that takes the sequence's length from its attribute _LENGTH."""
    forward = module.forward

    def for_length(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        length = getattr(module, _LENGTH)
        if length is None:
            return forward(x, position_ids, *args, **kwargs)
        if dynamic:
            _reset(module)
        # One more position, the last of the sequence: the module takes the length from it.
        last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
        result = forward(x, torch.cat([position_ids, last], dim=-1), *args, **kwargs)
        if isinstance(result, tuple):
            return tuple(part[..., :-1, :] for part in result)
        return result[..., :-1, :]

    return for_length


def rows_at_scale(scales: Sequence[int], scale: int) -> int:
    """The number of leading rows that have this scale."""
    return next((row for row, found in enumerate(scales) if found != scale), len(scales))


def _length_dependent(module: nn.Module) -> Iterator[tuple[str, int]]:
    """(kind, length up to which nothing is scaled) of each length-dependent embedding of a rotary module."""
    kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None)
    if config is None or not isinstance(parameters, dict):
        return
    by_type = kinds if isinstance(kinds, dict) else {None: kinds}
    for layer_type, kind in by_type.items():
        if not isinstance(kind, str):
            continue
        if kind == _LONGROPE:
            own = parameters if layer_type is None else parameters[layer_type]
            yield _LONGROPE, int(own["original_max_position_embeddings"])
        elif _DYNAMIC in kind:  # as transformers' dynamic_rope_update asks
            yield _DYNAMIC, int(module.original_max_seq_len)  # type: ignore[arg-type]


def _reset(module: nn.Module) -> None:
    """Forget the longest sequence that a dynamic NTK module has seen.

    It keeps its frequencies until a longer or a short sequence comes: they depend on earlier requests.
    """
    buffers = dict(module.named_buffers(recurse=False))
    for name, original in list(buffers.items()):
        if name.endswith("original_inv_freq"):
            current = name.removesuffix("original_inv_freq") + "inv_freq"
            module.register_buffer(current, original.clone(), persistent=False)
    for name in list(vars(module)):
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, module.original_max_seq_len)


def _drops_cache(model: Any) -> bool:
    """Whether the model's generate drops its cache where longrope switches (phi3 and its relatives)."""
    prepare = getattr(type(model), "prepare_inputs_for_generation", None)
    names: tuple[str, ...] = getattr(getattr(prepare, "__code__", None), "co_names", ())
    consts = getattr(getattr(prepare, "__code__", None), "co_consts", ())
    return "original_max_position_embeddings" in (*names, *(c for c in consts if isinstance(c, str)))
