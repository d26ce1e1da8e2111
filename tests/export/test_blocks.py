"""Blocks of ggml's types, held to the gguf package's dequantizer: every integer, sign and group size."""

from __future__ import annotations

import gguf
import pytest
import torch

from lowmem.checkpoint.dequantize import PackedWeight
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import pack_rows, pack_zeros
from lowmem.config import BITS
from lowmem.export.blocks import LinearEncoder, decode, encode_dense, grid_facts, pack_blocks

INPUTS, OUTPUTS = 256, 32
LAYOUTS = [(bits, "gptq_p") for bits in BITS] + [
    (bits, layout) for bits in (8, 4, 3, 2) for layout in ("gptq", "gptq_v2")
]
SYMMETRIC = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
ASYMMETRIC = {2: "Q4_0", 3: "Q4_0", 4: "Q5_0", 5: "Q8_0", 6: "Q8_0", 7: "Q8_0", 8: None}


def packed(
    bits: int, group_size: int, zeros: str = "middle", layout: str = "gptq_v2"
) -> tuple[PackedWeight, torch.Tensor]:
    """Random integers of the whole range, and the weights that they stand for."""
    generator = torch.Generator().manual_seed(0)
    size = INPUTS if group_size == -1 else group_size
    groups = -(-INPUTS // size)
    q = torch.randint(0, 1 << bits, (INPUTS, OUTPUTS), generator=generator)
    q[:2] = torch.tensor([[0], [(1 << bits) - 1]])  # both ends of the range
    z = torch.full((groups, OUTPUTS), 1 << (bits - 1))
    if zeros == "any":
        z = torch.randint(1, 1 << bits, (groups, OUTPUTS), generator=generator)
        z[0, :2] = torch.tensor([1, (1 << bits) - 1])
    scales = (torch.randn(groups, OUTPUTS, generator=generator) * 0.02).half()  # of both signs
    g_idx = (torch.arange(INPUTS) // size).int()
    weight = ((q - z[g_idx.long()]).float() * scales.float()[g_idx.long()]).T
    format = LinearFormat(bits, group_size, sym=zeros == "middle", layout=layout)
    words = (pack_rows(q.to(torch.uint8), bits, layout), pack_zeros(z, bits, layout))
    return PackedWeight(format, *words, scales, g_idx), weight


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
@pytest.mark.parametrize("zeros", ["middle", "any"])
@pytest.mark.parametrize(("bits", "layout"), LAYOUTS)
def test_integers_and_scales_are_kept(bits, layout, zeros, group_size):
    linear, weight = packed(bits, group_size, zeros, layout)
    facts = grid_facts(linear)
    kind = (SYMMETRIC if zeros == "middle" else ASYMMETRIC)[bits]
    assert facts.block_type == kind and facts.exact == (kind is not None)
    if kind is None:
        assert facts.kind == "F16"
        return
    order = torch.randperm(OUTPUTS)
    found = LinearEncoder(linear, kind).encode(order)
    read = gguf.dequantize(found, gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(read), weight[order])
    assert torch.equal(decode(found.tobytes(), kind, (OUTPUTS, INPUTS)), weight[order])


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_blocks_are_those_of_ggmls_own_quantizer(kind):
    """gguf's quantizer, which gives llama.cpp's bytes, chooses d; its integers make the same blocks here."""
    values = torch.randn(4, 96).numpy()
    theirs = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    size = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}[kind]
    d = torch.from_numpy(theirs.reshape(4, 3, size)[:, :, :2].copy()).view(torch.float16).view(4, 3)
    weights = torch.from_numpy(gguf.dequantize(theirs, gguf.GGMLQuantizationType[kind]))
    integers = (weights.view(4, 3, 32) / d.float()[..., None]).round().to(torch.int16)
    assert (pack_blocks(integers, d, kind) == theirs).all()


@pytest.mark.parametrize("group_size", [16, 48])
def test_groups_of_other_than_whole_blocks_have_no_exact_type(group_size):
    facts = grid_facts(packed(4, group_size)[0])
    assert not facts.blocks and facts.block_type is None and not facts.exact and facts.kind == "Q8_0"


def test_columns_out_of_order_have_no_exact_type():
    linear, _ = packed(4, 64)
    linear.g_idx = linear.g_idx[torch.randperm(INPUTS, generator=torch.Generator().manual_seed(1))]
    assert grid_facts(linear).kind == "Q8_0" and not grid_facts(linear).exact


def test_whole_groups_in_another_order_fit():
    linear, _ = packed(4, 64)
    q_minus_zero = packed(4, 64)[1].view(OUTPUTS, 4, 64) / linear.scales.float().T[..., None]
    linear.g_idx = torch.tensor([2, 0, 3, 1], dtype=torch.int32).repeat_interleave(64)
    expected = q_minus_zero.round() * linear.scales.float().T[:, [2, 0, 3, 1], None]
    found = LinearEncoder(linear, "Q4_0").encode(torch.arange(OUTPUTS))
    assert torch.equal(decode(found.tobytes(), "Q4_0", (OUTPUTS, INPUTS)), expected.view(OUTPUTS, -1))


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float16, True), (torch.bfloat16, False)])
def test_scales_that_are_not_float16(dtype, exact):
    linear, _ = packed(4, 64)
    linear.scales = (torch.randn(4, OUTPUTS) * 1e-6).to(dtype)  # bfloat16 has a wider range
    assert grid_facts(linear).exact == exact and grid_facts(linear).block_type == "Q4_0"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_dense_tensors(kind):
    weight = torch.randn(3, 64)
    found = decode(encode_dense(weight, kind).tobytes(), kind, (3, 64))
    bound = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 2**-7}[kind]
    assert float((found - weight).abs().max()) <= bound * float(weight.abs().max())
