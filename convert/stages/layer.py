"""One decoder layer: capture the inputs of its linears, quantize them, pack them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lowmem.convert.math.gptq import Prepared, Quantized, prepare, quantize
from lowmem.convert.math.products import add_product
from lowmem.convert.stages.capture import Capture
from lowmem.convert.stages.replay import Replay
from lowmem.convert.stages.targets import Targets
from lowmem.convert.stages.tuning import Tuned, tune_layer
from torch import nn

from lowmem.checkpoint.packing import pack_rows, pack_zeros
from lowmem.checkpoint.values import all_finite
from lowmem.config import QuantConfig
from lowmem.errors import SourceError
from lowmem.kernels.reference import dequantize
from lowmem.models.architecture import LayerSpec, LinearSpec
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import LayerCall


@dataclass(frozen=True)
class LinearReport:
    """What quantizing one linear did to its outputs over the calibration tokens."""

    name: str
    in_features: int
    out_features: int
    error: float
    """Squared error of the outputs as a share of their energy: ||x(W-Q)||^2 / ||xW||^2; 0 without energy.
    With a correction W is the corrected weight, which is what Q was to come close to. The energy is that of
    one token in capture.ENERGY_SAMPLE."""
    damping: float
    """What was added to the Hessian's diagonal, as a fraction of its mean."""
    dead_columns: int
    """Inputs that were zero for every calibration token."""

    def warnings(self, asked_damping: float) -> list[str]:
        """What a person should know of this linear."""
        found = []
        if self.dead_columns:
            found.append(f"{self.dead_columns} inputs never used by the calibration text: rounded to nearest")
        if self.damping > asked_damping:
            found.append(f"Hessian not positive definite: damping raised to {self.damping:g}")
        return found


@dataclass
class Seconds:
    """Where the time went."""

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


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer: the tensors to store, named relative to the layer, and one report a linear.

    tensors: what is packed, and biases and norms where they were tuned.
    """

    tensors: dict[str, torch.Tensor]
    reports: tuple[LinearReport, ...]
    seconds: Seconds


def quantize_layer(
    layer: nn.Module,
    spec: LayerSpec,
    call: LayerCall,
    states: HiddenStates,
    config: QuantConfig,
    *,
    rows: int,
    device: torch.device,
    targets: Targets | None = None,
    replay: Replay | None = None,
    tune_rows: int | None = None,
    tune_call: LayerCall | None = None,
    stored_dtype: Callable[[str], torch.dtype] = lambda _: torch.float16,
    on_phase: Callable[[str], None] = lambda _: None,
    on_linear: Callable[[LinearReport], None] = lambda _: None,
) -> LayerResult:
    """Quantize every linear of `layer` (on `device`), whose weights become the dequantized ones.

    rows: calibration rows that run at a time. With true_sequential the linears are taken in the order
    in which they run, each seeing the outputs of the already quantized ones; otherwise all inputs come
    from the unquantized layer, in one pass. targets: what the linears should put out; each then makes up for
    config.correction of what it lacks, its file is removed, and the layer is tuned to put out what it should.
    replay: where finished linears' outputs are kept; their weights are then dropped, and the layer runs by
    `Replay.run` until it is tuned. tune_rows, tune_call: rows in a step of tuning, and how the layer is
    called with so many; `rows` and `call` where there are none. stored_dtype: of a bias or norm by its name
    in the layer.
    Raises SourceError for weights that are not finite, CalibrationError for activations that are not.
    """
    stored: dict[str, torch.Tensor] = {}
    quantized: dict[str, Quantized] = {}
    sizes: dict[str, float] = {}
    reports: list[LinearReport] = []
    seconds = Seconds()
    tunes = config.tune_steps > 0 and targets is not None
    passes = [[group] for group in spec.groups] if config.true_sequential else [list(spec.groups)]
    for groups in passes:
        on_phase(f"inputs of {groups[0][0].name}")
        # What the last group puts out is not asked for again, but by the next layer.
        kept = replay if config.true_sequential and groups[-1] is not spec.groups[-1] else None
        capture = _capture(
            layer,
            groups,
            call,
            states,
            rows,
            device,
            seconds,
            targets if config.corrects else None,
            replay,
            kept,
        )
        for group in groups:
            hessian = capture.hessians.pop(0)
            on_phase(f"factor for {group[0].name}")
            started = time.perf_counter()
            prepared = prepare(hessian.finish(), config)
            seconds.factor += time.perf_counter() - started
            shared = _shared_lack(group, prepared, capture, targets, config, seconds)
            for linear_spec in group:
                on_phase(f"rounding {linear_spec.name}")
                linear = layer.get_submodule(linear_spec.name)
                assert isinstance(linear, nn.Linear)
                started = time.perf_counter()
                weight = _weight_t(linear, f"{spec.name}.{linear_spec.name}")
                wanted = _wanted(weight, linear_spec.name, prepared, capture, shared, config)
                result = quantize(weight, prepared, config, wanted=wanted)
                del weight, wanted
                seconds.quantize += time.perf_counter() - started
                stored.update(_pack(linear_spec.name, result, config, seconds))
                energy = capture.energy[linear_spec.name] / capture.sampled[linear_spec.name]
                error = result.squared_error / energy if energy > 0 else 0.0
                if tunes:
                    quantized[linear_spec.name] = result
                    sizes[linear_spec.name] = (energy / linear_spec.out_features) ** 0.5
                report = LinearReport(
                    linear_spec.name,
                    linear_spec.in_features,
                    linear_spec.out_features,
                    error,
                    result.damping,
                    result.dead_columns,
                )
                reports.append(report)
                on_linear(report)
                del result
            del prepared, hessian, shared
            if targets is not None:
                targets.drop(group)
            started = time.perf_counter()
            for linear_spec in group if kept or not (tunes and replay) else ():
                _restore(layer, linear_spec.name, stored, config)
            if kept:
                kept.compute([(s.name, layer.get_submodule(s.name)) for s in group], states.shape[0], rows)
                for linear_spec in group:
                    _drop_weight(layer.get_submodule(linear_spec.name))
            seconds.forward += time.perf_counter() - started
    if quantized and targets is not None and targets.output is not None:
        on_phase("tuning")
        started = time.perf_counter()
        tuned = tune_layer(
            layer,
            spec,
            tune_call or call,
            states,
            targets.output,
            quantized,
            sizes,
            steps=config.tune_steps,
            rows=tune_rows or rows,
            device=device,
            stored_dtype=stored_dtype,
        )
        _put_tuned(layer, tuned, stored)
        if replay is not None:
            replay.clear()  # it knows what the linears put out before
        for linear_spec in spec.linears:
            _restore(layer, linear_spec.name, stored, config)
        seconds.tune += time.perf_counter() - started
    return LayerResult(stored, tuple(reports), seconds)


def _capture(
    layer: nn.Module,
    groups: list[tuple[LinearSpec, ...]],
    call: LayerCall,
    states: HiddenStates,
    rows: int,
    device: torch.device,
    seconds: Seconds,
    targets: Targets | None,
    replay: Replay | None,
    kept: Replay | None,
) -> Capture:
    """Run the calibration rows up to the last linear of `groups`; kept: where their inputs go."""
    started = time.perf_counter()
    capture = Capture(layer, groups, device, targets, replay, kept)
    start = 0
    try:
        for chunk in states.chunks(rows):
            capture.run(layer, call, start, chunk.to(device))
            start += chunk.shape[0]
    finally:
        capture.remove()
    seconds.hessian += capture.seconds
    seconds.forward += time.perf_counter() - started - capture.seconds
    return capture


def _weight_t(linear: nn.Linear, full_name: str) -> torch.Tensor:
    """W^T [in, out], in float32 or bfloat16; the linear's own weight goes."""
    weight = linear.weight.detach()
    if not all_finite(weight):
        raise SourceError(f"{full_name}.weight holds values that are not finite", "Download the source again")
    dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    transposed = torch.empty(weight.shape[::-1], dtype=dtype, device=weight.device)
    transposed.copy_(weight.T)
    del weight
    _drop_weight(linear)
    return transposed


def _drop_weight(linear: nn.Module) -> None:
    """Give the memory of a linear's weight back; its shape and dtype stay known."""
    weight = linear.get_parameter("weight")
    linear._parameters["weight"] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)


def _shared_lack(
    group: Sequence[LinearSpec],
    prepared: Prepared,
    capture: Capture,
    targets: Targets | None,
    config: QuantConfig,
    seconds: Seconds,
) -> torch.Tensor | None:
    """R^-1 E[x (x' - x)^T] [in, in] times the correction, where linears are known by their input."""
    if targets is None or group[0].name not in targets.inputs or group[0].name not in capture.lacking:
        return None
    started = time.perf_counter()
    lacking = capture.lacking.pop(group[0].name)
    lacking *= config.correction / capture.tokens
    prepared.whiten_in_place(lacking)
    seconds.factor += time.perf_counter() - started
    return lacking


def _wanted(
    weight_t: torch.Tensor,
    name: str,
    prepared: Prepared,
    capture: Capture,
    shared: torch.Tensor | None,
    config: QuantConfig,
) -> torch.Tensor | None:
    """What the linear should put out beside W x, as `quantize` takes it."""
    if name in capture.lacking:
        lacking = capture.lacking.pop(name)
        lacking *= config.correction / capture.tokens
        return prepared.whiten_in_place(lacking)
    if shared is None:
        return None
    return add_product(torch.zeros_like(weight_t, dtype=shared.dtype), shared, weight_t, rounded=True)


def _put_tuned(layer: nn.Module, tuned: Tuned, stored: dict[str, torch.Tensor]) -> None:
    """The tuned values into what is stored, biases and norms into the layer too."""
    for name, scales in tuned.scales.items():
        stored[f"{name}.scales"] = scales
    for name, value in tuned.others.items():
        stored[name] = value
        owner, _, leaf = name.rpartition(".")
        parameter = layer.get_submodule(owner)._parameters[leaf]
        assert parameter is not None
        parameter.data.copy_(value)


def _pack(name: str, result: Quantized, config: QuantConfig, seconds: Seconds) -> dict[str, torch.Tensor]:
    started = time.perf_counter()
    n = result.codes.shape[0]
    width = n // result.scales.shape[0]
    tensors = {
        f"{name}.qweight": pack_rows(result.codes, config.bits),
        f"{name}.qzeros": pack_zeros(result.zeros, config.bits),
        f"{name}.scales": result.scales,
        f"{name}.g_idx": (torch.arange(n, dtype=torch.int32, device=result.codes.device) // width),
    }
    seconds.pack += time.perf_counter() - started
    return tensors


def _restore(layer: nn.Module, name: str, stored: dict[str, torch.Tensor], config: QuantConfig) -> None:
    """Give the linear the weight that readers of the packed tensors will see."""
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    weight = dequantize(
        stored[f"{name}.qweight"],
        stored[f"{name}.qzeros"],
        stored[f"{name}.scales"],
        stored[f"{name}.g_idx"],
        config.bits,
        linear.weight.dtype,
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
