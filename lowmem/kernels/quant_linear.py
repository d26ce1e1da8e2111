"""A linear whose weight stays packed, and its replacement for a model's nn.Linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lowmem.checkpoint.dequantize import dequantize
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import rows_in_order, stored_shapes
from lowmem.checkpoint.source.mapped import forget_pages, is_mapped
from lowmem.errors import SourceError
from lowmem.kernels import reference
from lowmem.kernels.contract import Unsuitable
from lowmem.kernels.native import linear as native_linear

_TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias", "order")


class QuantLinear(nn.Module):
    """x [..., in] → [..., out] with a GPTQ weight; the output has x's dtype.

    Buffers: qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales
    [groups, out] (float16 on disk, kept as it is stored), g_idx int32 [in], and bias [out] or None.
    g_idx is kept because act-order checkpoints of other tools do not have their groups side by side.

    The reference multiplies until `use_native`, and again once a tensor has been replaced.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None
    order: torch.Tensor | None
    """The order of qweight's rows (position → input) once `use_native` has sorted them by group."""
    packed: native_linear.Packed | None
    """The weight as our own kernels read it, while they are used."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: LinearFormat,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        """Empty buffers on `device`. dtype: of the bias. Raises ValueError when words would not be full."""
        super().__init__()
        shapes = stored_shapes(in_features, out_features, format.bits, format.group_size)
        self.in_features = in_features
        self.out_features = out_features
        self.format = format
        self.register_buffer("qweight", torch.empty(shapes.qweight, dtype=torch.int32, device=device))
        self.register_buffer("qzeros", torch.empty(shapes.qzeros, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.empty(shapes.scales, dtype=torch.float16, device=device))
        self.register_buffer("g_idx", torch.empty(shapes.g_idx, dtype=torch.int32, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self.register_buffer("order", None, persistent=False)
        self.packed = None

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return self.format.bits

    @property
    def row_invariant(self) -> bool:
        """Whether a row of the output has the same bits whatever other rows are multiplied with it."""
        return self.packed is not None

    def use_native(self, activation_bits: int | None = None) -> None:
        """Multiply with our own kernels from now on (native/linear.py); all tensors must be in place.

        activation_bits: bits of the integer that a 16-bit activation becomes, one of
        native_linear.ACTIVATION_BITS; None chooses by the width of the weight. Weights of
        more than 4 bits take 12 as 16.

        An act-order weight of another tool, with scattered groups, gets its rows sorted by group in memory of
        its own, and a weight of 3 bits in planes a copy in the tiled layout. Raises Unsuitable, and changes
        nothing, when the kernels cannot take the weight.
        """
        if self.qweight.device.type != "cpu":
            raise Unsuitable("its tensors are not on the CPU")
        order = native_linear.groups_of(self.g_idx, self.scales.shape[0]).order
        if order is not None:
            self.qweight = rows_in_order(self.qweight, self.bits, self.format.layout, order)
            self.g_idx = self.g_idx[order]
            self.order = order if self.order is None else self.order[order]
        packed = native_linear.Packed.of(self)
        if activation_bits is not None:
            packed.planes = native_linear.planes_of(activation_bits)
        if packed.struct.tiled and is_mapped(self.qweight):
            forget_pages(self.qweight)
        self.packed = packed

    @property
    def in_file_order(self) -> bool:
        """Whether the kernels read the weight from its file, so that `use_tiled_layout` has work to do."""
        return self.packed is not None and not self.packed.struct.tiled and is_mapped(self.qweight)

    def use_tiled_layout(self) -> bool:
        """Copy the weight into the tiled layout that the kernels read fastest; returns whether it did.

        Only where qweight is mapped from its file: pages of the file are dropped as the copy grows, and are
        read again when someone uses qweight, so that the weight is not in memory twice.
        """
        if self.packed is None or not self.in_file_order:
            return False
        self.packed.to_tiled()
        forget_pages(self.qweight)
        return True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.packed is not None and native_linear.takes(x):
            return native_linear.linear(self.packed, x)
        return reference.linear(x, self)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in]."""
        weight = dequantize(self, dtype)
        return weight if self.order is None else weight[:, self.order.argsort()]

    def __setattr__(self, name: str, value: Any) -> None:
        """Replacing a tensor ends the use of our kernels, which point into the old one."""
        if name in _TENSORS:
            self.__dict__["packed"] = None
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantLinear:
        self.packed = None  # its tensors are moved or cast
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Without the pointers, which are wrong in a copy."""
        return {**self.__dict__, "packed": None}

    def extra_repr(self) -> str:
        """The arguments, as nn.Linear prints its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"format={self.format.label}, bias={self.bias is not None}"
        )


def swap_linears(model: nn.Module, formats: Mapping[str, LinearFormat]) -> None:
    """Replace each nn.Linear that `formats` names by a QuantLinear of that format, on the meta device.

    Raises SourceError for a name that is not an nn.Linear of the model, or a linear that cannot be packed.
    """
    modules = dict(model.named_modules())
    for name, format in formats.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise SourceError(
                f"the checkpoint has a quantized weight for {name}, which is not a linear of this model",
                "The config.json and the weights are not of the same model",
            )
        try:
            quantized = QuantLinear(
                linear.in_features,
                linear.out_features,
                format,
                bias=linear.bias is not None,
                device="meta",
                dtype=linear.weight.dtype,
            )
        except ValueError as error:
            raise SourceError(f"{name}: {error}", "The quantization_config does not fit the model") from None
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, quantized)
