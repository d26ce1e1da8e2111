"""What the stages of one decoder layer share, and the contract of a stage."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lowmem.convert.math.gptq import Prepared
from lowmem.convert.math.hessian import Hessian
from lowmem.convert.recipe import Recipe
from lowmem.convert.stages.replay import Replay
from lowmem.convert.stages.sizes import LayerSizes
from lowmem.convert.stages.targets import Targets
from torch import nn

from lowmem.checkpoint.formats import LinearFormat
from lowmem.config import QuantConfig
from lowmem.models.architecture import LayerSpec, LinearSpec
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import LayerCall
from lowmem.streaming.prefetch import Prefetch
from lowmem.streaming.weights import ModelWeights


@dataclass(frozen=True)
class LinearReport:
    """The error that quantizing one linear causes in its outputs, over the calibration tokens."""

    name: str
    in_features: int
    out_features: int
    error: float
    """Squared error of the outputs relative to their energy, ||x(W-Q)||^2 / ||xW||^2; 0 without energy.
    With a correction W is the corrected weight. The energy is sampled (capture.ENERGY_SAMPLE)."""
    damping: float
    """What was added to the Hessian's diagonal, as a fraction of its mean."""
    dead_columns: int
    """Inputs that were zero for every calibration token."""

    def warnings(self, damp_percent: float) -> list[str]:
        """Return warnings about this linear for the user."""
        found = []
        if self.dead_columns:
            found.append(f"{self.dead_columns} inputs never used by the calibration text: rounded to nearest")
        if self.damping > damp_percent:
            found.append(f"Hessian not positive definite: damping raised to {self.damping:g}")
        return found


@dataclass
class Seconds:
    """Time spent, by activity."""

    forward: float = 0.0
    hessian: float = 0.0
    factor: float = 0.0
    quantize: float = 0.0
    tune: float = 0.0
    pack: float = 0.0
    read: float = 0.0
    write: float = 0.0

    def __iadd__(self, other: Seconds) -> Seconds:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the time spent in the context to the activity `name`."""
        started = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)


@dataclass(frozen=True)
class CalibrationBatch:
    """Calibration rows that run through a layer together."""

    call: LayerCall
    """How the model calls the layer with that many rows."""
    rows: int


@dataclass(frozen=True)
class LayerFiles:
    """Where the stages of one layer write."""

    folder: Path
    """For targets and replayed outputs, which live as long as the layer is converted."""
    staged: Path
    """The finished layer's tensors."""
    next_states: Path
    next_unquantized: Path


@dataclass
class Captured:
    """Measurements of one pass of the calibration rows at the inputs and outputs of linears."""

    hessians: dict[str, Hessian] = field(default_factory=dict)
    """By the first linear of each group."""
    lacking: dict[str, torch.Tensor] = field(default_factory=dict)
    """T E[x d^T] [in, out] of a linear, with x its input, T the number of tokens, and d what its output
    lacks; or T E[x (x' - x)^T] [in, in] of a group whose target is its input, by the first linear, with x'
    the input in the unquantized model."""
    energy: dict[str, torch.Tensor] = field(default_factory=dict)
    """float64 [], squared norm of a linear's output without its bias, summed over `sampled` tokens."""
    sampled: dict[str, int] = field(default_factory=dict)
    tokens: int = 0

    def mean_energy(self, name: str) -> float:
        """Mean squared norm of a linear's output."""
        return float(self.energy[name]) / self.sampled[name]


@dataclass
class LayerContext:
    """One decoder layer while it is converted. Stages read their inputs here and leave their results here."""

    layer: nn.Module
    """transformers' own layer. Its linears hold the dequantized weights once they are quantized."""
    spec: LayerSpec
    recipe: Recipe
    states: HiddenStates
    """At the layer's input, of the model as it is converted."""
    batch: CalibrationBatch
    files: LayerFiles
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    unquantized: HiddenStates | None = None
    """At the layer's input, of the unquantized model; None where nothing is compared with it."""
    step_batch: CalibrationBatch | None = None
    """The rows of one step of tuning; `batch` where it is None."""
    replay: Replay | None = None
    """The outputs of finished linears; None where every pass computes them again."""
    weights: ModelWeights | None = None
    """The source; None for a layer that is in memory already."""
    following: LayerSpec | None = None
    """The layer that is read next."""
    prefetch: Prefetch | None = None
    """Reads the layer that follows, where the card has room for it."""
    stored_dtype: Callable[[str], torch.dtype] = lambda _: torch.float16
    """The dtype in which a bias or norm is stored, by its name in the layer."""
    on_linear: Callable[[LinearReport], None] = lambda _: None

    targets: Targets | None = None
    """What the linears should output, recorded on the unquantized stream."""
    captured: Captured = field(default_factory=Captured)
    """Of the last pass of the calibration rows."""
    prepared: Prepared | None = None
    """The factored Hessian of the group that is being quantized."""
    shared_lack: torch.Tensor | None = None
    """R^-1 E[x (x' - x)^T] [in, in] times the correction, of a group whose target is its input."""
    starts: dict[str, torch.Tensor] = field(default_factory=dict)
    """Where training the integers of each linear begins (integers.start_of), kept for tuning."""
    output_rms: dict[str, float] = field(default_factory=dict)
    """Root mean square of each linear's output, kept for tuning."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """What is to be stored, by its name in the layer: packed linears, tuned biases and norms."""
    reports: list[LinearReport] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)

    @property
    def tuning_batch(self) -> CalibrationBatch:
        """The rows of one step of tuning."""
        return self.step_batch or self.batch

    def config(self, linear: LinearSpec) -> QuantConfig:
        """How a quantized linear of the layer is quantized."""
        config = self.recipe.of(f"{self.spec.name}.{linear.name}")
        assert config is not None
        return config

    def format(self, linear: LinearSpec) -> LinearFormat:
        """How a quantized linear of the layer is stored."""
        format = self.recipe.format_of(f"{self.spec.name}.{linear.name}")
        assert format is not None
        return format

    def linear(self, name: str) -> nn.Linear:
        """A linear of the layer."""
        found = self.layer.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found


class Stage(ABC):
    """One step of converting a decoder layer.

    The converter runs the stages of a layer in order (layer.layer_stages). The memory plan walks over the
    same stages: `peak` is the memory that `run` needs, and `leave` updates the memory held after it.
    """

    name: str
    """What the stage does, for progress and for the memory plan."""

    @abstractmethod
    def run(self, context: LayerContext) -> None:
        """Run the stage on the layer."""

    @abstractmethod
    def peak(self, sizes: LayerSizes) -> int:
        """The most bytes that the layer holds on the compute device while the stage runs."""

    def leave(self, sizes: LayerSizes) -> None:
        """Update `sizes` to the memory that the layer holds after this stage. The default changes nothing."""
        return


def run_stages(
    stages: Iterable[Stage], context: LayerContext, on_stage: Callable[[str], None] = lambda _: None
) -> None:
    """Run the stages of one layer in order; on_stage: called with the name of each before it runs.

    Raises SourceError for weights that are not finite, CalibrationError for activations that are not, and
    OutputError when the disk is full.
    """
    for stage in stages:
        on_stage(stage.name)
        stage.run(context)
