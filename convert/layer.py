"""One decoder layer: capture the inputs of its linears, quantize them, pack them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from convert.activations import HiddenStates
from convert.calls import LayerCall
from convert.gptq import Prepared, Quantized, prepare, quantize
from convert.hessian import Hessian
from convert.targets import Targets
from convert.tuning import Tuned, tune_layer
from lowmem.checkpoint.packing import pack_rows, pack_zeros
from lowmem.checkpoint.values import all_finite
from lowmem.config import QuantConfig
from lowmem.errors import SourceError
from lowmem.kernels.reference import dequantize
from lowmem.models.architecture import LayerSpec, LinearSpec


@dataclass(frozen=True)
class LinearReport:
    """What quantizing one linear did to its outputs over the calibration tokens."""

    name: str
    in_features: int
    out_features: int
    error: float
    """Squared error of the outputs as a share of their energy: ||x(W-Q)||^2 / ||xW||^2; 0 without energy.
    With a correction W is the corrected weight, which is what Q was to come close to."""
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


class _Stop(Exception):
    """The last linear that is being watched has its input: the rest of the layer need not run."""


class _Capture:
    """Hooks on some linears: one Hessian for each distinct input, the energy of each output, and with
    targets E[x d^T] for each linear, d what its output lacks."""

    def __init__(
        self,
        layer: nn.Module,
        groups: Sequence[Sequence[LinearSpec]],
        device: torch.device,
        targets: Targets | None,
    ) -> None:
        self.hessians = [Hessian(group[0].in_features, device) for group in groups]
        self.energy = {spec.name: 0.0 for group in groups for spec in group}
        self.lacking = {
            spec.name: torch.zeros(spec.in_features, spec.out_features, device=device)
            for group in groups
            for spec in group
            if targets is not None
        }
        self.seconds = 0.0
        self.tokens = 0
        self._targets = targets
        self._last_input: torch.Tensor | None = None
        self._left = self._count = len(self.energy)
        self._start = 0
        self._hidden = torch.empty(0)
        self._handles = []
        for group, hessian in zip(groups, self.hessians, strict=True):
            for position, spec in enumerate(group):
                module = layer.get_submodule(spec.name)
                hook = self._hook(spec.name, hessian if position == 0 else None)
                self._handles.append(module.register_forward_hook(hook))

    def run(self, layer: nn.Module, call: LayerCall, start: int, hidden: torch.Tensor) -> None:
        """Rows from `start` on: hidden [some rows, row_length, hidden]."""
        self._start, self._hidden, self._left = start, hidden, self._count
        self.tokens += hidden.shape[0] * hidden.shape[1]
        try:
            output = call.run(layer, hidden)
        except _Stop:
            return
        started = time.perf_counter()
        if self._last_input is not None:  # of the linear whose target is the layer's output
            name = next(name for name in self.lacking if self._added(name) == "last")
            self._add_lacking(name, self._last_input, output)
            self._last_input = None
        self.seconds += time.perf_counter() - started

    def _added(self, name: str) -> str:
        return "to nothing" if self._targets is None else self._targets.added[name]

    def _add_lacking(self, name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        assert self._targets is not None
        wanted = self._targets.read(name, self._start, self._start + self._hidden.shape[0])
        lack = wanted.to(output.device, torch.float32) - output
        self.lacking[name].addmm_(_tokens(x).T, _tokens(lack))

    def _hook(self, name: str, hessian: Hessian | None) -> Callable[..., None]:
        def hook(module: nn.Linear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            started = time.perf_counter()
            if hessian is not None:
                hessian.add(args[0].reshape(-1, args[0].shape[-1]))
            plain = output if module.bias is None else output - module.bias
            self.energy[name] += float(torch.linalg.vector_norm(plain, dtype=torch.float32)) ** 2
            added = self._added(name)
            if added == "last":
                self._last_input = args[0]
            elif self._targets is not None:
                whole = output + self._hidden if added == "to the layer's input" else output
                self._add_lacking(name, args[0], whole)
            self.seconds += time.perf_counter() - started
            self._left -= 1
            if self._left == 0 and self._last_input is None:
                raise _Stop

        return hook

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).to(torch.float32)


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
    stored_dtype: Callable[[str], torch.dtype] = lambda _: torch.float16,
    on_phase: Callable[[str], None] = lambda _: None,
    on_linear: Callable[[LinearReport], None] = lambda _: None,
) -> LayerResult:
    """Quantize every linear of `layer` (on `device`), whose weights become the dequantized ones.

    rows: calibration rows that run at a time. With true_sequential the linears are taken in the order
    in which they run, each seeing the outputs of the already quantized ones; otherwise all inputs come
    from the unquantized layer, in one pass. targets: what the linears should put out; each then makes up for
    config.correction of what it lacks, its file is removed, and the layer is tuned to put out what it should.
    stored_dtype: of a bias or norm by its name in the layer.
    Raises SourceError for weights that are not finite, CalibrationError for activations that are not.
    """
    stored: dict[str, torch.Tensor] = {}
    quantized: dict[str, Quantized] = {}
    sizes: dict[str, float] = {}
    reports: list[LinearReport] = []
    seconds = Seconds()
    passes = [[group] for group in spec.groups] if config.true_sequential else [list(spec.groups)]
    for groups in passes:
        on_phase(f"inputs of {groups[0][0].name}")
        capture = _capture(
            layer, groups, call, states, rows, device, seconds, targets if config.corrects else None
        )
        for group in groups:
            hessian = capture.hessians.pop(0)
            on_phase(f"factor for {group[0].name}")
            started = time.perf_counter()
            prepared = prepare(hessian.finish(), config)
            seconds.factor += time.perf_counter() - started
            for linear_spec in group:
                on_phase(f"rounding {linear_spec.name}")
                linear = layer.get_submodule(linear_spec.name)
                assert isinstance(linear, nn.Linear)
                name = f"{spec.name}.{linear_spec.name}"
                started = time.perf_counter()
                weight = _as_rounded(linear, name, prepared, capture, linear_spec.name, config)
                result = quantize(weight, prepared, config)
                del weight
                seconds.quantize += time.perf_counter() - started
                if targets is not None:
                    targets.drop(linear_spec.name)
                stored.update(_pack(linear_spec.name, linear, result, config, seconds))
                _restore(linear, linear_spec.name, stored, config)
                energy = capture.energy[linear_spec.name] / capture.tokens
                error = result.squared_error / energy if energy > 0 else 0.0
                if config.tune_steps and targets is not None:
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
            del prepared
    if quantized and targets is not None and targets.output is not None:
        on_phase("tuning")
        started = time.perf_counter()
        tuned = tune_layer(
            layer,
            spec,
            call,
            states,
            targets.output,
            quantized,
            sizes,
            steps=config.tune_steps,
            rows=rows,
            device=device,
            stored_dtype=stored_dtype,
        )
        _put_tuned(layer, tuned, stored, config)
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
) -> _Capture:
    """Run the calibration rows up to the last linear of `groups`."""
    started = time.perf_counter()
    capture = _Capture(layer, groups, device, targets)
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


def _as_rounded(
    linear: nn.Linear, full_name: str, prepared: Prepared, capture: _Capture, name: str, config: QuantConfig
) -> torch.Tensor:
    """The weight to round, float32 [in, out]: W^T, moved to where it makes up for what the linear lacks.

    The linear's own weight goes, and what is lacking becomes the result: no third matrix of this size.
    """
    weight = linear.weight.detach()
    if not all_finite(weight):
        raise SourceError(f"{full_name}.weight holds values that are not finite", "Download the source again")
    if name in capture.lacking:
        transposed = capture.lacking.pop(name)
        transposed *= config.correction / capture.tokens
        prepared.regress_in_place(transposed)
        transposed += weight.T
    else:
        transposed = torch.empty(weight.shape[::-1], dtype=torch.float32, device=weight.device)
        transposed.copy_(weight.T)
    del weight
    linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
    return transposed


def _put_tuned(layer: nn.Module, tuned: Tuned, stored: dict[str, torch.Tensor], config: QuantConfig) -> None:
    """The tuned values into what is stored, and into the layer as readers will see it."""
    for name, scales in tuned.scales.items():
        stored[f"{name}.scales"] = scales
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        _restore(linear, name, stored, config)
    for name, value in tuned.others.items():
        stored[name] = value
        owner, _, leaf = name.rpartition(".")
        parameter = layer.get_submodule(owner)._parameters[leaf]
        assert parameter is not None
        parameter.data.copy_(value)


def _pack(
    name: str, linear: nn.Linear, result: Quantized, config: QuantConfig, seconds: Seconds
) -> dict[str, torch.Tensor]:
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


def _restore(linear: nn.Linear, name: str, stored: dict[str, torch.Tensor], config: QuantConfig) -> None:
    """Give the linear the weight that readers of the packed tensors will see."""
    weight = dequantize(
        stored[f"{name}.qweight"],
        stored[f"{name}.qzeros"],
        stored[f"{name}.scales"],
        stored[f"{name}.g_idx"],
        config.bits,
        linear.weight.dtype,
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
