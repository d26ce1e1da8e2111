"""A linear whose weight stays packed, and the swap of a model's nn.Linear for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lowmem.checkpoint.manifest import GptqFormat
from lowmem.checkpoint.packing import stored_shapes
from lowmem.errors import SourceError
from lowmem.kernels import reference


class QuantLinear(nn.Module):
    """x [..., in] → [..., out] with a GPTQ weight; the output has x's dtype.

    Buffers: qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales
    [groups, out] (float16 on disk, kept as it is stored), g_idx int32 [in], and bias [out] or None.
    g_idx is kept because act-order checkpoints of other tools do not have their groups side by side.
    zeros_v2: `qzeros` holds the zero-points as they are, not one less.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        bias: bool,
        zeros_v2: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        """Empty buffers on `device`; raises ValueError when the features do not fill whole words."""
        super().__init__()
        shapes = stored_shapes(in_features, out_features, bits, group_size)
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.zeros_v2 = zeros_v2
        self.register_buffer("qweight", torch.empty(shapes.qweight, dtype=torch.int32, device=device))
        self.register_buffer("qzeros", torch.empty(shapes.qzeros, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.empty(shapes.scales, dtype=torch.float16, device=device))
        self.register_buffer("g_idx", torch.empty(shapes.g_idx, dtype=torch.int32, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]."""
        return reference.linear(
            x, self.qweight, self.qzeros, self.scales, self.g_idx, self.bits, self.bias, v2=self.zeros_v2
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in] that the packed integers stand for."""
        return reference.dequantize(
            self.qweight, self.qzeros, self.scales, self.g_idx, self.bits, dtype, v2=self.zeros_v2
        )

    def extra_repr(self) -> str:
        """in, out, bits and group size, as nn.Linear prints its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, group_size={self.group_size}, bias={self.bias is not None}"
        )


def swap_linears(model: nn.Module, names: Iterable[str], format: GptqFormat) -> None:
    """Put a QuantLinear on the meta device in the place of each named nn.Linear, in the model itself.

    Raises SourceError for a name that is no nn.Linear of the model, or a linear that cannot be packed.
    """
    modules = dict(model.named_modules())
    for name in names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise SourceError(
                f"the checkpoint has a quantized weight for {name}, which is no linear of this model",
                "The config.json and the weights are not of the same model",
            )
        try:
            quantized = QuantLinear(
                linear.in_features,
                linear.out_features,
                bits=format.bits,
                group_size=format.group_size,
                bias=linear.bias is not None,
                zeros_v2=format.zeros_v2,
                device="meta",
                dtype=linear.weight.dtype,
            )
        except ValueError as error:
            raise SourceError(f"{name}: {error}", "The quantization_config does not fit the model") from None
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, quantized)
