"""Small products with every kernel of a device, compared with float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from lowmem.cards.find import is_card
from lowmem.checkpoint.dequantize import PackedWeight
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import unpack_rows, unpack_zeros
from lowmem.config import BITS
from lowmem.doctor.report import Check, Checks, guarded
from lowmem.kernels import bitsandbytes as bnb
from lowmem.kernels import dispatch, reference
from lowmem.kernels.card_timing import product_seconds
from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.native import library as native
from lowmem.kernels.native import linear as native_linear
from lowmem.kernels.native.header import WIDTHS
from lowmem.kernels.registry import BitsAndBytes
from lowmem.kernels.trial import by_speed, large_sample, sample_linear, sample_spec

_GROUP_SIZE = 128  # of most checkpoints
_DENSE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""The error allowed in torch's own products, relative to the result; a card may round float32 to TF32."""
_LARGEST = LinearSpec(6144, 24576)
"""The shape of StarChat Alpha's largest linear."""


def kernel_checks(device: torch.device, dtype: torch.dtype) -> Checks:
    """The reference and the chosen kernel for each width, then bitsandbytes, all on `device`."""
    area = f"kernels on {device}"
    yield guarded(area, "reference", lambda: reference_works(device), "Install torch again")
    advice = "Answers would be wrong: type lowmem run --dtype float32, or install another version of torch"
    with warnings.catch_warnings():  # torch prints a traceback where a CPU lacks instructions for 16 bits
        warnings.simplefilter("ignore")
        check = guarded(area, "torch's products", lambda: dense_works(device, dtype), advice)
    yield check
    if device.type == "cpu":
        advice = "Install lowmem again; until then, set LOWMEM_CPU_KERNEL=reference"
        yield guarded(area, "own kernels", lambda: native_works(area), advice)
    for bits in BITS:
        yield guarded(area, f"{bits}-bit GPTQ", lambda bits=bits: chosen(area, bits, device, dtype))  # type: ignore[misc]
    for method in ("int8", "nf4"):
        yield guarded(
            area,
            f"bitsandbytes {method}",
            lambda method=method: bnb_works(method, device, dtype),  # type: ignore[misc]
            "int8 and NF4 are not available: convert models instead, or install bitsandbytes again",
            "warning",
        )


def reference_works(device: torch.device) -> str:
    """Compare the reference kernel with float64 at every width. Raises RuntimeError when it differs."""
    worst = 0.0
    for bits in BITS:
        for sym in (True, False):
            linear = sample_linear(sample_spec(LinearFormat(bits, 32, sym)), device)
            rows = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(bits))
            got = reference.linear(rows.to(device), linear)
            worst = max(worst, _error(got, linear, rows))
    if not worst < 1e-3:
        raise RuntimeError(f"{_listed(BITS)}: differs from float64 by {worst:.1g}")
    return f"{_listed(BITS)}: equal to float64 arithmetic within {worst:.0e}"


def dense_works(device: torch.device, dtype: torch.dtype) -> str:
    """Compare torch's linear and attention in `dtype` with float32 on the CPU, at sizes with remainders.

    Raises RuntimeError when they differ.
    """
    generator = torch.Generator().manual_seed(0)

    def sample(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).float()

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype)

    worst = 0.0
    for count, outputs in ((1, 80), (3, 96), (33, 80)):
        rows, weight = sample(count, 64), sample(outputs, 64)
        q, k, v = (sample(1, 2, count, 64) for _ in range(3))
        linear = functional.linear(there(rows), there(weight))
        attended = functional.scaled_dot_product_attention(there(q), there(k), there(v), is_causal=True)
        exact = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        for got, right in ((linear, rows @ weight.T), (attended, exact)):
            worst = max(worst, _norm(got.float().cpu() - right) / _norm(right))
    name = str(dtype).removeprefix("torch.")
    if not worst < _DENSE[dtype]:
        raise RuntimeError(f"{name}: differs from float32 by {worst:.2g} of its norm")
    return f"{name}: equal to float32 within {worst:.0e}"


def _norm(values: torch.Tensor) -> float:
    """Infinite for values that are not finite: max() drops NaN."""
    return float(torch.nan_to_num(values.norm(), nan=torch.inf))


def native_works(area: str) -> Check | str:
    """Compare lowmem's C kernels with float64: every width, for one row, a few rows and a prefill.

    Raises RuntimeError when they differ. Returns a warning where they are not compiled.
    """
    if not native.available():
        missing, _, advice = native.why_not().partition(": ")
        return Check(area, "own kernels", "warning", missing, advice[:1].upper() + advice[1:])
    worst = 0.0
    for bits in WIDTHS:
        for sym in (True, False):
            spec = sample_spec(LinearFormat(bits, _GROUP_SIZE, sym))
            linear = sample_linear(spec, torch.device("cpu"))
            packed = native_linear.Packed.of(linear)
            for count in (1, 4, 40):
                rows = torch.randn(count, linear.in_features, generator=torch.Generator().manual_seed(bits))
                worst = max(worst, _error(native_linear.linear(packed, rows), linear, rows))
    if not worst < 1e-5:
        raise RuntimeError(f"{native.isa_name()}: differs from float64 by {worst:.1g}")
    threads = "torch's" if native.threads_are_torchs() else "own"
    return (
        f"{native.isa_name()}, {torch.get_num_threads()} threads, {threads}; {_listed(WIDTHS)}: "
        f"equal to float64 arithmetic within {worst:.0e}"
    )


def _listed(widths: Sequence[int]) -> str:
    """As "8, 4, 3 and 2 bits"."""
    return ", ".join(str(bits) for bits in widths[:-1]) + f" and {widths[-1]} bits"


def _error(got: torch.Tensor, linear: PackedWeight, rows: torch.Tensor) -> float:
    """Relative error in the 2-norm, against rows @ weight in float64."""
    groups = linear.g_idx.cpu().long()
    bits, layout = linear.bits, linear.format.layout
    zeros = unpack_zeros(linear.qzeros.cpu(), bits, layout).double()[groups]
    weight = (unpack_rows(linear.qweight.cpu(), bits, layout) - zeros) * linear.scales.cpu().double()[groups]
    assert linear.bias is not None
    right = rows.double() @ weight + linear.bias.cpu().double()
    return float((got.cpu().double() - right).norm() / right.norm())


def chosen(area: str, bits: int, device: torch.device, dtype: torch.dtype) -> Check:
    """The kernel that `lowmem run` uses for a width, and why better ones are not used."""
    format = LinearFormat(bits, _GROUP_SIZE)
    choice = dispatch.choose_kernel(device, format, dtype)
    why = "; ".join(f"not {over}" for over in choice.passed_over)
    detail = f"{choice.name}, {choice.reason}" + (f" ({why})" if why else "")
    if is_card(device) and choice.name == dispatch.REFERENCE:
        advice = "It works, but slowly: see the lines on the card and the C compiler"
        return Check(area, f"{bits}-bit GPTQ", "warning", detail, advice)
    return Check(area, f"{bits}-bit GPTQ", "ok", detail)


def pace(
    bits: int,
    device: torch.device,
    dtype: torch.dtype,
    rate: float,
    *,
    spec: LinearSpec = _LARGEST,
    seconds: Callable[[nn.Module, torch.Tensor], float] = product_seconds,
) -> str:
    """How fast one row is multiplied by StarChat Alpha's largest linear at a width, by the fastest kernel.

    rate: bytes a second that the card's memory copies. Raises RuntimeError where no kernel works.
    """
    spec = replace(spec, format=LinearFormat(bits, _GROUP_SIZE))
    linear = large_sample(spec, device, dtype)
    times, reasons = by_speed(dispatch.kernels_for([spec], device), linear, dtype, seconds)
    if not times:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no kernel")
    size = sum(t.nbytes for t in (linear.qweight, linear.qzeros, linear.scales))
    fastest, taken = next(iter(times.items()))
    others = "".join(f"; {name}: {reason}" for name, reason in reasons.items())
    return f"{fastest.name}, {size / taken / 1e9:.0f} GB/s, {size / taken / rate:.0%} of a copy{others}"


def bnb_works(method: bnb.Method, device: torch.device, dtype: torch.dtype) -> str:
    """Compare a linear of bitsandbytes with the dense one. Raises RuntimeError when it differs."""
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
    if not error < BitsAndBytes(method).tolerance("float32"):
        raise RuntimeError(f"differs from the dense linear by {error:.2g} of its norm")
    return f"within {error:.1%} of the dense linear"
