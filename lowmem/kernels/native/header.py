"""The C interface of csrc/ in Python: constants, structures and functions.

A constant is its C name without LM_; a structure is its C name in camel case.
tests/kernels/test_native_header.py compares everything here with the headers. After a change there, raise
LM_CONTRACT in csrc/lowmem.h and CONTRACT here.
"""

from __future__ import annotations

import ctypes
from typing import Any

CONTRACT = 8

F32, F16, BF16 = 0, 1, 2

WIDTHS = (8, 7, 6, 5, 4, 3, 2)
"""Bits of a packed weight that the kernels support."""
TILE_OUTPUTS = 64
"""Outputs of a tile of the tiled layout."""
DECODE_ROWS = 16
"""Rows of a decode step, at most."""
PAIRED = 4
"""As `planes`: one plane and a half."""
GELU, GELU_TANH, SILU = 0, 1, 2
ROUND_MOST = 256
"""Columns of a block that is rounded, at most."""
RANGES_MOST = 16
"""Ranges that are tried for a grid, at most."""

TYPES: dict[str, Any] = {
    "void": None,
    "char*": ctypes.c_char_p,
    "pointer": ctypes.c_void_p,
    "int": ctypes.c_int,
    "int16": ctypes.c_int16,
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
    "size": ctypes.c_size_t,
    "float": ctypes.c_float,
}


def _fields(*groups: str | tuple[str, Any]) -> list[tuple[str, Any]]:
    """The fields of a structure: "type name ...", or a name and a ctypes type."""
    fields: list[tuple[str, Any]] = []
    for group in groups:
        if isinstance(group, str):
            kind, *names = group.split()
            fields.extend((name, TYPES[kind]) for name in names)
        else:
            fields.append(group)
    return fields


class LmMatrix(ctypes.Structure):
    """Rows of numbers."""

    _fields_ = _fields("pointer values", "int64 rows stride", "int32 type")


class LmPacked(ctypes.Structure):
    """A GPTQ weight."""

    _fields_ = _fields(
        "int32 bits group",
        "int64 inputs outputs",
        "pointer qweight scales zeros bias",
        "int32 scales_type bias_type tiled",
    )


class LmDense(ctypes.Structure):
    """A dense weight of 16 bits."""

    _fields_ = _fields("int64 inputs outputs", "pointer weight bias", "int32 bias_type weight_type")


class LmKv(ctypes.Structure):
    """The keys and values of one decoder layer and one sequence."""

    _fields_ = _fields("int64 heads kv_heads size capacity", "pointer keys values")


class LmQuery(ctypes.Structure):
    """The queries of the last rows of a sequence."""

    _fields_ = _fields("pointer values", "int64 row_stride head_stride rows length", "float scaling")


class LmWeight(ctypes.Structure):
    """A linear of a decode step, packed or dense."""

    _fields_ = _fields("pointer packed dense", "int64 planes")


class LmNorm(ctypes.Structure):
    """A norm of a decode step, or none."""

    _fields_ = _fields("pointer weight bias", "float epsilon", "int32 centred")


class LmLayer(ctypes.Structure):
    """A decoder layer of a decode step."""

    _fields_ = _fields(
        *((name, LmNorm) for name in ("ln_1", "ln_2", "q_norm", "k_norm")),
        *((name, LmWeight) for name in ("q", "k", "v", "attn_proj", "gate", "up", "mlp_proj")),
        "pointer keys values",
    )


class LmModel(ctypes.Structure):
    """A model of a decode step."""

    _fields_ = _fields(
        "int64 layers embd heads kv_heads size inner vocab capacity rotary",
        "int32 interleaved activation",
        "float scaling embedding_scale residual_scale head_scale",
        "int16 wte_type wpe_type",
        "pointer wte wpe cosines sines",
        ("ln_f", LmNorm),
        ("head", LmWeight),
        ("layer", ctypes.POINTER(LmLayer)),
    )


class LmFeed(ctypes.Structure):
    """The tokens of one sequence that a step appends."""

    _fields_ = _fields("int64 slot length rows wanted")


class LmGemm(ctypes.Structure):
    """A matrix product of the converter."""

    _fields_ = _fields(
        "int64 m n k",
        "pointer a b",
        "int64 a_row a_column b_row b_column",
        "pointer c",
        "int64 c_row",
        "float alpha",
        "int32 a_type b_type upper bf16",
    )


class LmRound(ctypes.Structure):
    """A column block that the converter rounds."""

    _fields_ = _fields(
        "int64 columns width out",
        "pointer error residual r codes scales zeros",
        "int64 error_row residual_row r_row codes_row grid_row",
        ("ranges", ctypes.c_float * RANGES_MOST),
        "int32 ranges_count maxq sym search passes",
    )


class LmTrain(ctypes.Structure):
    """A step of training the integers of a weight."""

    _fields_ = _fields(
        "int64 inputs width out",
        "pointer slope z fraction scales zeros scale_slope rows columns",
        "float keep rate most",
        "int32 maxq slope_type",
    )


FUNCTIONS = {
    "lm_contract": "int",
    "lm_set_threads": "void int pointer",
    "lm_threads": "int",
    "lm_isa_name": "char*",
    "lm_use_isa": "int char*",
    "lm_isa_at": "char* int",
    "lm_read": "uint64 pointer size",
    "lm_tell_bus_errors": "int char* int",
    "lm_has_width": "int int",
    "lm_kernel_group": "int32 int32",
    "lm_linear_workspace": "size pointer int64 int",
    "lm_linear": "void pointer pointer int pointer pointer",
    "lm_dense_linear": "void pointer pointer pointer pointer",
    "lm_tile_weight": "void pointer pointer pointer pointer",
    "lm_tile_planes": "void pointer pointer pointer pointer",
    "lm_prompt_attention_workspace": "size pointer int64",
    "lm_prompt_attention": "void pointer pointer pointer pointer",
    "lm_forward_workspace": "size pointer pointer int64",
    "lm_forward": "void pointer pointer int64 pointer pointer pointer",
    "lm_gemm_workspace": "size",
    "lm_gemm_run": "void pointer pointer",
    "lm_gemm_name": "char*",
    "lm_mirror": "void pointer int64 int64 float",
    "lm_permute": "void pointer int64 int64 pointer pointer",
    "lm_round_workspace": "size",
    "lm_round_run": "void pointer pointer",
    "lm_train_workspace": "size pointer",
    "lm_train_run": "void pointer pointer",
}
"""The exported functions: their results and parameters, as in TYPES."""


def declare(library: ctypes.CDLL) -> None:
    """Declare all functions.

    Raises AttributeError if one is missing, OSError if the contract differs or the library lacks a width.
    """
    for name, signature in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, *function.argtypes = (TYPES[kind] for kind in signature.split())
    if library.lm_contract() != CONTRACT or not all(map(library.lm_has_width, WIDTHS)):
        raise OSError("it was compiled from another version of lowmem")
