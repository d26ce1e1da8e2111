"""Move tensors from their shards into a model, one at a time, onto the device where they stay.

On the CPU, tensors that keep their dtype are mapped; others are cast from the map, whose pages are dropped at
once (float16 embeddings keep theirs, see stored_embeddings.py). Tensors for a GPU pass through host memory in
slices of rows. A load therefore holds the model and one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowmem.checkpoint.formats import QUANT_PARTS
from lowmem.checkpoint.packed_values import examine
from lowmem.checkpoint.source.mapped import forget_pages
from lowmem.checkpoint.source.model_tensors import expected_shapes, integer_buffers
from lowmem.checkpoint.source.open import Source, TensorInfo
from lowmem.checkpoint.values import FLOATS, all_finite
from lowmem.config import QUANTIZED_SLICE_BYTES, SLICE_BYTES
from lowmem.errors import SourceError
from lowmem.kernels import bitsandbytes as bnb
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.kernels.quantized_tables import (
    QuantizedEmbedding,
    QuantizedHead,
    QuantizedTable,
    quantize_tables,
)
from lowmem.kernels.stored_embeddings import StoredEmbedding, StoredHead, keep_as_stored

_CAST_VALUES = 1 << 20
"""Values cast at a time: 4 MiB of float32 stay in a core's cache."""
_SEE = "Run `lowmem verify DIR` to list all problems"


@dataclass(frozen=True)
class Placement:
    """The device of each decoder layer."""

    device: torch.device
    """Of the first `split` decoder layers, and of everything outside the layers."""
    layers: str
    """Name of the list of decoder layers, such as `transformer.h`."""
    split: int | None = None
    """The layers from this one on are on the CPU, and computed there; None: all are on `device`."""

    def device_map(self, count: int) -> dict[str, torch.device]:
        """transformers' device map of a model with `count` decoder layers: name prefixes → devices."""
        if self.split is None:
            return {"": self.device}
        return {"": self.device} | {
            f"{self.layers}.{index}": torch.device("cpu") for index in range(self.split, count)
        }

    def of(self, name: str) -> torch.device:
        """The device of the tensor or module with this name."""
        if self.split is None or not name.startswith(self.layers + "."):
            return self.device
        index = int(name[len(self.layers) + 1 :].split(".", 1)[0])
        return self.device if index < self.split else torch.device("cpu")


def fill(
    model: nn.Module,
    source: Source,
    placement: Placement,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    head_bits: int = 16,
) -> None:
    """Fill a model on the meta device with the tensors of a source, and tie what it ties.

    progress: called with bytes done and bytes in all. head_bits: 8 rounds the token embedding and the head
    (see quantized_tables.py). Raises SourceError for a tensor that is missing, or
    whose shape or dtype is not the model's.
    """
    infos = source.infos
    model.tie_weights()  # type: ignore[operator]  # building on meta has untied them
    shapes = expected_shapes(model, infos)
    places = source.resolve(shapes)
    integers = integer_buffers(model)
    for name, stored in places.items():
        _check_shape(infos[stored], stored, shapes[name])
        if name not in integers:
            _check_float(infos[stored], stored)
    if head_bits == 8:
        quantize_tables(model, placement.device, dtype)
    packed = any(isinstance(module, QuantLinear) for module in model.modules())
    if packed and placement.device.type == "cpu":  # otherwise nearly all is cast, and this saves little
        half = [name for name, stored in places.items() if infos[stored].dtype == "float16"]
        keep_as_stored(model, half, dtype)
    modules = dict(model.named_modules())
    total = sum(infos[stored].nbytes for stored in places.values())
    done = 0
    for name in sorted(places, key=lambda name: (infos[places[name]].file, places[name])):
        stored = places[name]
        parent, _, leaf = name.rpartition(".")
        _place(modules[parent], leaf, source, stored, placement.of(name), dtype)
        source.release()
        done += infos[stored].nbytes
        if progress:
            progress(done, total)
    model.tie_weights()  # type: ignore[operator]  # to the tensors that were just read
    for module_name, module in modules.items():
        for leaf, buffer in module.named_buffers(recurse=False):  # such as rotary frequencies
            device = placement.of(f"{module_name}.{leaf}")
            if buffer.device != device and not buffer.is_meta:
                module._buffers[leaf] = buffer.to(device)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise SourceError(
            f"the checkpoint holds no tensor for {left[0]!r} ({len(left)} in all)", "It is incomplete"
        )


def _check_shape(info: TensorInfo, stored: str, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise SourceError(
            f"{info.file}: tensor {stored!r} has shape {list(info.shape)}, "
            f"the model of config.json needs {list(shape)}",
            "The config.json and the weights are not of the same model",
        )
    if 0 in shape:  # kernels divide by sizes
        raise SourceError(f"{info.file}: tensor {stored!r} of shape {list(shape)} is empty", _SEE)


def _check_float(info: TensorInfo, stored: str) -> None:
    if getattr(torch, info.dtype) not in FLOATS:
        raise SourceError(
            f"{info.file}: tensor {stored!r} is {info.dtype}, not a float of 16 bits or more",
            "Use the 16-bit original, or a version made by lowmem convert",
        )


def _place(
    module: nn.Module, leaf: str, source: Source, name: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Put one tensor into its module; the parts of a quantized linear keep their stored dtype."""
    if isinstance(module, QuantLinear) and leaf in QUANT_PARTS:
        setattr(module, leaf, _to(source, name, device, None))  # header and values are checked as a whole
    elif leaf == "weight" and bnb.is_empty(module):
        rows = bnb.rows_may_be_sliced(module) and source.reads_rows
        slices = _slices(source, name, QUANTIZED_SLICE_BYTES, whole=not rows)
        bnb.quantize_into(module, slices, device, dtype)
    elif leaf == "weight" and isinstance(module, QuantizedEmbedding | QuantizedHead):
        _round_into(module.table, source, name)
    elif leaf == "weight" and isinstance(module, StoredEmbedding | StoredHead):
        setattr(module, leaf, _to(source, name, device, None))
    elif leaf in module._buffers:
        buffer = module._buffers[leaf]
        wanted = buffer.dtype if buffer is not None and not buffer.dtype.is_floating_point else dtype
        setattr(module, leaf, _finite_if_short(_to(source, name, device, wanted), name))
    else:
        tensor = _finite_if_short(_to(source, name, device, dtype), name)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def _round_into(table: QuantizedTable, source: Source, name: str) -> None:
    """Fill an 8-bit table with a stored tensor, a slice of rows at a time."""
    try:
        for first, rows in _slices(source, name, QUANTIZED_SLICE_BYTES, whole=not source.reads_rows):
            table.fill(first, rows)
    except ValueError as error:
        raise SourceError(f"tensor {name!r} {error}", _SEE) from None


def _to(source: Source, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """A stored tensor on `device` in `dtype` (None: the stored dtype)."""
    info = source.infos[name]
    stored: torch.dtype = getattr(torch, info.dtype)
    wanted = dtype or stored
    if device.type == "cpu" and (mapped := source.map(name)) is not None:
        return mapped if mapped.dtype is wanted else _cast(mapped, wanted)
    if device.type == "cpu" and wanted is stored:
        return source.read(name)
    if len(info.shape) != 2 or not source.reads_rows or info.nbytes <= SLICE_BYTES:
        return source.read(name).to(device, wanted)
    result = torch.empty(info.shape, dtype=wanted, device=device)
    for first, rows in _slices(source, name, SLICE_BYTES):
        result[first : first + len(rows)] = rows
    return result


def _cast(mapped: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mapped tensor in another dtype; at most one slice of the map stays in memory.

    16-bit dtypes are cast to each other by way of float32, with the same rounding: torch vectorizes both
    halves, but not the direct cast (StarChat's embedding: 31 ms instead of 94).
    """
    result = torch.empty(mapped.shape, dtype=dtype)
    source, target = mapped.reshape(-1), result.view(-1)
    middle = torch.empty(min(_CAST_VALUES, source.numel()), dtype=torch.float32)
    dropped, step = 0, SLICE_BYTES // mapped.itemsize
    for first in range(0, source.numel(), _CAST_VALUES):
        part = source[first : first + _CAST_VALUES]
        if torch.float32 not in (part.dtype, dtype):
            part = middle[: len(part)].copy_(part)
        target[first : first + len(part)] = part
        if first + len(part) - dropped >= step:
            forget_pages(source[dropped : first + len(part)])
            dropped = first + len(part)
    forget_pages(source[dropped:])
    return result


def _slices(
    source: Source, name: str, nbytes: int, whole: bool = False
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of a 2-D tensor, about `nbytes` at a time, but at least 64 rows."""
    count, columns = source.infos[name].shape
    if whole:
        yield 0, source.read(name)
        return
    itemsize = source.infos[name].nbytes // max(1, count * columns)
    # A multiple of 64 rows does not cut NF4's blocks.
    step = max(64, nbytes // max(1, columns * itemsize) // 64 * 64)
    for first in range(0, count, step):
        yield first, source.read(name, slice(first, min(first + step, count)))


def check_packed(model: nn.Module, source: Source, notify: Callable[[str], None]) -> None:
    """Check groups, zero-points and scales of every packed linear, once all tensors are in place.

    notify: called with a line on zero-points that readers of the format disagree about. Raises SourceError
    naming the first tensor that contradicts the config.
    """
    if source.format is None:
        return
    notes: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found = examine(name, module, source.format)
            for fault in found.faults:
                raise fault.error()
            if found.note:
                notes.setdefault(found.note, []).append(name)
    for note, names in notes.items():
        notify(f"{len(names)} linears, such as {names[0]}: {note}")


def _finite_if_short(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Check that a norm's weight or a bias is finite; only `lowmem verify` checks matrices."""
    if tensor.dim() < 2:
        _check_finite(tensor, name)
    return tensor


def _check_finite(tensor: torch.Tensor, name: str) -> None:
    """A NaN here spoils whole rows or columns. All scales of 16 billion parameters take one core 12 ms."""
    if not all_finite(tensor):
        raise SourceError(f"tensor {name!r} has values that are not finite", _SEE)


def connect(model: nn.Module, placement: Placement) -> None:
    """Move activations between the GPU and the CPU in a split model.

    Hooks before each decoder layer, and before the modules that follow the layers, move the tensors among the
    arguments to the device of that module's weights. The KV cache follows its layer by itself.
    """
    if placement.split is None:
        return
    layers = model.get_submodule(placement.layers)
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        device = placement.of(f"{placement.layers}.{index}")
        layer.register_forward_pre_hook(_mover(device), with_kwargs=True)
    outer, _, own = placement.layers.rpartition(".")
    for name, module in model.get_submodule(outer).named_children():
        if name != own:
            module.register_forward_pre_hook(_mover(placement.device), with_kwargs=True)


def _mover(device: torch.device) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return moved(args, device), moved(kwargs, device)

    return hook


def moved(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in its tuples, lists and dictionaries moved to `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value
