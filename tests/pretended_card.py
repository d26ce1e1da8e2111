"""A card that is not there: tensors that say they are not on the CPU, and a count of what the host waits for.

`PretendedCard` runs the code of a card with real values, on the CPU: tensors on the device "meta" have their
values in a CPU tensor of their own. Each operation that would make the host wait for a card is recorded, and
a product of a tensor on the card and one on the host raises, as on a card. It follows what PyTorch documents
for CUDA: reads of values, copies to the host, copies from pageable memory, and results whose size depends on
values wait; kernels, fills with a number, and copies from pinned memory do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("meta")
HOST = torch.device("cpu")
READS = ("item", "_local_scalar_dense", "is_nonzero", "equal", "allclose")
SIZED_BY_VALUES = ("nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "bincount")
COPIES = ("to", "_to_copy", "copy_", "copy", "lift_fresh")


class OnCard(torch.Tensor):
    """A tensor on the pretended card."""

    values: torch.Tensor
    """The same tensor on the CPU; views share its memory."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnCard:
        with torch.inference_mode(False):  # a view may be older than the block that asks for it
            made: OnCard = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=CARD
            )
        made.values = values
        return made

    def tolist(self) -> Any:
        """torch copies a tensor to the host for this, but refuses subclasses."""
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a tensor on the card outside of its PretendedCard")

    __torch_function__ = torch._C._disabled_torch_function_impl


class PretendedCard(TorchDispatchMode):
    """In the block, tensors that are made on the device "meta" are `OnCard`."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """What the host has waited for: the operation, and the direction of a copy."""
        self.operations: list[str] = []
        """Every operation on the card."""
        self._pinned: set[int] = set()  # addresses
        self._made = _Made(self)

    def __enter__(self) -> PretendedCard:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._made.__exit__(*problem)

    def taken(self) -> list[str]:
        """The waits since the last call."""
        found, self.waits = self.waits, []
        return found

    def move(self, module: nn.Module) -> Any:
        """Put a module's parameters and buffers on the card, in place."""
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[name] = OnCard(parameter.detach())  # type: ignore[assignment]
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = OnCard(buffer.detach())
        return module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.overloadpacket.__name__, dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, torch.Tensor)]
        if "pin_memory" in name:
            self._pinned.add(args[0].data_ptr())
            return args[0]
        if name == "is_pinned":
            return args[0].data_ptr() in self._pinned
        wanted = _device(args, given)
        if wanted is None:
            on_card = any(isinstance(tensor, OnCard) for tensor in tensors)
            if name in ("copy_", "copy"):
                on_card = isinstance(args[0], OnCard)
        else:
            on_card = wanted.type == CARD.type
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        self._watch(name, tensors, on_card, (named | given).get("non_blocking") is True)
        result = func(*_on_host(args), **_on_host(given))
        if not on_card:
            return result
        self.operations.append(name)
        before = {id(tensor.values): tensor for tensor in tensors if isinstance(tensor, OnCard)}
        return tree_map(lambda leaf: _wrapped(leaf, before), result)

    def _watch(self, name: str, tensors: list[torch.Tensor], on_card: bool, non_blocking: bool) -> None:
        cards = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
        hosts = [tensor for tensor in tensors if not isinstance(tensor, OnCard)]
        if name in COPIES and on_card and hosts:
            if not (non_blocking and hosts[-1].data_ptr() in self._pinned):
                self.waits.append(f"{name} to the card")
        elif (name in COPIES and cards and not on_card) or (cards and name in READS):
            self.waits.append(f"{name} to the host")
        elif cards and name in SIZED_BY_VALUES:
            self.waits.append(name)
        elif cards and name.startswith(("index", "_index", "_unsafe_index")):
            places = tensors[1:]
            if any(place.dtype in (torch.bool, torch.uint8) for place in places if name != "index_fill"):
                self.waits.append(f"{name} with a mask")
            if any(place.dim() for place in hosts):
                self.waits.append(f"{name} with indices of the host")
        elif cards and any(tensor.dim() for tensor in hosts):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")


class _Made(TorchFunctionMode):
    """Tensors made of Python's numbers, which no dispatch mode sees: a copy from pageable memory."""

    def __init__(self, card: PretendedCard) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        made = func in (torch.tensor, torch.as_tensor) and given.get("device") is not None
        if not made or torch.device(given["device"]).type != CARD.type:
            return func(*args, **given)
        self.card.waits.append("tensor to the card")
        return OnCard(func(*args, **{**given, "device": HOST}))


def _device(args: Any, kwargs: Any) -> torch.device | None:
    """The device that an operation is asked for."""
    found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    return found[0] if found else None


def _on_host(given: Any) -> Any:
    def host(leaf: Any) -> Any:
        if isinstance(leaf, OnCard):
            return leaf.values
        return HOST if isinstance(leaf, torch.device) else leaf

    return tree_map(host, given)


def _wrapped(leaf: Any, before: dict[int, OnCard]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return before[id(leaf)] if id(leaf) in before else OnCard(leaf)


class RepeatedGraphs:
    """`decoders.graph.Graphs` on a pretended card: a replay runs the step again, into the same memory."""

    def __init__(self, card: PretendedCard) -> None:
        self.card = card

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        before = len(self.card.waits)
        output = run()
        if len(self.card.waits) > before:  # as a capture on a card does
            raise RuntimeError(f"operation not permitted when stream is capturing: {self.card.waits}")

        def replay() -> None:
            output.copy_(run())

        return output, replay
