"""bitsandbytes' linears, quantized while a 16-bit checkpoint is read: int8 and NF4.

For a model that has not been converted. LLM.int8() (Dettmers et al. 2022) with transformers' threshold of
6 for outlier columns; NF4 (Dettmers et al. 2023) with blocks of 64 and float32 statistics, transformers'
default. The same calls run on the CPU and on CUDA. A weight is quantized a slice of rows at a time, so that
it is never whole in memory in 16 bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

Method = Literal["int8", "nf4"]
OUTLIER_THRESHOLD = 6.0
BLOCK = 64
"""Weights that share a scale in NF4."""
CPU_ROWS = 32
"""Output rows in a block of bitsandbytes' NF4 layout for the CPU."""

RowSlices = Iterator[tuple[int, torch.Tensor]]
"""(first row, 16- or 32-bit weights [rows, in]) in order, covering all rows."""


def quiet() -> None:
    """Silence bitsandbytes' advice on optional packages, which it logs at every start."""
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)


def empty_linear(method: Method, linear: nn.Linear) -> nn.Module:
    """A bitsandbytes linear of the same shape on the meta device, to be filled by `quantize_into`."""
    quiet()
    import bitsandbytes as bnb

    bias = linear.bias is not None
    if method == "int8":
        return bnb.nn.Linear8bitLt(  # type: ignore[no-any-return]
            linear.in_features,
            linear.out_features,
            bias=bias,
            has_fp16_weights=False,
            threshold=OUTLIER_THRESHOLD,
            device="meta",
        )
    module = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=bias,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    if linear.out_features % CPU_ROWS or linear.in_features % BLOCK:
        module.support_avx512bf16_for_cpu = False  # its packing asserts whole blocks
    return module  # type: ignore[no-any-return]


def quantize_into(module: nn.Module, slices: RowSlices, device: torch.device, dtype: torch.dtype) -> None:
    """Fill a linear of `empty_linear` on `device` from slices of its weight. dtype: of the activations.

    Slices for NF4 must be whole blocks: any number of rows when the inputs are a multiple of 64, else all.
    """
    import bitsandbytes as bnb

    if isinstance(module, bnb.nn.Linear8bitLt):
        _fill_int8(module, slices, device)
    else:
        _fill_nf4(module, slices, device, dtype)


def is_empty(module: nn.Module) -> bool:
    """Whether this is a linear of `empty_linear` that has not been filled yet."""
    if type(module).__module__ != "bitsandbytes.nn.modules":
        return False  # without importing bitsandbytes for a model that does not use it
    weight = module.weight
    return isinstance(weight, torch.Tensor) and weight.is_meta


def rows_may_be_sliced(module: nn.Module) -> bool:
    """Whether the weight can be quantized a slice of rows at a time, with the same result."""
    import bitsandbytes as bnb

    return isinstance(module, bnb.nn.Linear8bitLt) or _features(module)[0] % BLOCK == 0


def _features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear."""
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def scale_bytes(module: nn.Module) -> int:
    """Bytes of a bitsandbytes linear's scales, which are not parameters or buffers; 0 for other modules."""
    if type(module).__module__ != "bitsandbytes.nn.modules":
        return 0
    statistics = [getattr(module.weight, "SCB", None), getattr(getattr(module, "state", None), "SCB", None)]
    state = getattr(module.weight, "quant_state", None)
    statistics += [] if state is None else [state.absmax, state.code]
    return sum({id(t): t.nbytes for t in statistics if isinstance(t, torch.Tensor)}.values())


def _fill_int8(module: nn.Module, slices: RowSlices, device: torch.device) -> None:
    import bitsandbytes as bnb

    columns, count = _features(module)
    data = torch.empty((count, columns), dtype=torch.int8, device=device)
    scales = torch.empty(count, dtype=torch.float32, device=device)
    for first, rows in slices:
        part, scale, _ = bnb.functional.int8_vectorwise_quant(rows.to(device, torch.float16))
        data[first : first + len(rows)] = part
        scales[first : first + len(rows)] = scale
    weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scales)
    module.weight = weight


def _fill_nf4(module: nn.Module, slices: RowSlices, device: torch.device, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    columns, count = _features(module)
    numel = count * columns
    data = torch.empty((-(-numel // 2), 1), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // BLOCK), dtype=torch.float32, device=device)
    state = None
    for first, rows in slices:
        part, state = bnb.functional.quantize_4bit(
            rows.to(device, dtype).contiguous(), blocksize=BLOCK, quant_type="nf4"
        )
        start = first * columns
        data[start // 2 : start // 2 + len(part)] = part
        absmax[start // BLOCK : start // BLOCK + len(state.absmax)] = state.absmax
    assert state is not None, "a linear has rows"
    state.absmax, state.shape = absmax, torch.Size((count, columns))
    linear: Any = module  # of bitsandbytes, with more than nn.Linear has
    linear.weight = bnb.nn.Params4bit(
        data,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=False,
        quant_type="nf4",
        bnb_quantized=True,
        module=linear,
    )
    linear.quant_state = state
    linear.compute_dtype, linear.compute_type_is_set = dtype, True
