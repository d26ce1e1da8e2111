"""A model that is never whole in memory: its last hidden states, one decoder layer at a time.

    token rows → embedding → for each decoder layer: read it, run all rows through it, drop it → last norm

A 16-bit source, the same with bitsandbytes' linears made while it is read, and any GPTQ folder (its linears
dequantized as they are read) go the same way. What is held is one decoder layer, its activations for a few
rows, and, before the first, the embedding; the hidden states between two layers lie in a file. So the peak
does not depend on the number of layers, and an interrupted pass goes on after its last finished layer.

transformers' own code does all the computing: the layers are called as the model calls them
(lowmem/streaming/layer_calls.py), and the logits come from the model's own forward with its base model held back.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import nn

from lowmem import __version__
from lowmem.checkpoint.files.lock import take
from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.files.whole import as_output_error, is_disk_full, write_json
from lowmem.checkpoint.source.open import Source
from lowmem.config import QUANTIZED_SLICE_BYTES
from lowmem.errors import CalibrationError, LowmemError, OutputError, SourceError
from lowmem.kernels import bitsandbytes as bnb
from lowmem.models.architecture import build_model, decoder_layers, inspect
from lowmem.plan.device import return_freed_memory
from lowmem.streaming.dense_source import GptqSource
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import LayerCall, catch_calls, embed, replaced_forwards
from lowmem.streaming.weights import ModelWeights, empty, move_buffers

OnTheFly = Literal["int8", "nf4"]
Progress = Callable[[int, int], None]
ACTIVATION_BYTES = 192 << 20
"""Rows run through a layer together while its widest activations stay below this."""
WASTE = ".done"
"""Of the name of a folder that is being removed."""


class StreamedModel:
    """A checkpoint of which one decoder layer is in memory at a time.

    source: as `lowmem.streaming.dense_source.open_any` gives it. dtype: of all computing, as in a model loaded in that dtype.
    on_the_fly: quantize the layers' linears with bitsandbytes as they are read, and run its kernels. device:
    where layers run. Raises SourceError or ArchitectureError before any weight is read.
    """

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype,
        *,
        on_the_fly: OnTheFly | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.on_the_fly = on_the_fly
        self.device = device or torch.device("cpu")
        self.config = source.config()
        self.arch = inspect(self.config)
        self.weights = ModelWeights(source, self.arch)
        if on_the_fly and isinstance(source, GptqSource):
            raise SourceError(f"{source.path} is quantized already", "Give the unquantized original")

    @property
    def vocabulary(self) -> int:
        """How many tokens have a logit."""
        return self.arch.shapes[self.arch.embedding][0]

    @property
    def hidden(self) -> int:
        """Features of a hidden state."""
        return self.arch.shapes[self.arch.embedding][1]

    @cached_property
    def key(self) -> dict[str, object]:
        """All that the hidden states depend on, beside the tokens and the libraries' own rounding."""
        return {
            "lowmem": __version__,
            "source": self.source.fingerprint(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "on_the_fly": self.on_the_fly or "",
        }

    def last_hidden(self, rows: torch.Tensor, folder: Path, progress: Progress | None = None) -> HiddenStates:
        """Run token rows [rows, length] up to the head: its input [rows, length, hidden].

        folder: holds the result, and what an interrupted pass needs to go on; the caller removes it when the
        result has been used. What another pass has left in it is thrown away. progress: decoder layers done,
        and in all. Raises OutputError when the disk is full, or another process works in `folder`;
        SourceError for a source that is damaged.
        """
        with _held(folder):
            return self._pass(rows, folder, progress)

    @contextlib.contextmanager
    def passed(
        self, rows: torch.Tensor, folder: Path, progress: Progress | None = None
    ) -> Iterator[HiddenStates]:
        """As `last_hidden`; `folder` is held until the result has been used, and then removed, but for an
        exception: what was computed stays."""
        with working(folder):
            yield self._pass(rows, folder, progress)

    def _pass(self, rows: torch.Tensor, folder: Path, progress: Progress | None) -> HiddenStates:
        return_freed_memory()  # else the heap keeps what earlier layers took
        with torch.no_grad():
            states, done = self._resumed(folder, rows)
            calls, model = self._calls(rows)
            if states is None:
                states = self._embedded(model, rows, folder)
            empty(model)
            _, layers = decoder_layers(model, self.config)
            count, step = len(self.arch.layers), self._rows_at_a_time(rows.shape[1])
            for index in range(done, count):
                if progress:
                    progress(index, count)
                states = self._advance(layers[index], index, calls[index], states, folder, step)
            if progress:
                progress(count, count)
            finish = self._finisher(model)
            result = self._checked(
                lambda: states.advance(folder / "last", step, finish, "after the last norm")
            )
            empty(model)
        return result

    @contextlib.contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """What turns the head's inputs [tokens, hidden] into logits [tokens, vocabulary], in `dtype`.

        The model's own forward does it, so that what some families do to their logits is done. The head's
        weight is in memory until the context is left.
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
        """The head's bias, where it has one."""
        prefix = self.arch.head.rpartition(".")[0] + "."
        return [n for n in self.arch.outside() if n.startswith(prefix) and n != self.arch.head]

    def _calls(self, rows: torch.Tensor) -> tuple[list[LayerCall], nn.Module]:
        """How each layer is called, and the model with all that lies before its layers."""
        model = build_model(self.config, self.dtype, buffers=True)
        self.weights.fill(model, "", self.arch.outside_before_layers(), self.dtype, self.device)
        self.source.release()
        move_buffers(model, self.device)
        # Of one row: what it is called with (positions, a causal mask) then serves any number of rows.
        return catch_calls(model, self.arch, rows[:1].to(self.device)), model

    def _embedded(self, model: nn.Module, rows: torch.Tensor, folder: Path) -> HiddenStates:
        shape = (rows.shape[0], rows.shape[1], self.hidden)

        def chunks() -> Iterator[torch.Tensor]:
            for part in rows.split(self._rows_at_a_time(rows.shape[1])):
                yield embed(model, part.to(self.device)).cpu()

        made = self._checked(
            lambda: HiddenStates.create(folder / "hidden-0", shape, self.dtype, chunks(), keep=False)
        )
        self._commit(folder, rows, 0)
        return made

    def _advance(
        self, layer: nn.Module, index: int, call: LayerCall, states: HiddenStates, folder: Path, step: int
    ) -> HiddenStates:
        """Read a layer, run all rows through it, drop it; it counts once state.json says so."""
        spec = self.arch.layers[index]
        swapped = self._fill(layer, index)
        try:
            following = self._checked(
                lambda: states.advance(
                    folder / f"hidden-{index + 1}",
                    step,
                    lambda chunk: call.run(layer, chunk.to(self.device)).cpu(),
                    f"after {spec.name}",
                )
            )
        finally:
            for name, linear in swapped.items():
                _set_child(layer, name, linear)
            empty(layer)
        state = read_json(folder / "state.json")
        write_json(folder / "state.json", {**state, "finished": index + 1})
        states.delete()
        return following

    def _fill(self, layer: nn.Module, index: int) -> dict[str, nn.Module]:
        """Give a layer its weights; the plain linears on meta that bitsandbytes' have replaced."""
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
        """(first row, rows) of a linear's weight, in multiples of 64 rows so that NF4's blocks stay whole."""
        weight = self.weights.read(name)
        step = len(weight)
        if not whole:
            step = max(64, QUANTIZED_SLICE_BYTES // (weight.shape[1] * weight.itemsize) // 64 * 64)
        for first in range(0, len(weight), step):
            yield first, weight[first : first + step]

    def _finisher(self, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """What follows the layers: hidden states → the base model's output."""
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
                # What comes before the layers is computed for nothing, from numbers instead of the embedding.
                output = base(inputs_embeds=given, use_cache=False)
            result: torch.Tensor = output.last_hidden_state.cpu()
            return result

        return finish

    def _rows_at_a_time(self, length: int) -> int:
        widest = max(max(one.in_features, one.out_features) for s in self.arch.layers for one in s.linears)
        return max(1, ACTIVATION_BYTES // (3 * length * widest * self.dtype.itemsize))

    def _state(self, rows: torch.Tensor) -> dict[str, object]:
        return {**self.key, "tokens": digest_of(rows), "shape": [*rows.shape, self.hidden]}

    def _commit(self, folder: Path, rows: torch.Tensor, finished: int) -> None:
        write_json(folder / "state.json", {**self._state(rows), "finished": finished})

    def _resumed(self, folder: Path, rows: torch.Tensor) -> tuple[HiddenStates | None, int]:
        """The hidden states that an interrupted pass over the same rows left, and its finished layers."""
        try:
            state = read_json(folder / "state.json")
            finished = state.pop("finished", None)
            if (
                state == self._state(rows)
                and type(finished) is int
                and 0 <= finished <= len(self.arch.layers)
            ):
                shape = (rows.shape[0], rows.shape[1], self.hidden)
                path = folder / f"hidden-{finished}"
                states = HiddenStates.reopen(path, shape, self.dtype, keep=False)
                for left in folder.glob("hidden-*"):  # a later one that state.json does not speak of
                    if left != path:
                        left.unlink()
                return states, finished
        except LowmemError:
            pass  # nothing there, or nothing of use
        for left in folder.glob("hidden-*"):
            left.unlink()
        return None, 0

    def _checked(self, work: Callable[[], HiddenStates]) -> HiddenStates:
        try:
            return work()
        except CalibrationError as error:  # of converting, where the same happens to calibration rows
            raise SourceError(
                f"{self.source.display}: {error.message}",
                "The weights may be damaged, or overflow: measure with --dtype float32",
            ) from error


@contextlib.contextmanager
def head_of(model: Any, device: torch.device) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Hidden states [tokens, hidden] → logits [tokens, vocabulary] by a model's own forward.

    Its base model, in whose place the given hidden states come, is held back meanwhile.
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
    """Every layer returns `hidden` instead of running."""
    given = (hidden,) if returns_tuple else hidden
    return replaced_forwards((layer, lambda *args, **kwargs: given) for layer in layers)


@contextlib.contextmanager
def working(folder: Path) -> Iterator[None]:
    """Hold the folder of a pass against a second process, and remove it, unless something is raised.

    First it gets another name, so that half of it is never taken for a pass (see `remove_waste`).
    """
    with _held(folder):
        yield
        waste = folder.with_name(folder.name + WASTE)
        shutil.rmtree(waste, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rename(waste)
        shutil.rmtree(waste, ignore_errors=True)


def remove_waste(folder: Path) -> None:
    """Remove what a killed process has left of folders that it was removing in `folder`."""
    for waste in folder.glob(f"*{WASTE}"):
        shutil.rmtree(waste, ignore_errors=True)


def _held(folder: Path) -> IO[bytes]:
    """The folder of a pass, made and held until this is closed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return take(folder / "lock", f"another process is measuring the same in {folder}")
    except OSError as error:
        if is_disk_full(error):
            raise as_output_error(error, folder) from error
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}", "Set LOWMEM_CACHE to a folder that can"
        ) from error


def _set_child(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child)


def digest_of(rows: torch.Tensor) -> str:
    """sha256 of token rows: their shape, and the ids as 64-bit little-endian integers."""
    digest = hashlib.sha256(f"{tuple(rows.shape)}\0".encode())
    digest.update(rows.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
