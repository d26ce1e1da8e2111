"""A checkpoint → a model that runs: built without memory, then filled tensor by tensor.

transformers' model is built on the meta device from config.json, its packed linears are swapped in, and
each tensor is read from its shard straight into place: the peak is the model and one tensor. Quantized
and 16-bit checkpoints come through this one door. (transformers' own from_pretrained cannot load a GPTQ
checkpoint of gpt_bigcode: its weight initialisation reaches for `c_proj.weight`, which is packed.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.checkpoint.files import one_line, read_json
from lowmem.checkpoint.manifest import GptqFormat, find_quantization
from lowmem.checkpoint.safetensors_file import SafetensorsSource
from lowmem.checkpoint.source import TensorInfo, open_source, resolve_names
from lowmem.checkpoint.verify import QUANT_PARTS, read_shards, unique_tensors
from lowmem.errors import SourceError
from lowmem.models.architecture import build_model
from lowmem.models.dialogue import Dialogue, end_token_ids
from lowmem.quant_linear import QuantLinear, swap_linears

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, and what belongs to it.

    model: transformers' causal LM in eval mode, its packed linears QuantLinears. tokenizer: the fast one.
    dialogue: the dialogue format that the tokenizer has tokens for, or None. stop_ids: an answer ends at
    any of them. format: of the packed linears, or None in a 16-bit model. dtype: of activations and dense
    weights. load_seconds: from the call to the last tensor in place. weight_bytes: of all weights in memory.
    """

    model: Any
    tokenizer: Any
    dialogue: Dialogue | None
    stop_ids: tuple[int, ...]
    format: GptqFormat | None
    dtype: torch.dtype
    device: torch.device
    load_seconds: float
    weight_bytes: int


@dataclass(frozen=True)
class _Checkpoint:
    """Both kinds of checkpoint in one form: what is stored, and how to read one tensor of it."""

    path: Path
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], torch.Tensor]
    release: Callable[[], None]
    config: Any
    tokenizer: Any
    format: GptqFormat | None


def load(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load a converted checkpoint, anybody's GPTQ, or a 16-bit source, from disk alone.

    dtype: the config's, unless given; but a float16 model on a CPU runs in bfloat16, since CPUs without
    float16 arithmetic multiply it many times slower (see `default_dtype`). Scales stay as they are stored.
    Raises SourceError for a checkpoint that is damaged, incomplete, or not of its config's model.
    """
    start = time.perf_counter()
    device = torch.device(device)
    if device.type == "meta" or (dtype is not None and dtype not in _DTYPES):
        raise ValueError(f"cannot load to {device} as {dtype}")
    checkpoint = _open(folder)
    dtype = dtype or default_dtype(checkpoint.config, device)
    model = build_model(checkpoint.config, dtype, buffers=True)
    if checkpoint.format:
        swap_linears(model, _packed_names(checkpoint.infos), checkpoint.format)
    _fill(model, checkpoint, device, dtype)
    model.eval()
    dialogue = Dialogue.detect(checkpoint.tokenizer)
    stop_ids = _stop_ids(checkpoint, dialogue)
    _fix_generation_config(model, stop_ids)
    return LoadedModel(
        model=model,
        tokenizer=checkpoint.tokenizer,
        dialogue=dialogue,
        stop_ids=stop_ids,
        format=checkpoint.format,
        dtype=dtype,
        device=device,
        load_seconds=time.perf_counter() - start,
        weight_bytes=weight_bytes(model),
    )


def default_dtype(config: Any, device: torch.device) -> torch.dtype:
    """The dtype of activations: the config's, float32 if it names none, bfloat16 for float16 on a CPU.

    Measured for a linear of 6144 to 6144 and 128 rows on two cores with AVX-512 BF16: float32 183 ms,
    bfloat16 31 ms, float16 347 ms.
    """
    stored = getattr(config, "dtype", None)
    dtype = stored if stored in _DTYPES else torch.float32
    return torch.bfloat16 if device.type == "cpu" and dtype is torch.float16 else dtype


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what is shared counts once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values())


def _open(folder: str | Path) -> _Checkpoint:
    path = Path(folder).expanduser()
    format = find_quantization(path) if path.is_dir() else None
    if format is None:
        source = open_source(str(folder), offline=True)
        return _Checkpoint(
            source.path, source.infos, source.read, source.release, source.config(), source.tokenizer(), None
        )
    shards = read_shards(path)
    if shards.problems:
        raise SourceError(f"{path}: {shards.problems[0]}", "See all that is wrong with: lowmem verify DIR")
    if (path / "adapter_config.json").is_file():
        raise SourceError(f"{path} holds an adapter, not a model", "Give the folder of the whole model")
    source = SafetensorsSource(path, str(folder), shards.tensors)
    return _Checkpoint(
        path, source.infos, shards.read, source.release, _config(path), source.tokenizer(), format
    )


def _config(folder: Path) -> Any:
    """The config of a quantized checkpoint, without its quantization_config, which is ours to act on."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the values are anyone's, and each config class fails its own way
        raise SourceError(f"{folder / 'config.json'} is not a usable config: {one_line(error)}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _packed_names(infos: Mapping[str, TensorInfo]) -> list[str]:
    names = [name.removesuffix(".qweight") for name in infos if name.endswith(".qweight")]
    if not names:
        raise SourceError("the config says that the model is quantized, and no tensor is", "Convert it again")
    return names


def _fill(model: nn.Module, checkpoint: _Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Read every tensor into its place, tie what is tied, and leave nothing on meta."""
    infos, modules = checkpoint.infos, dict(model.named_modules())
    model.tie_weights()  # type: ignore[operator]  # building without memory has parted what is tied
    names: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (aliases, shape) in unique_tensors(model):
        # A tied head is read once, under whichever of its names the checkpoint has.
        stored = next((alias for alias in aliases if alias in infos), name)
        names.append(stored)
        shapes[stored] = shape
    places = resolve_names(infos, names)
    for name in names:
        info = infos[places[name]]
        if info.shape != shapes[name]:
            raise SourceError(
                f"{info.file}: tensor {places[name]!r} has shape {list(info.shape)}, "
                f"the model of config.json needs {list(shapes[name])}",
                "The config.json and the weights are not of the same model",
            )
    for name in sorted(names, key=lambda name: infos[places[name]].file):
        parent, _, leaf = name.rpartition(".")
        _place(modules[parent], leaf, checkpoint.read(places[name]), places[name], device, dtype)
        checkpoint.release()
    model.tie_weights()  # type: ignore[operator]  # to the tensors that have just been read
    for module in modules.values():
        for leaf, buffer in module.named_buffers(recurse=False):
            if buffer.device != device and not buffer.is_meta:  # causal masks and rotary frequencies
                module._buffers[leaf] = buffer.to(device)
    left = [name for name, tensor in _all_tensors(model) if tensor.is_meta]
    if left:
        raise SourceError(
            f"the checkpoint holds no tensor for {left[0]!r} ({len(left)} in all)", "It is not whole"
        )


def _place(
    module: nn.Module,
    leaf: str,
    tensor: torch.Tensor,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put one tensor into its module; packed words, groups and scales keep the dtype they are stored in."""
    if isinstance(module, QuantLinear) and leaf in QUANT_PARTS:
        if leaf == "scales":
            if not tensor.dtype.is_floating_point:
                raise SourceError(f"tensor {name!r} is {tensor.dtype}, not a float", "Convert it again")
        elif tensor.dtype is not torch.int32:
            raise SourceError(f"tensor {name!r} is {tensor.dtype}, not int32", "Convert it again")
        if leaf == "g_idx" and not 0 <= int(tensor.min()) <= int(tensor.max()) < module.scales.shape[0]:
            raise SourceError(
                f"tensor {name!r} names groups {int(tensor.min())} to {int(tensor.max())}, "
                f"there are {module.scales.shape[0]}",
                "See all that is wrong with: lowmem verify DIR",
            )
        setattr(module, leaf, tensor.to(device))
    elif leaf in module._buffers:
        buffer = module._buffers[leaf]
        wanted = buffer.dtype if buffer is not None and not buffer.dtype.is_floating_point else dtype
        setattr(module, leaf, tensor.to(device, wanted))
    else:
        setattr(module, leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _stop_ids(checkpoint: _Checkpoint, dialogue: Dialogue | None) -> tuple[int, ...]:
    """Where an answer ends: the end of a turn, and whatever the checkpoint's files call the end of text."""
    file = checkpoint.path / "generation_config.json"
    stored = read_json(file) if file.is_file() else {}
    return end_token_ids(checkpoint.tokenizer, dialogue, checkpoint.config, stored)


def _fix_generation_config(model: Any, stop_ids: tuple[int, ...]) -> None:
    """transformers' own generate() then stops where ours does (StarChat's files name only <|endoftext|>)."""
    config = getattr(model, "generation_config", None)
    if config is not None and stop_ids:
        config.eos_token_id = list(stop_ids)
        if config.pad_token_id is None:
            config.pad_token_id = stop_ids[0]
