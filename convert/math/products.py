"""Large matrix products of the conversion.

On a CPU our own C library computes them, if it is compiled (lowmem/kernels/csrc/gemm): it can compute an
upper triangle only, takes transposed factors, and rounds factors to bfloat16 while it packs them. torch
computes them otherwise, and on GPUs.
"""

from __future__ import annotations

import ctypes

import torch

from lowmem.kernels.native import header
from lowmem.kernels.native import library as native

COLUMN_BLOCK = 1024
"""Columns of an upper triangle that torch computes at a time."""
FACTOR_BLOCK = 8192
"""Length of k in one product of torch."""
_TYPES = {torch.float32: header.F32, torch.bfloat16: header.BF16}


def name(device: torch.device) -> str:
    """Name the implementation of products: "torch", or the library's instruction set. Results depend on
    it.
    """
    if device.type != "cpu" or not native.available():
        return "torch"
    found: bytes = native.library().lm_gemm_name()
    return found.decode()


def ours(*tensors: torch.Tensor) -> bool:
    """Whether the library supports these tensors: on the CPU, in float32 or bfloat16."""
    return native.available() and all(
        t.device.type == "cpu" and t.dtype in _TYPES and t.layout == torch.strided for t in tensors
    )


def add_product(
    into: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    alpha: float = 1.0,
    rounded: bool = False,
    upper: bool = False,
) -> torch.Tensor:
    """into += alpha * a @ b; returns `into`.

    into: [m, n] with last stride 1; sums are in its dtype. a: [m, k] and b: [k, n], of any strides and float
    dtypes. rounded: the factors may be rounded to bfloat16 where that is faster (never for a float64 result).
    upper: compute only the elements on and above the diagonal of `into`.
    """
    if a.shape[1] == 0 or into.numel() == 0:
        return into
    if into.dtype == torch.float32 and into.stride(1) == 1 and ours(into, a, b):
        _check(into, a, b)
        arguments = header.LmGemm(
            into.shape[0], into.shape[1], a.shape[1], a.data_ptr(), b.data_ptr(), *a.stride(), *b.stride(),
            into.data_ptr(), into.stride(0), alpha, _TYPES[a.dtype], _TYPES[b.dtype], upper, rounded,
        )  # fmt: skip
        with native.running() as library:
            library.lm_gemm_run(ctypes.addressof(arguments), native.workspace(library.lm_gemm_workspace()))
        return into
    if not upper:
        for start in range(0, a.shape[1], FACTOR_BLOCK):  # a copy of a whole factor might not fit
            k = slice(start, start + FACTOR_BLOCK)
            into.addmm_(a[:, k].to(into.dtype), b[k].to(into.dtype), alpha=alpha)
        return into
    a, b = a.to(into.dtype), b.to(into.dtype)
    for start in range(0, into.shape[1], COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, into.shape[1])
        into[:start, start:end].addmm_(a[:start], b[:, start:end], alpha=alpha)
        corner = into[start:end, start:end]
        corner += (alpha * (a[start:end] @ b[:, start:end])).triu_()
    return into


def mirror(matrix: torch.Tensor, scale: float) -> None:
    """Scale the upper triangle of a square matrix and copy it to the lower one, in place."""
    if matrix.dtype == torch.float32 and matrix.is_contiguous() and ours(matrix):
        with native.running() as library:
            library.lm_mirror(matrix.data_ptr(), matrix.shape[0], matrix.stride(0), scale)
        return
    for start in range(0, matrix.shape[0], COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, matrix.shape[0])
        block = matrix[:end, start:end]
        block *= scale
        matrix[start:end, :start] = block[:start].T
        corner = block[start:end]
        corner.copy_(corner.triu() + corner.triu(1).T)


def permute(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """Permute rows and columns of a square matrix by `order`, in place."""
    n = matrix.shape[0]
    if matrix.dtype == torch.float32 and matrix.is_contiguous() and ours(matrix):
        order = order.to(torch.int64).contiguous()
        if not torch.equal(order.sort().values, torch.arange(n)):
            raise ValueError("not a permutation")
        with native.running() as library:
            space = native.workspace(4 * n)
            library.lm_permute(matrix.data_ptr(), n, matrix.stride(0), order.data_ptr(), space)
        return
    for start in range(0, n, COLUMN_BLOCK):
        columns = slice(start, start + COLUMN_BLOCK)
        matrix[:, columns] = matrix[:, columns][order]
    for start in range(0, n, COLUMN_BLOCK):
        rows = slice(start, start + COLUMN_BLOCK)
        matrix[rows] = matrix[rows][:, order]


def _check(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if (into.shape, a.shape[1]) != ((a.shape[0], b.shape[1]), b.shape[0]):
        raise ValueError(f"{list(a.shape)} times {list(b.shape)} into {list(into.shape)}")
