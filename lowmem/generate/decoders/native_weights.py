"""A model's tensors as the C library reads them, each checked before its address is taken."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

from lowmem.generate.decoders.contract import DecoderRefused
from lowmem.kernels.native import header
from lowmem.kernels.native import library as native
from lowmem.kernels.native.header import LmNorm, LmWeight
from lowmem.kernels.native.linear import Packed
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.kernels.quantized_tables import QuantizedEmbedding, QuantizedHead, QuantizedTable
from lowmem.kernels.stored_embeddings import StoredEmbedding, StoredHead

MAX_ROWS = 512
"""The most rows of a forward: they need about five float32 rows of the hidden size and two of the MLP's."""


class Weights:
    """Addresses of a model's tensors.

    Every method raises DecoderRefused for a tensor that the library cannot read. Holds every
    tensor and structure that the library gets a pointer to.
    """

    def __init__(self, rms_norm: type[nn.Module] | None = None) -> None:
        """rms_norm: the model's class of RMSNorm, with `weight` and `variance_epsilon`."""
        self._rms_norm = rms_norm
        self._keep: list[Any] = []
        self.tokens: QuantizedTable | None = None
        """Where token ids are looked up, if the embedding is quantized."""
        self.fed: torch.Tensor | None = None
        """Then the rows of a forward's ids, which the library reads in place of the embedding."""
        self.packed = True
        """Whether every linear of the layers is packed, so that many rows are as fast as a prompt needs."""

    def tensor(
        self, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
    ) -> int:
        """The address of a contiguous tensor of this shape and dtype."""
        if (
            tensor is None
            or tuple(tensor.shape) != shape
            or tensor.dtype is not dtype
            or tensor.device.type != "cpu"
            or not tensor.is_contiguous()
            or tensor.data_ptr() % dtype.itemsize
        ):
            found = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            needed = str(dtype).removeprefix("torch.")
            raise DecoderRefused(f"a {needed} tensor of {list(shape)} is needed, not {found}")
        self._keep.append(tensor)
        return tensor.data_ptr()

    def embedding(self, embedding: Any, shape: tuple[int, ...]) -> int:
        """The address of the rows that tokens are looked up in."""
        if not isinstance(embedding, QuantizedEmbedding):
            return self.table(embedding, shape)
        if embedding.own is not None:
            raise DecoderRefused(f"an embedding is {type(embedding.own).__name__}")
        self.tokens = embedding.table
        self.fed = torch.zeros((MAX_ROWS, shape[1]), dtype=stored_dtype(embedding))
        return self.fed.data_ptr()

    def table(self, table: Any, shape: tuple[int, ...]) -> int:
        """The address of an embedding's weight."""
        if type(table) not in (nn.Embedding, StoredEmbedding):
            raise DecoderRefused(f"an embedding is {type(table).__name__}")
        return self.tensor(table.weight, shape, stored_dtype(table))

    def norm(self, norm: Any, size: int) -> LmNorm:
        """A LayerNorm or the model's RMSNorm of `size` values."""
        if type(norm) is nn.LayerNorm:
            bias = None if norm.bias is None else self.tensor(norm.bias, (size,))
            return LmNorm(self.tensor(norm.weight, (size,)), bias, norm.eps, 1)
        if self._rms_norm is None or type(norm) is not self._rms_norm:
            raise DecoderRefused(f"a norm is {type(norm).__name__}")
        return LmNorm(self.tensor(norm.weight, (size,)), None, norm.variance_epsilon, 0)  # type: ignore[arg-type]

    def linear(self, linear: Any, inputs: int, outputs: int) -> LmWeight:
        """A linear of a layer."""
        self.packed &= isinstance(linear, QuantLinear)
        return self.head(linear, inputs, outputs)

    def head(self, linear: Any, inputs: int, outputs: int) -> LmWeight:
        """A linear, packed or of 16 bits."""
        if isinstance(linear, QuantLinear):
            return self._packed(None if linear.order is not None else linear.packed, inputs, outputs)
        if isinstance(linear, QuantizedHead):
            return self._packed(linear.packed, inputs, outputs)
        if type(linear) not in (nn.Linear, StoredHead):
            raise DecoderRefused(f"a linear is {type(linear).__name__}")
        dtype = stored_dtype(linear)
        weight = self.tensor(linear.weight, (outputs, inputs), dtype)
        bias = None if linear.bias is None else self.tensor(linear.bias, (outputs,))
        dense = header.LmDense(
            inputs, outputs, weight, bias, native.TYPES[torch.bfloat16], native.TYPES[dtype]
        )
        self._keep.append(dense)
        return LmWeight(None, ctypes.addressof(dense), 0)

    def _packed(self, packed: Packed | None, inputs: int, outputs: int) -> LmWeight:
        if packed is None:
            raise DecoderRefused("a packed linear is not in the layout of the native kernels")
        if (packed.in_features, packed.out_features) != (inputs, outputs):
            raise DecoderRefused(f"a packed linear of {packed.in_features} to {packed.out_features}")
        self._keep.append(packed)
        return LmWeight(packed.address, None, packed.planes)


def stored_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that an embedding's or a linear's weight must have, or that its rows are looked up in.

    float16 holds products of an 8-bit integer and a float16 scale to 11 bits, bfloat16 to 8.
    """
    in_float16 = isinstance(module, StoredEmbedding | StoredHead | QuantizedEmbedding)
    return torch.float16 if in_float16 else torch.bfloat16
