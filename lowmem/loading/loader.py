"""A checkpoint → a model that runs: built on the meta device, then filled tensor by tensor.

transformers' model is built from the config without memory, its linears are replaced by packed ones, and each
tensor goes from its shard straight into place. Quantized checkpoints, 16-bit sources and bitsandbytes'
quantization on the fly are all loaded here, for the CPU and for GPUs. (transformers' own from_pretrained
cannot load a GPTQ checkpoint of gpt_bigcode: its weight initialisation reads `c_proj.weight`, which is
packed.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.checkpoint.files.home import typed_path
from lowmem.checkpoint.formats import QuantizationFormat
from lowmem.checkpoint.source.fitted import fitted
from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.verify.digests import check_small
from lowmem.errors import ArchitectureError, SourceError
from lowmem.kernels import bitsandbytes as bnb
from lowmem.kernels import dispatch
from lowmem.kernels.quant_linear import swap_linears
from lowmem.loading.garbage import paused_collection
from lowmem.loading.placing import Placement, check_packed, connect, fill
from lowmem.models.architecture import build_model, decoder_layers
from lowmem.models.dialogue import Dialogue, end_token_ids
from lowmem.models.vocabulary import check_vocabulary
from lowmem.plan.device import return_freed_memory
from lowmem.plan.memory import HEAD_BITS, ON_THE_FLY, RETURNED, with_head
from lowmem.plan.planner import Option, Plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, with its tokenizer and settings."""

    model: Any
    """transformers' causal LM in eval mode; its linears are QuantLinears, bitsandbytes' or dense."""
    tokenizer: Any
    """The fast tokenizer."""
    dialogue: Dialogue | None
    """The dialogue format that the tokenizer has tokens for."""
    stop_ids: tuple[int, ...]
    """An answer ends at any of these tokens."""
    format: QuantizationFormat | None
    """Of the quantized linears; None for a dense model."""
    dtype: torch.dtype
    """Of activations and dense weights."""
    device: torch.device
    """Of all weights but those of `cpu_layers`."""
    load_seconds: float
    """From the call to the last tensor in place."""
    weight_bytes: int
    """Of all weights in memory."""
    label: str = ""
    """The version's name, such as "4-bit g128"."""
    kernel: str = "torch"
    """The kernels that multiply the linears."""
    context: int | None = None
    """The tokens that were planned for."""
    cpu_layers: int = 0
    """Decoder layers on the CPU while the others are on a GPU."""
    plan: Plan | None = None
    """The plan that chose this version."""
    option: Option | None = None
    """The option of the plan that was loaded."""
    draft: LoadedModel | None = None
    """The small model that drafts for this one."""


@dataclass(frozen=True)
class LoadOptions:
    """Where and how a checkpoint is loaded."""

    device: str | torch.device = "cpu"
    """Where the model is; with `split` a part of it."""
    dtype: torch.dtype | None = None
    """Of activations and dense weights; None: see `default_dtype`. Scales keep their stored dtype."""
    on_the_fly: bnb.Method | None = None
    """Quantize the decoder layers' linears of a 16-bit source with bitsandbytes as they are read."""
    context: int | None = None
    """The tokens that were planned for; only recorded."""
    split: int | None = None
    """Decoder layers on `device`, the others are on the CPU; None: all on `device`."""
    activation_bits: int | None = None
    """8, 12 or 16: the integers that the CPU's kernels round activations to; None: the kernel's default."""
    head_bits: int = 16
    """8 rounds the token embedding and the head to 8 bits as they are read; 16 leaves them as stored."""

    def __post_init__(self) -> None:
        if torch.device(self.device).type == "meta" or self.dtype not in (None, *_DTYPES):
            raise ValueError(f"cannot load to {self.device} as {self.dtype}")
        if self.head_bits not in HEAD_BITS:
            raise ValueError(f"head_bits={self.head_bits} is not one of {HEAD_BITS}")


@paused_collection()
def load(
    folder: str | Path,
    options: LoadOptions = LoadOptions(),
    *,
    progress: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> LoadedModel:
    """Load a converted checkpoint, a GPTQ checkpoint of any tool, or a 16-bit source; reads local files only.

    progress: called with bytes read and bytes in all. notify: called with one line for each settings file
    that was changed since the conversion, and on zero-points that readers disagree about. Raises SourceError
    for a checkpoint that is damaged, incomplete, not of its config's model, or with another tokenizer than
    its own, and for packed tensors that contradict their config; torch's own errors where memory is short.
    """
    start = time.perf_counter()
    device, on_the_fly = torch.device(options.device), options.on_the_fly
    # Otherwise the process holds more than was planned. bitsandbytes' int8 needs the lower threshold: it
    # fragments the heap of a small model by 300 MiB.
    return_freed_memory(RETURNED if on_the_fly == "int8" else 4 << 20)
    source = open_source(folder, offline=True)
    config, tokenizer = source.config(), source.tokenizer()
    if typed_path(folder).is_dir():
        check_small(source.path, notify)
    dtype = options.dtype or default_dtype(config, device)
    model = build_model(config, dtype, buffers=True)
    source = fitted(source, model)
    for note in source.notes:
        notify(note)
    if source.untied:
        config = source.config()
        model = build_model(config, dtype, buffers=True)
    dialogue = Dialogue.detect(tokenizer)
    # An answer ends at the end of a turn, and at what the checkpoint's files call the end of text.
    stop_ids = end_token_ids(tokenizer, dialogue, config, source.generation_config())
    _check_tokenizer(tokenizer, dialogue, model, notify)
    layers_name, layers = decoder_layers(model, config)
    if source.format:
        if on_the_fly:
            raise SourceError(f"{folder} is already quantized", "Use the 16-bit original, or omit --quantize")
        swap_linears(model, source.quantized)
    elif on_the_fly:
        _swap_for_bnb(layers, on_the_fly)
    split = options.split if options.split is not None and options.split < len(layers) else None
    placement = Placement(device, layers_name, split)
    fill(model, source, placement, dtype, progress, options.head_bits)
    check_packed(model, source, notify)
    kernel = {"int8": "bitsandbytes int8", "nf4": "bitsandbytes NF4", None: "torch"}[on_the_fly]
    if source.format:
        kernel = dispatch.install(model, device, dtype, activation_bits=options.activation_bits)
    connect(model, placement)
    transformers_model: Any = model
    transformers_model.hf_device_map = placement.device_map(len(layers))  # otherwise pipelines would move it
    model.eval()
    _fix_generation_config(model, stop_ids)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        dialogue=dialogue,
        stop_ids=stop_ids,
        format=source.format,
        dtype=dtype,
        device=device,
        load_seconds=time.perf_counter() - start,
        weight_bytes=weight_bytes(model),
        label=with_head(_label(source.format, on_the_fly, dtype), options.head_bits),
        kernel=kernel,
        context=options.context,
        cpu_layers=0 if placement.split is None else len(layers) - placement.split,
    )


def default_dtype(config: Any, device: torch.device) -> torch.dtype:
    """The dtype of activations: the config's, float32 if it has none; on a CPU bfloat16 for float16.

    CPUs without float16 arithmetic multiply it many times slower. Measured for a linear of 6144 to 6144 and
    128 rows on two cores with AVX-512 BF16: float32 183 ms, bfloat16 31 ms, float16 347 ms.
    """
    stored = getattr(config, "dtype", None)
    dtype = stored if stored in _DTYPES else torch.float32
    return torch.bfloat16 if device.type == "cpu" and dtype is torch.float16 else dtype


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, and of bitsandbytes' scales; shared tensors count once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    total = sum(t.nbytes for t in tensors.values())
    return total + sum(bnb.scale_bytes(module) for module in model.modules())


def _label(format: QuantizationFormat | None, on_the_fly: bnb.Method | None, dtype: torch.dtype) -> str:
    if format:
        return format.label
    if on_the_fly:
        return ON_THE_FLY[on_the_fly]
    return str(dtype).removeprefix("torch.")


def _swap_for_bnb(layers: nn.ModuleList, method: bnb.Method) -> None:
    """Raises ArchitectureError where there is no linear to quantize, as in GPT-2."""
    swapped = 0
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, bnb.empty_linear(method, child))
                swapped += 1
    if not swapped:
        raise ArchitectureError("the model's decoder layers hold no nn.Linear to quantize", "Omit --quantize")


def _check_tokenizer(
    tokenizer: Any, dialogue: Dialogue | None, model: Any, notify: Callable[[str], None]
) -> None:
    markers: tuple[int, ...] = ()
    if dialogue is not None:
        markers = (dialogue.system_id, dialogue.user_id, dialogue.assistant_id, dialogue.end_id)
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], markers, notify)


def _fix_generation_config(model: Any, stop_ids: tuple[int, ...]) -> None:
    """Make transformers' generate() stop where ours does: StarChat's files name only <|endoftext|>."""
    config = getattr(model, "generation_config", None)
    if config is not None and stop_ids:
        config.eos_token_id = list(stop_ids)
        if config.pad_token_id is None:
            config.pad_token_id = stop_ids[0]
