"""A checkpoint → a model that runs: built without memory, then filled tensor by tensor.

transformers' model is built on the meta device from config.json, its linears are swapped for packed ones,
and each tensor goes from its shard straight into place. Quantized checkpoints, 16-bit sources and
bitsandbytes' quantization on the fly come through this one door, for the CPU and for cards.
(transformers' own from_pretrained cannot load a GPTQ checkpoint of gpt_bigcode: its weight initialisation
reaches for `c_proj.weight`, which is packed.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.checkpoint.formats import QuantizationFormat
from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.verify.digests import check_small
from lowmem.errors import SourceError
from lowmem.kernels import bitsandbytes as bnb
from lowmem.kernels import dispatch
from lowmem.kernels.quant_linear import swap_linears
from lowmem.loading.garbage import paused_collection
from lowmem.loading.placing import Placement, connect, fill
from lowmem.models.architecture import build_model, decoder_layers
from lowmem.models.dialogue import Dialogue, end_token_ids
from lowmem.models.vocabulary import check_vocabulary
from lowmem.plan.device import return_freed_memory
from lowmem.plan.memory import ON_THE_FLY, RETURNED
from lowmem.plan.planner import Option, Plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, and what belongs to it.

    model: transformers' causal LM in eval mode, its packed linears QuantLinears, or bitsandbytes' linears.
    tokenizer: the fast one. dialogue: the dialogue format that the tokenizer has tokens for, or None.
    stop_ids: an answer ends at any of them. format: of the packed linears, or None. dtype: of activations
    and dense weights. load_seconds: from the call to the last tensor in place. weight_bytes: of all weights
    in memory. label: what a user calls the form, as "4-bit g128". kernel: what multiplies its linears.
    context: the tokens that were planned for, or None. cpu_layers: decoder layers beside a card, on the CPU.
    plan, option: what was planned, and which of it was loaded, where a plan was made.
    """

    model: Any
    tokenizer: Any
    dialogue: Dialogue | None
    stop_ids: tuple[int, ...]
    format: QuantizationFormat | None
    dtype: torch.dtype
    device: torch.device
    load_seconds: float
    weight_bytes: int
    label: str = ""
    kernel: str = "torch"
    context: int | None = None
    cpu_layers: int = 0
    plan: Plan | None = None
    option: Option | None = None


@paused_collection()
def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    on_the_fly: bnb.Method | None = None,
    context: int | None = None,
    split: int | None = None,
    activation_bits: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> LoadedModel:
    """Load a converted checkpoint, anybody's GPTQ, or a 16-bit source, from disk alone.

    dtype: the config's, unless given; but a float16 model on a CPU runs in bfloat16, since CPUs without
    float16 arithmetic multiply it many times slower (see `default_dtype`). Scales stay as they are stored.
    on_the_fly: quantize the decoder layers' linears of a 16-bit source with bitsandbytes while they are read.
    split: only so many decoder layers on `device`, the others on the CPU. activation_bits: 8, 12 or 16, of
    the integers that a CPU's kernels make of activations (see kernels.native_linear.activation_bits).
    progress: bytes read, and all. notify: hears in one line of what looks changed, but may be meant.
    Raises SourceError for a checkpoint that is damaged, incomplete, not of its config's model, or beside
    another tokenizer than its own; torch's own errors where memory is short.
    """
    start = time.perf_counter()
    device = torch.device(device)
    if device.type == "meta" or (dtype is not None and dtype not in _DTYPES):
        raise ValueError(f"cannot load to {device} as {dtype}")
    # Or the plan's bytes would not be the system's. bitsandbytes' int8 leaves 300 MiB of holes in the heap of
    # a small model otherwise, for a prefill that is half as long.
    return_freed_memory(RETURNED if on_the_fly == "int8" else 4 << 20)
    source = open_source(folder, offline=True)
    config, tokenizer = source.config(), source.tokenizer()
    if Path(folder).expanduser().is_dir():
        check_small(source.path, notify)
    dtype = dtype or default_dtype(config, device)
    model = build_model(config, dtype, buffers=True)
    dialogue = Dialogue.detect(tokenizer)
    # An answer ends at the end of a turn, and at what the checkpoint's files call the end of text.
    stop_ids = end_token_ids(tokenizer, dialogue, config, source.generation_config())
    _check_tokenizer(tokenizer, dialogue, model, notify)
    layers_name, layers = decoder_layers(model, config)
    if source.format:
        if on_the_fly:
            raise SourceError(f"{folder} is quantized already", "Give the 16-bit original, or no --quantize")
        swap_linears(model, source.quantized)
    elif on_the_fly:
        _swap_for_bnb(layers, on_the_fly)
    placement = Placement(device, layers_name, None if split is None or split >= len(layers) else split)
    fill(model, source, placement, dtype, progress)
    kernel = {"int8": "bitsandbytes int8", "nf4": "bitsandbytes NF4", None: "torch"}[on_the_fly]
    if source.format:
        kernel = dispatch.install(model, device, dtype, activation_bits=activation_bits)
    connect(model, placement)
    transformers_model: Any = model
    transformers_model.hf_device_map = placement.device_map(len(layers))  # or pipelines would move it
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
        label=_label(source.format, on_the_fly, dtype),
        kernel=kernel,
        context=context,
        cpu_layers=0 if placement.split is None else len(layers) - placement.split,
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
    """Bytes of all parameters and buffers, and of bitsandbytes' scales; what is shared counts once."""
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
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, bnb.empty_linear(method, child))


def _check_tokenizer(
    tokenizer: Any, dialogue: Dialogue | None, model: Any, notify: Callable[[str], None]
) -> None:
    markers: tuple[int, ...] = ()
    if dialogue is not None:
        markers = (dialogue.system_id, dialogue.user_id, dialogue.assistant_id, dialogue.end_id)
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], markers, notify)


def _fix_generation_config(model: Any, stop_ids: tuple[int, ...]) -> None:
    """transformers' own generate() then stops where ours does (StarChat's files name only <|endoftext|>)."""
    config = getattr(model, "generation_config", None)
    if config is not None and stop_ids:
        config.eos_token_id = list(stop_ids)
        if config.pad_token_id is None:
            config.pad_token_id = stop_ids[0]
