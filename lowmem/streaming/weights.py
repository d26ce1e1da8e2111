"""The source's weights, by the names that the model gives them, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lowmem.checkpoint.files.writer import TensorPlan
from lowmem.checkpoint.source.open import Source, head_is_tied, resolve_names
from lowmem.checkpoint.values import all_finite
from lowmem.errors import SourceError
from lowmem.models.architecture import Architecture, LayerSpec
from lowmem.streaming.read_ahead import read_ahead


class Weights:
    """A source seen through a model's architecture; every shape is checked before any data is read.

    Raises SourceError for a missing tensor or one whose shape is not the model's.
    """

    def __init__(self, source: Source, arch: Architecture) -> None:
        self.source = source
        self.arch = arch
        self._names = resolve_names(source.infos, arch.shapes)
        for name, stored in self._names.items():
            info = source.infos[stored]
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
        dtype: torch.dtype = getattr(torch, self.source.infos[stored].dtype)
        return dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype, in memory of its own."""
        return self.source.read(self._names[name])

    def plan(self, name: str, as_name: str | None = None) -> TensorPlan:
        """How a tensor that is not quantized will be stored: 16 bits, bfloat16 if it was that."""
        info = self.source.infos[self._names[name]]
        return TensorPlan(as_name or name, stored_dtype(getattr(torch, info.dtype)), info.shape)

    def read_narrowed(self, name: str) -> torch.Tensor:
        """One tensor as `plan` says it is stored. Raises SourceError where float16 could not hold it."""
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
        """Give `module` the tensors `prefix` + name, as `dtype` on `device`."""
        for name in names:
            tensor = self.read(prefix + name)
            put(module, name, tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None))

    def fill_layer(self, layer: nn.Module, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> None:
        """Materialise one decoder layer."""
        self.fill(layer, f"{spec.name}.", self.arch.inside(spec), dtype, device)
        move_buffers(layer, device)
        self.source.release()

    def read_ahead(self, spec: LayerSpec) -> None:
        """Have a layer's bytes brought into the page cache meanwhile."""
        read_ahead(self.source, [self._names[f"{spec.name}.{name}"] for name in self.arch.inside(spec)])

    def head_is_duplicated(self) -> bool:
        """Whether a head that is stored is a copy of the embedding, or the model ties it anyway."""
        if self.arch.tied:
            return True
        return head_is_tied(self.source, self._names[self.arch.embedding], self._names[self.arch.head])


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a tensor outside the linears is stored as: its own 16 bits; float32 becomes float16."""
    return dtype if dtype == torch.bfloat16 or not dtype.is_floating_point else torch.float16


def put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Set a parameter or buffer by its dotted name, replacing what is there (a meta tensor, say)."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the buffers that the model made by itself (rotary frequencies, masks) to the device."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[name] = buffer.to(device)


def empty(module: nn.Module) -> None:
    """Give the memory of all parameters back: they are on the meta device again."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
