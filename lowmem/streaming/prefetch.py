"""Copy the next decoder layer to a card while the current one is computed there.

A thread reads the layer's tensors, and a second stream of the card copies them from pinned memory beside the
computation. Values and layouts are those that reading the layer gives, so nothing else changes. It takes room
on the card for a second layer. No card was at hand: the order of the calls is tested with a recorder in place
of the stream.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from lowmem.models.architecture import LayerSpec
from lowmem.streaming.weights import ModelWeights

PINNED_BYTES = 32 << 20
"""Of pinned memory: a tensor is copied in slices of this size."""


class Lane(Protocol):
    """What copies to the card beside its other work. Tests replace it with a recorder."""

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor of the host to the card, with its strides; returns when the host may free it."""

    def join(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let the caller's later work on the card begin after the copies of these tensors, which it uses."""


class StreamLane:
    """A second stream of a card, and one pinned buffer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self._stream: Any = self._module.Stream(device)
        self._pinned: torch.Tensor | None = None

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Lane.copy`."""
        with self._module.stream(self._stream):
            if not tensor.is_contiguous():
                return tensor.to(self.device)
            if self._pinned is None:
                self._pinned = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
            result = torch.empty_like(tensor, device=self.device)
            flat, into = tensor.view(-1), result.view(-1)
            buffer = self._pinned.view(tensor.dtype)
            for start in range(0, flat.numel(), buffer.numel()):
                part = flat[start : start + buffer.numel()]
                buffer[: part.numel()].copy_(part)
                into[start : start + part.numel()].copy_(buffer[: part.numel()], non_blocking=True)
                self._stream.synchronize()  # of this thread alone: the buffer is used again
        return result

    def join(self, tensors: Iterable[torch.Tensor]) -> None:
        """See `Lane.join`."""
        current = self._module.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)  # its memory is not reused before that work is done


class Prefetch:
    """Reads one layer ahead of its use.

    The thread uses the source, so nobody else may between `start` and `finish` or `take`. If it fails, the
    layer is not there, and whoever reads it as usual meets the error.
    """

    def __init__(self, weights: ModelWeights, dtype: torch.dtype, lane: Lane) -> None:
        self.weights, self.dtype, self.lane = weights, dtype, lane
        self._thread: threading.Thread | None = None
        self._layer = ""
        self._found: dict[str, torch.Tensor] | None = None
        self._stop = False

    def start(self, spec: LayerSpec) -> None:
        """Begin to read a layer. One that was not taken is dropped."""
        self.finish()
        self._layer, self._found, self._stop = spec.name, None, False
        self._thread = threading.Thread(target=self._read, args=(spec,), name="prefetch", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the layer has been read."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take(self, spec: LayerSpec) -> dict[str, torch.Tensor] | None:
        """The layer's tensors on the card by their names in it; None if they were not read."""
        self.finish()
        found, self._found = self._found, None
        if found is None or spec.name != self._layer:
            return None
        self.lane.join(found.values())
        return found

    def close(self) -> None:
        """Stop reading, and drop what was read."""
        self._stop = True
        self.finish()
        self._found = None

    def _read(self, spec: LayerSpec) -> None:
        found = {}
        try:
            for name in self.weights.arch.inside(spec):
                if self._stop:
                    return
                tensor = self.weights.read(f"{spec.name}.{name}")
                found[name] = self.lane.copy(tensor.to(self.dtype) if tensor.is_floating_point() else tensor)
                del tensor
        except Exception:  # a damaged file, or no memory on the card: met again when the layer is read
            return
        finally:
            self.weights.source.release()
        self._found = found
