"""Tiny multiplications: every kernel that could be used on a device, against what it must compute."""

from __future__ import annotations

import torch
from torch import nn

from lowmem.checkpoint.manifest import GptqFormat
from lowmem.checkpoint.packing import unpack_rows, unpack_zeros
from lowmem.config import BITS
from lowmem.doctor.report import Check, Checks, guarded
from lowmem.kernels import bnb, dispatch, reference
from lowmem.kernels.cuda import sample_linear

_GROUP_SIZE = 128  # that of most checkpoints
# Relative errors of one linear: int8 rounds weights and activations to 256 levels, NF4 weights to 16.
_BNB_TOLERANCES: dict[bnb.Method, float] = {"int8": 0.03, "nf4": 0.15}


def kernel_checks(device: torch.device, dtype: torch.dtype) -> Checks:
    """The reference and the chosen kernel for each width, then bitsandbytes, all on `device`."""
    area = f"kernels on {device}"
    yield guarded(area, "reference", lambda: reference_works(device), "Install torch again")
    for bits in BITS:
        yield guarded(area, f"{bits}-bit GPTQ", lambda bits=bits: chosen(area, bits, device, dtype))  # type: ignore[misc]
    for method in ("int8", "nf4"):
        yield guarded(
            area,
            f"bitsandbytes {method}",
            lambda method=method: bnb_works(method, device, dtype),  # type: ignore[misc]
            "A 16-bit model cannot be quantized while it loads: convert it, or install bitsandbytes again",
            "warning",
        )


def reference_works(device: torch.device) -> str:
    """Our plain kernel against float64 arithmetic, at every width, negative scales included.

    Raises RuntimeError when it differs.
    """
    worst = 0.0
    for bits in BITS:
        for sym in (True, False):
            linear = sample_linear(GptqFormat(bits, 32, sym), device, torch.float32)
            rows = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(bits))
            got = reference.linear(
                rows.to(device), linear.qweight, linear.qzeros, linear.scales, linear.g_idx, bits, linear.bias
            )
            values = unpack_rows(linear.qweight.cpu(), bits).double()
            groups = linear.g_idx.cpu().long()
            zeros = unpack_zeros(linear.qzeros.cpu(), bits).double()[groups]
            weight = (values - zeros) * linear.scales.cpu().double()[groups]
            assert linear.bias is not None
            right = rows.double() @ weight + linear.bias.cpu().double()
            worst = max(worst, float((got.cpu().double() - right).norm() / right.norm()))
    if not worst < 1e-3:
        raise RuntimeError(f"8, 4, 3 and 2 bits: differs from float64 by {worst:.1g}")
    return f"8, 4, 3 and 2 bits: equal to float64 arithmetic within {worst:.0e}"


def chosen(area: str, bits: int, device: torch.device, dtype: torch.dtype) -> Check:
    """Which kernel `lowmem run` uses for a width, and why not another."""
    format = GptqFormat(bits, _GROUP_SIZE)
    choice = dispatch.choose_kernel(device, format, dtype)
    why = "; ".join(f"not {over}" for over in choice.passed_over)
    detail = f"{choice.name}, {choice.reason}" + (f" ({why})" if why else "")
    if device.type == "cuda" and choice.name == dispatch.REFERENCE:
        advice = "It works, slowly: see the lines on nvcc, the C compiler and gptqmodel"
        return Check(area, f"{bits}-bit GPTQ", "warning", detail, advice)
    return Check(area, f"{bits}-bit GPTQ", "ok", detail)


def bnb_works(method: bnb.Method, device: torch.device, dtype: torch.dtype) -> str:
    """A linear that bitsandbytes quantizes, against the dense one. Raises RuntimeError when it differs."""
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(256, 128)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(128, 256, generator=generator) / 16)
        assert dense.bias is not None
        dense.bias.zero_()
        linear = bnb.empty_linear(method, dense)
        bnb.quantize_into(linear, iter([(0, dense.weight.to(dtype))]), device, dtype)
        linear.bias = nn.Parameter(dense.bias.to(device, dtype), requires_grad=False)
        linear.eval()
        rows = torch.randn(4, 256, generator=generator)
        got, right = linear(rows.to(device, dtype)).float().cpu(), dense(rows)
    error = float((got - right).norm() / right.norm())
    if not error < _BNB_TOLERANCES[method]:
        raise RuntimeError(f"differs from the dense linear by {error:.2g} of its norm")
    return f"within {error:.1%} of the dense linear"
