"""A CUDA graph's twin on the CPU: it records a step's operations and replays them on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = ("_local_scalar_dense", "item", "is_nonzero", "equal", "lift_fresh", "nonzero")


class Recorder(TorchDispatchMode):
    """Records each operation with the very tensors that it was given, as a CUDA graph does.

    Raises for what a capture cannot hold: a value that the host reads, a constant from the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Repeat every operation on the same tensors, into the same memory; no Python of the model runs."""
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordedGraphs:
    """`decoders.graph.Graphs` on the CPU."""

    def __init__(self) -> None:
        self.captured = 0

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        self.captured += 1
        with Recorder() as recorder:
            output = run()
        return output, recorder.replay
