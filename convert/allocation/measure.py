"""Measure the sensitivities of a model's linears, one decoder layer at a time.

    rows → forward pass, hidden states of every layer to files → gradient at the head → for each layer, last
    to first: read it, run its rows forward and backward, find what each linear adds → sensitivities

The gradient is that of the log-probability of next tokens that are sampled from the model itself. In memory
are one decoder layer, or the head, and what the layer's linears saw; so the peak does not depend on the
number of layers. An interrupted measurement resumes after its last finished layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lowmem.convert.allocation.curvature import OUTPUTS, Recorder, rises
from torch import nn

from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.files.whole import require_room, write_json
from lowmem.errors import LowmemError, MemoryBudgetError
from lowmem.models.architecture import Architecture, LayerSpec, build_model, decoder_layers
from lowmem.plan.device import host_memory_used, return_freed_memory
from lowmem.plan.fit.sensitivities import (
    OPTIONS,
    VERSION,
    Sensitivities,
    keep,
    kept_file,
    make_folder,
    weights_digest,
)
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import LayerCall, catch_calls, embedded, replaced_forwards
from lowmem.streaming.pass_folder import digest_of, working
from lowmem.streaming.weights import ModelWeights, build_without_layers, empty, move_buffers
from lowmem.text.units import format_bytes

ROWS = 16
"""Calibration rows that are measured, at most: a quarter of those that the conversion uses."""
SEED = 0
"""Of the sampled tokens and outputs."""
LIBRARIES = 256 << 20
"""Buffers of torch and the allocator's slack while it differentiates."""
_FLOAT32, _BFLOAT16 = 4, 2

Progress = Callable[[str, int, int], None]
"""Called with the step, and the number of finished decoder layers, and of all."""


@dataclass(frozen=True)
class Measurement:
    """What is measured, on which rows, and where."""

    weights: ModelWeights
    config: Any
    """transformers' config of the model."""
    tokens: torch.Tensor
    """int64 [rows, row_length]"""
    dtype: torch.dtype
    """Of the forward and backward passes."""
    device: torch.device

    @property
    def arch(self) -> Architecture:
        """The model's architecture."""
        return self.weights.arch

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the hidden states between two layers."""
        return (*self.tokens.shape, self.arch.hidden)  # type: ignore[return-value]

    @cached_property
    def identity(self) -> dict[str, object]:
        """What the result depends on."""
        return {
            "version": VERSION,
            "source": weights_digest(self.weights.source.path),
            "tokens": digest_of(self.tokens),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "torch": torch.__version__,
        }

    def peak_memory(self) -> int:
        """The most bytes of memory that `measure` holds beside the process itself."""
        rows, length, hidden = self.shape
        tokens, item = rows * length, self.dtype.itemsize
        gradients = 2 * tokens * hidden * item
        outside = sum(math.prod(self.arch.shapes[name]) for name in self.arch.outside())
        vocabulary = self.arch.shapes[self.arch.embedding][0]
        head = outside * item + 6 * length * vocabulary * _FLOAT32
        layers = (self._layer_peak(layer) for layer in self.arch.layers)
        return LIBRARIES + gradients + max(head, *layers)

    def _layer_peak(self, layer: LayerSpec) -> int:
        """Of reading and running one layer: its weights, what one row keeps for the backward pass, and what
        the linears of all rows saw; then the matrices of one linear.
        """
        rows, length, hidden = self.shape
        shapes = [self.arch.shapes[f"{layer.name}.{name}"] for name in self.arch.inside(layer)]
        weights = sum(math.prod(shape) for shape in shapes) * self.dtype.itemsize
        largest = max(math.prod(shape) for shape in shapes)
        widest = max(max(one.in_features, one.out_features) for one in layer.linears)
        seen = sum(group[0].in_features for group in layer.groups)
        seen += sum(one.out_features for one in layer.linears)
        recorded = rows * length * seen * _BFLOAT16
        heads = hidden // 64
        row = length * (12 * hidden + 8 * widest) * _FLOAT32 + 3 * heads * length * length * _FLOAT32
        white = rows * length * widest * _BFLOAT16 + OUTPUTS * widest * 6 * _FLOAT32
        white += 3 * rows * length * 1024 * _FLOAT32
        read = self.weights.source.read_overhead(largest)
        return weights + recorded + max(row, white, read)


def check_memory(work: Measurement, limit: int) -> None:
    """Raise MemoryBudgetError before anything is read if the measurement needs more than `limit` bytes."""
    needed = host_memory_used() + work.peak_memory()
    if work.device.type == "cpu" and needed > limit:
        raise MemoryBudgetError(
            f"measuring the sensitivities needs {format_bytes(needed)}, and may use {format_bytes(limit)}",
            f"Use at least --memory {math.ceil(needed / (1 << 20))}MiB",
        )


def measure(work: Measurement, progress: Progress = lambda step, done, of: None) -> Sensitivities:
    """Measure every linear of the decoder layers, and keep the result in lowmem's cache.

    Raises OutputError when the disk is full or another process measures the same, CalibrationError for
    activations that are not finite, SourceError for a damaged source.
    """
    file = kept_file(str(work.identity["source"]), str(work.identity["tokens"]))
    folder = file.with_suffix(".partial")
    make_folder(file.parent)
    states_bytes = math.prod(work.shape) * work.dtype.itemsize
    if not (folder / "state.json").exists():
        needed = (len(work.arch.layers) + 3) * states_bytes
        require_room(file.parent, needed, "measuring the sensitivities", "set LOWMEM_CACHE to another disk")
    return_freed_memory()
    with working(folder):
        result = _Pass(work, folder, progress).run()
        keep(result)
    return result


class _Pass:
    """One measurement in its folder."""

    def __init__(self, work: Measurement, folder: Path, progress: Progress) -> None:
        self.work = work
        self.folder = folder
        self.progress = progress
        self.state: dict[str, Any] = {
            **work.identity,
            "forward": 0,
            "head": False,
            "rises": {},
            "seconds": 0.0,
        }
        self._load()

    def _load(self) -> None:
        """Take over the state of an interrupted measurement of the same; otherwise empty the folder."""
        try:
            found = read_json(self.folder / "state.json")
        except LowmemError:
            found = {}
        if all(found.get(key) == value for key, value in self.work.identity.items()):
            self.state.update(found)
            return
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def _commit(self, seconds: float) -> None:
        self.state["seconds"] += seconds
        write_json(self.folder / "state.json", self.state)

    def _states(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer}"

    def _gradients(self, layer: int) -> Path:
        """The gradients at the input of a layer."""
        return self.folder / f"gradient-{layer}"

    def _reopen(self, path: Path) -> HiddenStates:
        return HiddenStates.reopen(path, self.work.shape, self.work.dtype, keep=False)

    def run(self) -> Sensitivities:
        work, count = self.work, len(self.work.arch.layers)
        with torch.no_grad():
            model = build_without_layers(work.weights, work.config, work.dtype, work.device)
            calls = catch_calls(model, work.arch, work.tokens[:1].to(work.device))
            _, layers = decoder_layers(model, work.config)
            if not self._states(0).exists():
                chunks = embedded(model, work.tokens, 1, work.device)
                HiddenStates.create(self._states(0), work.shape, work.dtype, chunks, keep=False)
            empty(model)
            for index in range(self.state["forward"], count):
                self._forward(index, layers[index], calls[index])
        if not self.state["head"]:
            self._at_head()
        remaining = [i for i in range(count) if work.arch.layers[i].name not in self._finished]
        for index in reversed(remaining):
            self._backward(index, layers[index], calls[index])
        found = {
            name: tuple(values) for layer in self.state["rises"].values() for name, values in layer.items()
        }
        order = {name: found[name] for name in work.arch.linear_names()}
        rises = {name: tuple(math.inf if v is None else v for v in values) for name, values in order.items()}
        linears = {
            f"{layer.name}.{one.name}": (one.in_features, one.out_features)
            for layer in work.arch.layers
            for one in layer.linears
        }
        return Sensitivities(
            self.state["source"], self.state["tokens"], rises, linears, self.state["seconds"]
        )

    @property
    def _finished(self) -> dict[str, Any]:
        found: dict[str, Any] = self.state["rises"]
        return found

    def _forward(self, index: int, layer: nn.Module, call: LayerCall) -> None:
        work, spec, started = self.work, self.work.arch.layers[index], time.perf_counter()
        self.progress("forward", index, len(work.arch.layers))
        work.weights.fill_layer(layer, spec, work.dtype, work.device)
        self._reopen(self._states(index)).advance(
            self._states(index + 1),
            1,
            lambda chunk: call.run(layer, chunk.to(work.device)).cpu(),
            where=f"after {spec.name}",
        )
        empty(layer)
        self.state["forward"] = index + 1
        self._commit(time.perf_counter() - started)

    def _at_head(self) -> None:
        """The gradients of the log-probabilities of sampled tokens at the last layer's output."""
        work, started, count = self.work, time.perf_counter(), len(self.work.arch.layers)
        self.progress("head", 0, count)
        model: Any = build_model(work.config, work.dtype, buffers=True)
        work.weights.fill(model, "", work.arch.outside(), work.dtype, work.device)
        if work.arch.tied:
            model.tie_weights()
        move_buffers(model, work.device)
        _, layers = decoder_layers(model, work.config)
        generator = torch.Generator().manual_seed(SEED)
        returns_tuple = work.arch.layers[-1].returns_tuple

        def gradient(chunk: torch.Tensor) -> torch.Tensor:
            given = chunk.to(work.device).requires_grad_()
            output = (given,) if returns_tuple else given
            with ExitStack() as stack, torch.enable_grad():
                stack.enter_context(replaced_forwards((one, lambda *a, **k: output) for one in layers))
                logits = model(inputs_embeds=given.detach(), use_cache=False).logits[0].float()
                chances = torch.log_softmax(logits, -1)
                drawn = torch.multinomial(chances.detach().exp().cpu(), 1, generator=generator)
                chances.gather(-1, drawn.to(work.device)).sum().backward()
            assert given.grad is not None
            return given.grad.cpu()

        last = self._reopen(self._states(count))
        last.advance(self._gradients(count), 1, gradient, where="in the gradients at the head")
        work.weights.source.release()
        empty(model)
        self.state["head"] = True
        self._commit(time.perf_counter() - started)
        last.delete()

    def _backward(self, index: int, layer: nn.Module, call: LayerCall) -> None:
        work, spec, started = self.work, self.work.arch.layers[index], time.perf_counter()
        count = len(work.arch.layers)
        self.progress("backward", count - 1 - index, count)
        work.weights.fill_layer(layer, spec, work.dtype, work.device)
        states, gradients = self._reopen(self._states(index)), self._reopen(self._gradients(index + 1))
        row = 0

        def back(chunk: torch.Tensor) -> torch.Tensor:
            nonlocal row
            hidden = states.read(row, row + 1).to(work.device).requires_grad_()
            row += 1
            with torch.enable_grad():
                call.output(layer, hidden).backward(chunk.to(work.device))
            assert hidden.grad is not None
            return hidden.grad.cpu()

        with Recorder(layer, spec) as recorded:
            gradients.advance(self._gradients(index), 1, back, where=f"in the gradients of {spec.name}")
        generator = torch.Generator().manual_seed(SEED + index)
        found = rises(recorded, OPTIONS, generator)
        empty(layer)
        self._finished[spec.name] = {
            f"{spec.name}.{name}": [value if math.isfinite(value) else None for value in values]
            for name, values in found.items()
        }
        self._commit(time.perf_counter() - started)
        states.delete()
        gradients.delete()
