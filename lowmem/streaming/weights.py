"""A source's weights by the model's own names, and modules that are given their tensors one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from lowmem.checkpoint.files.writer import TensorPlan
from lowmem.checkpoint.source.open import Source
from lowmem.checkpoint.values import all_finite
from lowmem.errors import SourceError
from lowmem.models.architecture import Architecture, LayerSpec, build_model
from lowmem.streaming.read_ahead import read_ahead

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ModelWeights:
    """A source read by the names of a model's parameters. All shapes are checked before any data is read.

    Raises SourceError for a missing tensor, or one whose shape differs from the model's.
    """

    def __init__(self, source: Source, arch: Architecture) -> None:
        self.source = source
        self.arch = arch
        self._names = source.resolve(arch.shapes)
        for name, stored in self._names.items():
            info = source.dense_infos[stored]
            if info.shape != arch.shapes[name]:
                raise SourceError(
                    f"{info.file}: {stored} has shape {list(info.shape)}, "
                    f"and config.json says {list(arch.shapes[name])}",
                    "The config does not belong to these weights",
                )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the source's linears."""
        stored = self._names[f"{self.arch.linear_names()[0]}.weight"]
        dtype: torch.dtype = getattr(torch, self.source.dense_infos[stored].dtype)
        return dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype, in new memory; of a quantized linear the dequantized weight."""
        return self.source.dense(self._names[name])

    def plan(self, name: str, as_name: str | None = None) -> TensorPlan:
        """How a tensor that is not quantized is stored: float16, or bfloat16 if the source has that."""
        info = self.source.dense_infos[self._names[name]]
        return TensorPlan(as_name or name, stored_dtype(getattr(torch, info.dtype)), info.shape)

    def read_narrowed(self, name: str) -> torch.Tensor:
        """One tensor in the dtype of `plan`. Raises SourceError for values that float16 cannot hold."""
        tensor = self.read(name)
        result = tensor.to(stored_dtype(tensor.dtype))
        if not all_finite(result):
            raise SourceError(
                f"{name} holds values that are not finite in 16 bits",
                "The source is damaged, or its values do not fit float16",
            )
        return result

    def fill(
        self, module: nn.Module, prefix: str, names: Iterable[str], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Set the tensors of `module`, stored as `prefix` + name, as `dtype` on `device`."""
        for name in names:
            tensor = self.read(prefix + name)
            put(module, name, tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None))

    def fill_layer(
        self,
        layer: nn.Module,
        spec: LayerSpec,
        dtype: torch.dtype,
        device: torch.device,
        found: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Read one decoder layer. found: its tensors, if they have been read already."""
        if found is None:
            self.fill(layer, f"{spec.name}.", self.arch.inside(spec), dtype, device)
        else:
            for name, tensor in found.items():
                put(layer, name, tensor)
        move_buffers(layer, device)
        self.source.release()

    def read_ahead(self, spec: LayerSpec) -> None:
        """Start reading a layer's bytes into the page cache, in the background."""
        read_ahead(self.source, [self._names[f"{spec.name}.{name}"] for name in self.arch.inside(spec)])

    def head_is_duplicated(self) -> bool:
        """Whether the model ties its head to the embedding, or the stored head is a copy of it."""
        if self.arch.tied:
            return True
        return self.source.head_is_tied(self._names[self.arch.embedding], self._names[self.arch.head])


def build_without_layers(
    weights: ModelWeights, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """transformers' model with what the first layer's input is computed from; the rest is on meta."""
    model = build_model(config, dtype, buffers=True)
    weights.fill(model, "", weights.arch.outside_before_layers(), dtype, device)
    weights.source.release()
    move_buffers(model, device)
    return model


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor outside the linears is stored in: float32 becomes float16."""
    return dtype if dtype == torch.bfloat16 or not dtype.is_floating_point else torch.float16


def put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Set a parameter or buffer by its dotted name, for example in place of a meta tensor."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the buffers that the model computes itself (rotary frequencies, masks) to the device."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[name] = buffer.to(device)


def empty(module: nn.Module) -> None:
    """Free all parameters: they are on the meta device again."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
