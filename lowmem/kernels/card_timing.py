"""How long a product takes on a card."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

_REPEATS = 10


@torch.no_grad()
def product_seconds(module: nn.Module, x: torch.Tensor) -> float:
    """The seconds that a product takes on a card, with the weight in memory and not in its cache.

    The products run in a CUDA graph, as in decode, so that launching them does not count. Raises whatever the
    module raises.
    """
    with torch.cuda.device(x.device):
        return _product_seconds(module, x)


def _product_seconds(module: nn.Module, x: torch.Tensor) -> float:
    module(x)  # compiles
    torch.cuda.synchronize(x.device)
    size = torch.cuda.get_device_properties(x.device).L2_cache_size
    try:
        cold = torch.empty(2 * size, dtype=torch.uint8, device=x.device)
    except torch.OutOfMemoryError:
        cold = torch.empty(0, dtype=torch.uint8, device=x.device)

    def product() -> None:
        cold.zero_()
        module(x)

    return _graph_seconds(product) - _graph_seconds(cold.zero_)


def _graph_seconds(run: Callable[[], object]) -> float:
    """The shortest time of a run in a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_REPEATS):
            run()
    times = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / _REPEATS)
    return float(min(times))
