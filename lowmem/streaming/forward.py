"""A forward pass that holds one decoder layer at a time, up to the last hidden states and their logits.

    token rows → embedding → for each decoder layer: read it, run all rows through it, drop it → last norm

The source may be unquantized, a GPTQ folder (its linears are dequantized as they are read), or quantized by
bitsandbytes as it is read. In memory are one decoder layer, its activations for a few rows and, before the
first layer, the embedding; the hidden states between two layers are in a file. So the peak does not depend on
the number of layers, and an interrupted pass resumes after its last finished layer.

transformers' own code does all the computing: layers are called as the model calls them (layer_calls.py), and
logits come from the model's own forward with its base model replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lowmem import __version__
from lowmem.checkpoint.source.fitted import fitted
from lowmem.checkpoint.source.open import Source
from lowmem.config import QUANTIZED_SLICE_BYTES
from lowmem.errors import CalibrationError, SourceError
from lowmem.kernels import bitsandbytes as bnb
from lowmem.models.architecture import build_model, decoder_layers, inspect
from lowmem.plan.device import return_freed_memory
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import LayerCall, catch_calls, embedded, replaced_forwards
from lowmem.streaming.pass_folder import PassFolder, locked, working
from lowmem.streaming.weights import ModelWeights, build_without_layers, empty, move_buffers

OnTheFly = Literal["int8", "nf4"]
Progress = Callable[[int, int], None]
"""Called with the number of finished decoder layers, and of all."""
ACTIVATION_BYTES = 192 << 20
"""Most bytes of a layer's widest activations; it bounds the rows that run together."""


class StreamedModel:
    """A checkpoint of which one decoder layer is in memory at a time.

    dtype: of all computing, as in a model loaded in that dtype. on_the_fly: quantize the layers' linears with
    bitsandbytes as they are read, and run its kernels. device: where layers run.
    Raises SourceError or ArchitectureError before any weight is read.
    """

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype,
        *,
        on_the_fly: OnTheFly | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.source = source = fitted(source, build_model(source.config(), torch.float32, buffers=False))
        self.dtype = dtype
        self.on_the_fly = on_the_fly
        self.device = device or torch.device("cpu")
        self.config = source.config()
        self.arch = inspect(self.config)
        self.weights = ModelWeights(source, self.arch)
        if on_the_fly and source.format:
            raise SourceError(f"{source.path} is already quantized", "Use the unquantized original")

    @property
    def vocabulary(self) -> int:
        """Number of tokens that have a logit."""
        return self.arch.shapes[self.arch.embedding][0]

    @property
    def hidden(self) -> int:
        """Features of a hidden state."""
        return self.arch.hidden

    @cached_property
    def key(self) -> dict[str, object]:
        """Everything that the hidden states depend on, except the tokens and the libraries' own rounding."""
        return {
            "lowmem": __version__,
            "source": self.source.fingerprint(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "on_the_fly": self.on_the_fly or "",
        }

    def last_hidden(self, rows: torch.Tensor, folder: Path, progress: Progress | None = None) -> HiddenStates:
        """Run token rows [rows, length]; the result is the head's input [rows, length, hidden].

        folder: holds the result, and what an interrupted pass needs to resume. What a different pass left in
        it is removed; the caller removes the folder when the result has been used.
        Raises OutputError when the disk is full or another process works in `folder`, SourceError for a
        damaged source.
        """
        with locked(folder):
            return self._pass(rows, folder, progress)

    @contextlib.contextmanager
    def passed(
        self, rows: torch.Tensor, folder: Path, progress: Progress | None = None
    ) -> Iterator[HiddenStates]:
        """`last_hidden` as a context, after which `folder` is removed unless an exception was raised."""
        with working(folder):
            yield self._pass(rows, folder, progress)

    def _pass(self, rows: torch.Tensor, folder: Path, progress: Progress | None) -> HiddenStates:
        return_freed_memory()  # else the heap keeps the memory of earlier layers
        with torch.no_grad():
            work = PassFolder(folder, self.key, rows, self.hidden)
            count, step = len(self.arch.layers), self._rows_at_a_time(rows.shape[1])
            states, done = work.resume(count, self.dtype)
            model = build_without_layers(self.weights, self.config, self.dtype, self.device)
            # Positions and a causal mask made for one row serve any number of rows.
            calls = catch_calls(model, self.arch, rows[:1].to(self.device))
            if states is None:
                states = self._embed(model, rows, work, step)
            empty(model)
            _, layers = decoder_layers(model, self.config)
            for index in range(done, count):
                if progress:
                    progress(index, count)
                states = self._advance(index, layers[index], calls[index], states, work)
            if progress:
                progress(count, count)
            finish = self._finisher(model)
            result = self._checked(lambda: states.advance(work.result, step, finish, "after the last norm"))
            empty(model)
        return result

    @contextlib.contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """A function from the head's inputs [tokens, hidden] to logits [tokens, vocabulary], in `dtype`.

        It runs the model's own forward, since some families scale or cap their logits. The head's weight is
        in memory until the context ends.
        """
        model = build_model(self.config, self.dtype, buffers=True)
        name = self.arch.embedding if self.arch.tied else self.arch.head
        head = model.get_submodule(self.arch.head.rpartition(".")[0])
        tensor = self.weights.read(name).to(device=self.device, dtype=self.dtype)
        head._parameters["weight"] = nn.Parameter(tensor, requires_grad=False)
        for key in self._beside_head():
            self.weights.fill(model, "", [key], self.dtype, self.device)
        self.source.release()
        with head_of(model, self.device) as logits:
            yield logits

    def _beside_head(self) -> list[str]:
        """The head's bias, if it has one."""
        prefix = self.arch.head.rpartition(".")[0] + "."
        return [n for n in self.arch.outside() if n.startswith(prefix) and n != self.arch.head]

    def _embed(self, model: nn.Module, rows: torch.Tensor, work: PassFolder, step: int) -> HiddenStates:
        chunks = embedded(model, rows, step, self.device)
        states = self._checked(
            lambda: HiddenStates.create(work.states(0), work.shape, self.dtype, chunks, keep=False)
        )
        work.commit(0)
        return states

    def _advance(
        self, index: int, layer: nn.Module, call: LayerCall, states: HiddenStates, work: PassFolder
    ) -> HiddenStates:
        """Read a layer, run all rows through it, and drop it. It counts once state.json says so."""
        swapped = self._fill(layer, index)
        try:
            following = self._checked(
                lambda: states.advance(
                    work.states(index + 1),
                    self._rows_at_a_time(states.shape[1]),
                    lambda chunk: call.run(layer, chunk.to(self.device)).cpu(),
                    f"after {self.arch.layers[index].name}",
                )
            )
        finally:
            for name, linear in swapped.items():
                _set_child(layer, name, linear)
            empty(layer)
        work.commit(index + 1)
        states.delete()
        return following

    def _fill(self, layer: nn.Module, index: int) -> dict[str, nn.Module]:
        """Read a layer's weights; the result is the plain linears, on meta, that bitsandbytes' replace."""
        spec = self.arch.layers[index]
        if self.on_the_fly is None:
            self.weights.fill_layer(layer, spec, self.dtype, self.device)
            return {}
        swapped: dict[str, nn.Module] = {}
        for linear in spec.linears:
            plain = layer.get_submodule(linear.name)
            assert isinstance(plain, nn.Linear)
            made = bnb.empty_linear(self.on_the_fly, plain).eval()
            slices = self._row_slices(
                f"{spec.name}.{linear.name}.weight", whole=not bnb.rows_may_be_sliced(made)
            )
            bnb.quantize_into(made, slices, self.device, self.dtype)
            _set_child(layer, linear.name, made)
            swapped[linear.name] = plain
        weights = {f"{linear.name}.weight" for linear in spec.linears}
        rest = [name for name in self.arch.inside(spec) if name not in weights]
        self.weights.fill(layer, f"{spec.name}.", rest, self.dtype, self.device)
        move_buffers(layer, self.device)
        self.source.release()
        return swapped

    def _row_slices(self, name: str, whole: bool) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of a linear's weight, in multiples of 64 rows to keep NF4 blocks whole."""
        weight = self.weights.read(name)
        step = len(weight)
        if not whole:
            step = max(64, QUANTIZED_SLICE_BYTES // (weight.shape[1] * weight.itemsize) // 64 * 64)
        for first in range(0, len(weight), step):
            yield first, weight[first : first + step]

    def _finisher(self, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from the last layer's output to the base model's output."""
        before = {self.arch.embedding, self.arch.head, *self._beside_head()}
        names = [name for name in self.arch.outside() if name not in before]
        self.weights.fill(model, "", names, self.dtype, self.device)
        self.source.release()
        move_buffers(model, self.device)
        base: Any = model.base_model
        _, layers = decoder_layers(model, self.config)

        def finish(chunk: torch.Tensor) -> torch.Tensor:
            given = chunk.to(self.device)
            with _replaced(layers, given, self.arch.layers[-1].returns_tuple):
                # Whatever precedes the layers is computed in vain, on these states instead of embeddings.
                output = base(inputs_embeds=given, use_cache=False)
            result: torch.Tensor = output.last_hidden_state.cpu()
            return result

        return finish

    def _rows_at_a_time(self, length: int) -> int:
        widest = max(max(one.in_features, one.out_features) for s in self.arch.layers for one in s.linears)
        return max(1, ACTIVATION_BYTES // (3 * length * widest * self.dtype.itemsize))

    def _checked(self, work: Callable[[], HiddenStates]) -> HiddenStates:
        try:
            return work()
        except CalibrationError as error:  # worded for the converter
            raise SourceError(
                f"{self.source.display}: {error.message}",
                "The weights may be damaged, or overflow: measure with --dtype float32",
            ) from error


@contextlib.contextmanager
def head_of(model: Any, device: torch.device) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A function from hidden states [tokens, hidden] to logits [tokens, vocabulary].

    It runs the model's own forward. In the context the base model returns the given hidden states.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    base = model.base_model
    given: list[torch.Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=given[-1])

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        given[:] = [hidden.to(device)[None]]
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=device)
        with torch.no_grad():
            result: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
        return result

    base.forward = forward
    try:
        yield logits
    finally:
        del base.forward


def _replaced(
    layers: nn.ModuleList, hidden: torch.Tensor, returns_tuple: bool
) -> contextlib.AbstractContextManager[None]:
    """Let every layer return `hidden` instead of running."""
    given = (hidden,) if returns_tuple else hidden
    return replaced_forwards((layer, lambda *args, **kwargs: given) for layer in layers)


def _set_child(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child)
