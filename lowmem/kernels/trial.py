"""Compare a kernel with the reference before it is trusted.

A kernel says which linears it takes. It cannot say whether it computes the right numbers for these tensors on
this device, so the first linear of each shape is multiplied twice, by the kernel and by the reference.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lowmem.checkpoint.dequantize import PackedLinear, PackedWeight
from lowmem.checkpoint.files.reading import one_line
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import pack_rows, pack_zeros, stored_shapes, unpack_zeros
from lowmem.kernels import reference
from lowmem.kernels.card_timing import product_seconds
from lowmem.kernels.contract import Kernel, LinearSpec, Unsuitable

_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


def trial(
    kernel: Kernel, linear: PackedLinear, dtype: torch.dtype, *, passed: bool = False
) -> tuple[nn.Module | None, str]:
    """Check a kernel on a linear; returns (the kernel's module, "") or (None, the problem).

    The outputs for random rows must be the reference's within the kernel's tolerance (relative, 2-norm),
    unless the kernel is trusted or `passed` a trial for a linear of this `shape_key`. After a failure
    `linear` holds what it held before. Raises torch.OutOfMemoryError, and whatever `prepare` raises after a
    passed trial.
    """
    if passed:
        return kernel.prepare(linear, dtype), ""
    device, name = linear.qweight.device, str(dtype).removeprefix("torch.")
    spec = spec_of(linear) if kernel.trusted else exact_spec(linear)
    if problem := kernel.why_not(spec, str(device), name):
        return None, problem
    if kernel.trusted:
        try:
            return kernel.prepare(linear, dtype), ""
        except Unsuitable as error:
            return None, str(error)
    saved = copy_of(linear)
    problem = "it was interrupted"
    try:
        with torch.no_grad(), no_chatter():
            inputs = [_random_rows(rows, linear, dtype) for rows in kernel.trial_rows]
            expected = [reference.linear(rows.float(), linear) for rows in inputs]
            module = kernel.prepare(linear, dtype)
            problem = _difference(module, inputs, expected, kernel.tolerance(name))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each kernel fails in its own way; the next one is asked
        problem = plain(error)
    finally:
        if problem:
            restore(linear, saved)
    return (None, problem) if problem else (module, "")


def copy_of(linear: PackedLinear) -> dict[str, torch.Tensor]:
    """The linear's tensors on the host."""
    return {part: t.to("cpu", copy=True) for part in _PARTS if (t := getattr(linear, part)) is not None}


def restore(linear: PackedLinear, saved: Mapping[str, torch.Tensor]) -> None:
    """Undo what a kernel did to the linear's tensors. saved: see `copy_of`."""
    with torch.inference_mode():
        for part, tensor in saved.items():
            getattr(linear, part).copy_(tensor)


def by_speed(
    kernels: Sequence[Kernel],
    linear: PackedLinear,
    dtype: torch.dtype,
    seconds: Callable[[nn.Module, torch.Tensor], float] = product_seconds,
) -> tuple[dict[Kernel, float], dict[str, str]]:
    """The kernels that passed a trial, with their seconds, the fastest first; by name why others follow it.

    One row is multiplied, as in decode. `linear` holds what it held before. Raises torch.OutOfMemoryError.
    """
    saved = copy_of(linear)
    times: dict[Kernel, float] = {}
    reasons: dict[str, str] = {}
    x = _random_rows(1, linear, dtype)
    for kernel in kernels:
        module, problem = trial(kernel, linear, dtype)
        if module is None:
            reasons[kernel.name] = problem
            continue
        try:
            times[kernel] = seconds(module, x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it cannot be captured in a graph, for example
            reasons[kernel.name] = plain(error)
        del module
        restore(linear, saved)
    order = sorted(times, key=lambda kernel: times[kernel])
    for kernel in order[1:]:
        reasons[kernel.name] = (
            f"slower than {order[0].name} ({times[kernel] * 1e6:.0f} and {times[order[0]] * 1e6:.0f} µs)"
        )
    return {kernel: times[kernel] for kernel in order}, reasons


def spec_of(linear: PackedLinear) -> LinearSpec:
    """The spec of a linear as its config describes it."""
    return LinearSpec(linear.in_features, linear.out_features, linear.bias is not None, linear.format)


def exact_spec(linear: PackedLinear) -> LinearSpec:
    """The same with `sym` and `desc_act` as the tensors are.

    A config may say otherwise, and a kernel may rely on it: Marlin never looks at a zero-point.
    """
    spec, format = spec_of(linear), linear.format
    columns = torch.arange(linear.in_features, device=linear.g_idx.device)
    zeros = unpack_zeros(linear.qzeros, format.bits, format.layout)
    in_order = bool((linear.g_idx == columns // spec.group_size).all())
    sym = bool((zeros == 1 << (format.bits - 1)).all())
    return replace(spec, format=replace(format, sym=sym, desc_act=not in_order))


def shape_key(linear: PackedLinear) -> tuple[object, ...]:
    """Equal for linears of which one trial is enough."""
    return (exact_spec(linear), linear.scales.dtype, linear.qweight.device)


def sample_spec(format: LinearFormat) -> LinearSpec:
    """A small linear of the format, with two groups at least."""
    return LinearSpec(max(256, 2 * format.group_size), 256, True, format)


def sample_linear(
    spec: LinearSpec, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PackedWeight:
    """A random packed linear; half of its scales are negative, as in our symmetric grids.

    dtype: of the bias. Raises ValueError for a spec without a format, or sizes that cannot be packed.
    """
    format, in_features, out_features = spec.format, spec.in_features, spec.out_features
    if format is None:
        raise ValueError("a packed linear has a format")
    generator = torch.Generator().manual_seed(seed)
    bits = format.bits
    shapes = stored_shapes(in_features, out_features, bits, format.group_size)
    maxq = (1 << bits) - 1
    q = torch.randint(0, maxq + 1, (in_features, out_features), generator=generator)
    zeros = torch.randint(1, maxq + 1, shapes.scales, generator=generator)
    if format.sym:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    signs = torch.randint(0, 2, shapes.scales, generator=generator) * 2 - 1
    scales = (torch.rand(shapes.scales, generator=generator) + 0.5) * signs / (maxq * in_features**0.5)
    g_idx = torch.arange(in_features) // spec.group_size
    if format.desc_act:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    return PackedWeight(
        format,
        pack_rows(q, bits, format.layout).to(device),
        pack_zeros(zeros, bits, format.layout).to(device),
        scales.to(device, torch.float16),
        g_idx.to(device, torch.int32),
        torch.randn(out_features, generator=generator).to(device, dtype) if spec.bias else None,
    )


def large_sample(spec: LinearSpec, device: torch.device, dtype: torch.dtype = torch.float32) -> PackedWeight:
    """A linear of any size with random integers and equal scales, for timing: made on the device, at once.

    Its outputs are about as large as its inputs. Raises ValueError for a spec without a format.
    """
    format = spec.format
    if format is None:
        raise ValueError("a packed linear has a format")
    shapes = stored_shapes(spec.in_features, spec.out_features, format.bits, format.group_size)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, shapes.qweight, dtype=torch.int32, device=device)
    middle = pack_zeros(
        torch.full((1, spec.out_features), 1 << (format.bits - 1)), format.bits, format.layout
    )
    scale = spec.in_features**-0.5 / 2 ** (format.bits - 2)
    return PackedWeight(
        format,
        words,
        middle.to(device).expand(shapes.qzeros).contiguous(),
        torch.full(shapes.scales, scale, dtype=torch.float16, device=device),
        (torch.arange(spec.in_features, device=device) // spec.group_size).int(),
        torch.zeros(spec.out_features, dtype=dtype, device=device) if spec.bias else None,
    )


@contextlib.contextmanager
def no_chatter() -> Iterator[None]:
    """Discard what is printed: stdout is for the answer alone, and kernels that build themselves print."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def plain(error: Exception) -> str:
    """The error in one line, classes by their bare names."""
    return re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", one_line(error))


def _difference(
    module: nn.Module, inputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float
) -> str:
    """What is wrong with the module's outputs; "" if nothing is."""
    for rows, right in zip(inputs, expected, strict=True):
        got = module(rows)
        if got.shape != right.shape or got.dtype is not rows.dtype:
            return f"it gave {list(got.shape)} of {got.dtype} for {list(right.shape)} of {rows.dtype}"
        error = float((got.float() - right).norm() / right.norm())
        if not error <= tolerance:  # also when it is not a number
            return f"its output for {len(rows)} rows differs from the reference by {error:.2g} of its norm"
    return ""


def _random_rows(rows: int, linear: PackedLinear, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, linear.in_features, generator=generator)
    # With a mean of 0 the error of a zero-point that is off by one would all but cancel out at 8 bits.
    return (values + 1).to(linear.qweight.device, dtype)
