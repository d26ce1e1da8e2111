"""How a model calls its decoder layers: recorded by running the model with its layers replaced.

The model's own code makes positions, rotary embeddings and masks, for any family. All rows have the same
length and no padding, so the arguments recorded for some rows serve all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowmem.models.architecture import Architecture, decoder_layers


@dataclass(frozen=True)
class LayerCall:
    """The arguments, except the hidden states, with which the model calls one of its decoder layers."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    returns_tuple: bool = False

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output hidden states, without gradients."""
        with torch.no_grad():
            return self.output(layer, hidden)

    def output(self, layer: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """Call a module that takes the layer's arguments, and return its output."""
        output = layer(hidden, *self.args, **self.kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _Caught(Exception):
    """The last layer of interest was called: the rest of the model need not run."""


@contextlib.contextmanager
def replaced_forwards(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace each module's forward by a function; its hooks and attributes stay."""
    found = list(pairs)
    for module, forward in found:
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, _ in found:
            del module.forward


def _held_back(
    layers: nn.ModuleList, catch: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
) -> contextlib.AbstractContextManager[None]:
    """Let each layer call `catch` with its index instead of running."""

    def caught(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: catch(index, args, kwargs)

    return replaced_forwards((layer, caught(index)) for index, layer in enumerate(layers))


def catch_calls(model: nn.Module, arch: Architecture, tokens: torch.Tensor) -> list[LayerCall]:
    """One LayerCall per decoder layer, for passes of as many rows as `tokens` [rows, row_length] has."""
    calls: list[LayerCall] = []

    def catch(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, rest = _split(args, kwargs)
        returns_tuple = arch.layers[index].returns_tuple
        calls.append(LayerCall(rest[0], rest[1], returns_tuple))
        if index == len(arch.layers) - 1:
            raise _Caught
        return (hidden,) if returns_tuple else hidden

    _run(model, tokens, catch)
    return calls


def embed(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The hidden states [rows, row_length, hidden] that enter the first decoder layer."""
    found: list[torch.Tensor] = []

    def catch(_index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found.append(_split(args, kwargs)[0])
        raise _Caught

    _run(model, tokens, catch)
    return found[0]


def embedded(
    model: nn.Module, tokens: torch.Tensor, rows: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """`embed` of all token rows, `rows` at a time: computed on `device`, returned on the CPU."""
    for part in tokens.split(rows):
        yield embed(model, part.to(device)).cpu()


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The hidden states, and the layer's other arguments."""
    if args:
        return args[0], (args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def _run(model: nn.Module, tokens: torch.Tensor, catch: Callable[..., Any]) -> None:
    _, layers = decoder_layers(model, model.config)  # type: ignore[arg-type]
    with _held_back(layers, catch), torch.no_grad(), contextlib.suppress(_Caught):
        model(input_ids=tokens, use_cache=False)
