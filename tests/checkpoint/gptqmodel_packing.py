"""Reference data: integers packed by GPTQModel, and words unpacked by it."""

from __future__ import annotations

from typing import Any

import torch

from lowmem.checkpoint.formats import layout_for
from lowmem.config import BITS


def packing_cases() -> list[dict[str, Any]]:
    """One a width and layout: integers q [64, 96] in groups of 32, zero-points, scales, g_idx; and any words.

    Every width in the layout that lowmem writes, and 3 and 4 bits in the planar one.
    """
    generator = torch.Generator().manual_seed(0)
    cases = []
    for bits, layout in [(bits, layout_for((bits,))) for bits in BITS] + [(3, "gptq_p"), (4, "gptq_p")]:
        q = torch.randint(0, 1 << bits, (64, 96), generator=generator, dtype=torch.uint8)
        zeros = torch.randint(1, 1 << bits, (2, 96), generator=generator)
        scales = (torch.rand(2, 96, generator=generator) + 0.5).half()
        g_idx = torch.randint(0, 2, (64,), generator=generator)
        random_words = torch.randint(-(2**31), 2**31, (2, 96 * bits // 32), generator=generator).int()
        cases.append(
            {
                "bits": bits,
                "layout": layout,
                "q": q,
                "zeros": zeros,
                "scales": scales,
                "g_idx": g_idx,
                "random_words": random_words,
            }
        )
    return cases


def through_gptqmodel(case: dict[str, Any]) -> dict[str, Any]:
    """The case with GPTQModel's "qweight", "qzeros", "weight" and "random_zeros". Imports GPTQModel, which
    patches transformers and sets global state: call it in a process of its own."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import (
        convert_gptq_v1_to_v2_format_module,
        convert_gptq_v2_to_v1_format_module,
    )

    bits, q, zeros, scales, g_idx = (case[name] for name in ("bits", "q", "zeros", "scales", "g_idx"))
    n_in, n_out = q.shape
    linear = torch.nn.Linear(n_in, n_out, bias=False)
    linear.weight.data = ((q.long() - zeros[g_idx]).float() * scales.float()[g_idx]).T.contiguous()

    def module() -> Any:
        return TorchLinear(
            bits=bits, group_size=32, sym=False, desc_act=False, in_features=n_in, out_features=n_out,
            bias=False, pack_dtype=torch.int32, register_buffers=True, format=case["layout"],
        )  # fmt: skip

    m = module()
    m.pack_original(linear, scales.float().T.contiguous(), zeros.int().T.contiguous(), g_idx.int())
    m.qzero_format(format=2)
    v1 = case["layout"] == "gptq"
    if v1:
        convert_gptq_v2_to_v1_format_module(m, QuantizeConfig(bits=bits, group_size=32, sym=False))
    found = {"qweight": m.qweight.clone(), "qzeros": m.qzeros.clone()}
    if v1:
        convert_gptq_v1_to_v2_format_module(m, bits=bits, pack_dtype=torch.int32)
    m.post_init()
    found["weight"] = m.dequantize_weight().clone()
    m = module()  # any words at all as zero-points, full fields too
    m.qzeros = case["random_words"].clone()
    if v1:
        convert_gptq_v1_to_v2_format_module(m, bits=bits, pack_dtype=torch.int32)
    m.qweight = torch.zeros_like(m.qweight)
    m.scales = torch.ones_like(m.scales)
    m.g_idx = torch.arange(n_in, dtype=torch.int32) // 32
    m.post_init()
    found["random_zeros"] = -m.dequantize_weight().clone()[::32]
    return {**case, **found}
