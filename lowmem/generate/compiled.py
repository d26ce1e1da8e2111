"""One token's decode with fixed shapes, captured once and replayed as a CUDA graph.

A step of a model of 40 layers launches some 700 kernels, one by one; a graph launches them as one. It is
captured from the eager step itself, so it needs no compiler, works with any kernel that asks the host for
nothing, and keeps what transformers does in eager mode alone: its compiled attention expands a multi-query
cache to all heads, 200 MB a layer for StarChat Alpha at 8192 tokens. torch.compile's backends can be asked
for instead.

Fixed shapes cost attention over rows that are not filled yet. So there is a step for each window of the
cache, 512 tokens and then twice as many, made when the context first reaches it. Each is checked against the
eager step before it is used; whatever refuses, raises or differs leaves the cache as it was and the engine
eager.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from lowmem.checkpoint.files.reading import one_line
from lowmem.generate.cache import KVCache

CUDA_GRAPH = "cudagraph"
FIRST_WINDOW = 512
# Relative, in the 2-norm of the logits. A mask, or another kernel for it, rounds sums in another order.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.03}
_WARM_UPS = 2  # the first calls load kernels and make workspaces, which a capture cannot
_DUMMY_TOKENS = 8

Step = Callable[[torch.Tensor], torch.Tensor]


class CompileRefused(Exception):
    """The fixed-shape step cannot be had, or gives other logits; `reason` says why. Decode eagerly."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Graphs(Protocol):
    """What captures a step; a test puts a recorder for the CPU in its place."""

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """(the tensor that every replay fills, the replay)."""


class CudaGraphs:
    """torch's CUDA graphs, all in one memory pool: the only code here that a CPU cannot run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Nothing runs while it is captured; an operation that waits for the host raises."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self._pool):
            output = run()
        self._pool = graph.pool()
        return output, graph.replay


class CompiledDecode:
    """Decodes one token at a time with the shapes of a window of `cache`.

    model: a transformers causal LM in eval mode. cache: the one that the engine fills; it keeps its contents.
    backend: "cudagraph", or a backend of torch.compile with its `mode`. Raises CompileRefused.
    """

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        *,
        backend: str = CUDA_GRAPH,
        mode: str | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.model, self.cache, self.backend, self.mode = model, cache, backend, mode
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self._steps: dict[int, tuple[_Window, Step]] = {}
        device = model.get_input_embeddings().weight.device
        if graphs is None and backend == CUDA_GRAPH:
            if device.type != "cuda":
                raise CompileRefused(f"a CUDA graph needs a CUDA card, the model is on {device}")
            graphs = CudaGraphs(device)
        self._graphs = graphs
        self._ids = torch.zeros((1, 1), dtype=torch.long, device=device)
        length = cache.length
        if length == cache.capacity:
            raise CompileRefused("the KV cache is full")
        try:
            with torch.inference_mode():
                self._try_out(device)
        except CompileRefused:
            raise
        except Exception as error:  # a backend fails in its own way, and memory may be short
            raise CompileRefused(one_line(error)) from error
        finally:
            cache.cut(min(length, cache.length))

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [1, 1] → logits [1, vocab] after them; the cache is one token longer.

        Raises CompileRefused with the cache as it was, and ValueError when it is full: the engine counts.
        """
        if tuple(ids.shape) != (1, 1):
            raise ValueError(f"a decode step takes ids of [1, 1], not {list(ids.shape)}")
        if self.cache.length >= self.cache.capacity:
            raise ValueError(f"the KV cache of {self.cache.capacity} tokens is full")
        with torch.inference_mode():
            window, run = self._step_for(ids)
            try:
                with window.open():
                    logits = run(ids)
            except Exception as error:
                raise CompileRefused(one_line(error)) from error
        self.cache.advance(1)
        return logits

    def _try_out(self, device: torch.device) -> None:
        """Two steps behind some tokens, so that there is something to attend to and a position that moves."""
        room = self.cache.capacity - self.cache.length
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        tokens = torch.arange(1, _DUMMY_TOKENS + 3, device=device)[None] % vocabulary
        if self.cache.length == 0 and room > 2:
            self._eager(tokens[:, : min(_DUMMY_TOKENS, room - 2)])
        for number in range(min(2, self.cache.capacity - self.cache.length)):
            ids = tokens[:, -1 - number, None]
            window, run = self._step_for(ids)
            self._check(window, run, ids)
            self._eager(ids)

    def _step_for(self, ids: torch.Tensor) -> tuple[_Window, Step]:
        """The step for the cache's length, made and checked with `ids` when it is the first of its window."""
        size = FIRST_WINDOW
        while size < self.cache.length + 1:
            size *= 2
        size = min(size, self.cache.capacity)
        if size not in self._steps:
            if not self.cache.kv_layers[0].is_initialized:
                self._eager(ids)
                self.cache.cut(0)
            try:
                window = _Window(self.cache, size)
                step = self._graph(window) if self._graphs is not None else self._compiled()
            except Exception as error:
                raise CompileRefused(one_line(error)) from error
            self._check(window, step, ids)
            self._steps[size] = (window, step)
        window, step = self._steps[size]
        if not window.is_current():
            raise CompileRefused("the KV cache has new buffers")
        return window, step

    def _graph(self, window: _Window) -> Step:
        graphs = self._graphs
        assert graphs is not None

        def run() -> torch.Tensor:
            return self._forward(self._ids)

        for _ in range(_WARM_UPS):
            with window.open():
                run()
        with window.open():
            output, replay = graphs.capture(run)

        def step(ids: torch.Tensor) -> torch.Tensor:
            self._ids.copy_(ids)
            replay()
            return output.clone()  # the next replay writes over it

        return step

    def _compiled(self) -> Step:
        compiled: Step = torch.compile(
            self._forward, backend=self.backend, mode=self.mode, fullgraph=True, dynamic=False
        )
        return lambda ids: compiled(ids).clone()

    def _check(self, window: _Window, run: Step, ids: torch.Tensor) -> None:
        """Compare with the eager step in the same state, and leave the cache so. Raises CompileRefused."""
        length = self.cache.length
        try:
            expected = self._eager(ids)
            self.cache.cut(length)
            with window.open():
                got = run(ids)
        except Exception as error:
            raise CompileRefused(one_line(error)) from error
        finally:
            self.cache.cut(min(length, self.cache.length))
        problem = difference(got, expected)
        if problem:
            raise CompileRefused(problem)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **self._last_only)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _eager(self, ids: torch.Tensor) -> torch.Tensor:
        self.cache.set_fixed(False)
        return self._forward(ids)


class _Window:
    """The first `size` tokens of a cache's buffers, in place of the whole while it is open."""

    def __init__(self, cache: KVCache, size: int) -> None:
        self._cache, self._size = cache, size
        self._whole = [(layer.keys, layer.values) for layer in cache.kv_layers]
        # Made once: a captured step holds these very tensors.
        self._views = [(keys[:, :, :size], values[:, :, :size]) for keys, values in self._whole]

    def is_current(self) -> bool:
        """The cache still has the buffers that this is a window of."""
        layers = self._cache.kv_layers
        return all(layer.keys is keys for layer, (keys, _) in zip(layers, self._whole, strict=True))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within, the cache has fixed shapes of this size and its position on the device is its length."""
        layers, capacity = self._cache.kv_layers, self._cache.capacity
        try:
            for layer, (keys, values) in zip(layers, self._views, strict=True):
                layer.keys, layer.values, layer.capacity = keys, values, self._size
            self._cache.set_fixed(True)
            yield
        finally:
            for layer, (keys, values) in zip(layers, self._whole, strict=True):
                layer.keys, layer.values, layer.capacity = keys, values, capacity
            self._cache.set_fixed(False)


def difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    """What tells the logits [1, vocab] of two ways of decoding apart, or nothing.

    The same token must be the likeliest, or one that the other way calls as likely within the tolerance.
    """
    if got.shape != expected.shape or got.dtype is not expected.dtype:
        return f"logits {list(got.shape)} of {got.dtype}, eager {list(expected.shape)} of {expected.dtype}"
    tolerance = TOLERANCES[expected.dtype]
    got, expected = got.float(), expected.float()
    error = float((got - expected).norm() / expected.norm())
    if not error <= tolerance:  # not a number is no small number
        return f"its logits differ from the eager ones by {error:.2g} of their norm"
    short = float(expected.max() - expected[0, got.argmax()])
    if short > tolerance * float(expected.abs().max()):
        return "its likeliest token is not the eager one"
    return ""


def default_decode(model: Any, cache: KVCache) -> tuple[Step | None, str]:
    """(what decodes instead of the model's own step, or None; one line on why).

    On a card a CUDA graph, if it agrees with the eager step. On a CPU none: a launch costs nothing there, and
    a fixed window makes attention read rows that are not filled.
    """
    device = model.get_input_embeddings().weight.device
    if device.type != "cuda":
        return None, "eager: fixed shapes only save what launching kernels costs, and a CPU launches none"
    try:
        return CompiledDecode(model, cache).step, "CUDA graphs, their logits checked against eager decode"
    except CompileRefused as refused:
        return None, f"eager: {refused.reason}"
