"""QuantLinear is the dense linear of its dequantized weight; the swap keeps the model's logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import pack_rows, pack_zeros
from lowmem.config import BITS
from lowmem.errors import SourceError
from lowmem.kernels.quant_linear import QuantLinear, swap_linears
from tests.helpers import tiny_model
from tests.rtn_helpers import Rtn, layer_linears, rtn


def filled(linear: QuantLinear, packed: Rtn, bias: torch.Tensor | None) -> QuantLinear:
    linear.qweight = pack_rows(packed.q, linear.bits)
    linear.qzeros = pack_zeros(packed.zeros, linear.bits)
    linear.scales, linear.g_idx = packed.scales, packed.g_idx
    linear.bias = bias
    return linear


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("bits", BITS)
def test_equals_the_dense_linear(bits: int, bias: bool, group_size: int) -> None:
    torch.manual_seed(bits)
    dense = nn.Linear(64, 96, bias=bias)
    packed = rtn(dense.weight, bits, group_size)
    dense.weight.data = packed.weight()
    linear = QuantLinear(64, 96, LinearFormat(bits, group_size), bias=bias, device="meta")
    shapes = {name: buffer.shape for name, buffer in linear.named_buffers()}
    filled(linear, packed, dense.bias.data if bias else None)
    assert {name: buffer.shape for name, buffer in linear.named_buffers()} == shapes
    assert set(linear.state_dict()) == {"qweight", "qzeros", "scales", "g_idx"} | (
        {"bias"} if bias else set()
    )
    assert torch.equal(linear.dequantize(), dense.weight)
    x = torch.randn(3, 7, 64)
    torch.testing.assert_close(linear(x), dense(x))
    assert linear(x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "gpt_bigcode_mha", "llama", "starcoder2"])
def test_swapped_model_has_the_logits_of_the_dequantized_one(kind: str) -> None:
    dense, swapped = tiny_model(kind, vocab=512), tiny_model(kind, vocab=512)
    linears = layer_linears(dense)
    swap_linears(swapped, dict.fromkeys(linears, LinearFormat(bits=4, group_size=32)))
    for name, linear in linears.items():
        packed = rtn(linear.weight, 4, 32)
        bias = None if linear.bias is None else linear.bias.data
        linear.weight.data = packed.weight()
        filled(swapped.get_submodule(name), packed, bias)
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, got = dense(ids).logits, swapped(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1  # logits that say something


def test_swap_refuses_what_is_no_linear() -> None:
    model = tiny_model("llama", vocab=512)
    for name in ("model.embed_tokens", "model.layers.9.mlp.up_proj"):
        with pytest.raises(SourceError, match=name):
            swap_linears(model, {name: LinearFormat(bits=4, group_size=32)})
    odd = nn.Sequential(nn.Linear(33, 64))
    with pytest.raises(SourceError, match="whole words"):
        swap_linears(odd, {"0": LinearFormat(bits=4, group_size=32)})
