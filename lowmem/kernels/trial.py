"""GPTQModel's kernels in the place of our packed linears, each checked before it is trusted.

GPTQModel names its kernels for a device from the best to the plainest (Marlin, ExLlamaV2, Triton, torch), and
its selection says of each whether it takes these bits, groups and dtype. What it cannot say is whether the
kernel computes the right numbers for these tensors on this card, so the first linear of each shape is
multiplied by both, the kernel and our reference. A kernel that refuses, raises or differs is passed over
for the next, and its reason is kept; when none is left the reference stays, which needs no compiler.

Nothing here asks for CUDA itself: the same functions run on a CPU with GPTQModel's kernels for it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lowmem.checkpoint.files.reading import one_line
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import pack_rows, pack_zeros, stored_shapes, unpack_zeros
from lowmem.kernels import reference
from lowmem.kernels.gptqmodel import Candidate, gptqmodel_candidates, no_chatter

REFERENCE = "reference"
# The reference multiplies in float32; rounding scales, weights and sums to 16 bits costs a few thousandths.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.01}
_TRIAL_ROWS = (1, 64)  # kernels take another way for a prefill than for a decode
_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


@runtime_checkable
class PackedLinear(Protocol):
    """What is read of a packed linear: a QuantLinear of ours is one, a kernel of GPTQModel's is not."""

    in_features: int
    out_features: int
    bits: int
    group_size: int
    zeros_v2: bool
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class PassedOver:
    """A kernel that is not used, and why."""

    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}"


@dataclass(frozen=True)
class KernelChoice:
    """What multiplies the packed linears, and why.

    name: of the kernel class, or "reference". reason: one line. cls: the class, None for the reference.
    passed_over: the better ones that are not used. candidates: the chosen kernel and those after it, for
    a linear whose shape the chosen one cannot take.
    """

    name: str
    reason: str
    cls: type[nn.Module] | None = None
    passed_over: tuple[PassedOver, ...] = ()
    candidates: tuple[Candidate, ...] = ()


def best_kernel(
    format: LinearFormat,
    device: torch.device,
    dtype: torch.dtype,
    candidates: tuple[Candidate, ...] | None = None,
) -> KernelChoice:
    """The first kernel that computes what the reference does on a small random linear of this format.

    candidates: GPTQModel's for the device, unless given. Raises nothing but torch.OutOfMemoryError.
    """
    if candidates is None:
        candidates = gptqmodel_candidates(format, device, dtype)
    scratch = _Scratch()
    passed_over: list[PassedOver] = []
    for number, candidate in enumerate(candidates):
        sample = sample_linear(format, device, dtype)
        scratch.fit([sample])
        kernel, problem = trial(candidate, sample, dtype, scratch)
        if kernel is not None:
            return KernelChoice(
                candidate.name,
                "GPTQModel's best for this device that computes what the reference does",
                type(kernel),
                tuple(passed_over),
                candidates[number:],
            )
        passed_over.append(PassedOver(candidate.name, problem))
    return _reference_choice(passed_over)


def replace_linears(
    model: nn.Module,
    format: LinearFormat,
    device: torch.device,
    dtype: torch.dtype,
    candidates: tuple[Candidate, ...],
    notify: Callable[[str], None] | None = None,
) -> KernelChoice:
    """Put a kernel in the place of each packed linear of `model` on `device`, one at a time; what was chosen.

    The buffers are handed over. What a kernel repacks is one linear's copy on the device, freed before the
    next; the first linear of each shape has another copy on the host until its kernel is trusted. A linear
    that no candidate computes rightly keeps the reference. candidates: best first, from
    `gptqmodel_candidates`. Raises torch.OutOfMemoryError, with the model still whole.
    """
    modules = dict(model.named_modules())
    linears: dict[str, Any] = {
        name: module
        for name, module in modules.items()
        if isinstance(module, PackedLinear) and module.qweight.device.type == device.type
    }
    scratch = _Scratch()
    scratch.fit(list(linears.values()))
    trusted: set[tuple[object, ...]] = set()
    asked: set[str] = set()
    passed_over: dict[str, str] = {}
    used: Counter[str] = Counter()
    for name, linear in linears.items():
        kernel = None
        for candidate in candidates:
            if notify and candidate.name not in asked:
                notify(f"trying {candidate.name} (a kernel's first use may compile it for minutes)")
            asked.add(candidate.name)
            key = (candidate.name, *_shape_key(linear))
            kernel, problem = trial(candidate, linear, dtype, scratch, trusted=key in trusted)
            if kernel is not None:
                trusted.add(key)
                break
            passed_over.setdefault(candidate.name, f"{problem} ({name})")
        used[type(kernel).__name__ if kernel is not None else REFERENCE] += 1
        if kernel is not None:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, kernel)
            modules[name] = kernel
        del linear
        linears[name] = None  # the last reference to what was repacked
    refused = [PassedOver(kernel, reason) for kernel, reason in passed_over.items()]
    if set(used) <= {REFERENCE}:
        return _reference_choice(refused)
    names = used.most_common()
    whole = names[0][0] if len(names) == 1 else ", ".join(f"{name} {count}" for name, count in names)
    return KernelChoice(
        whole,
        "GPTQModel's best for this device, equal to the reference on a linear of each shape",
        None,
        tuple(refused),
    )


def trial(
    candidate: Candidate,
    linear: PackedLinear,
    dtype: torch.dtype,
    scratch: _Scratch | None = None,
    *,
    trusted: bool = False,
) -> tuple[nn.Module | None, str]:
    """(the kernel with `linear`'s buffers, "") or (None, what is wrong with it).

    The outputs for random rows must be the reference's within the dtype's tolerance (relative, 2-norm),
    unless the kernel is `trusted` for this shape. After a failure `linear` holds what it held before. Raises
    torch.OutOfMemoryError, and whatever a trusted kernel raises while it repacks.
    """
    scratch = scratch or _Scratch.of(linear)
    try:
        cls = candidate.select()
        with torch.no_grad(), no_chatter():
            kernel = _build(cls, linear, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each kernel refuses in its own way; the next is asked
        return None, _plain(error)
    if trusted:
        with torch.no_grad(), no_chatter():
            _post_init(kernel, scratch)
        return kernel, ""
    saved = {part: t.to("cpu", copy=True) for part in _PARTS if (t := getattr(linear, part)) is not None}
    problem = "it was interrupted"
    try:
        with torch.no_grad(), no_chatter():
            inputs = [_random_rows(rows, linear, dtype) for rows in _TRIAL_ROWS]
            expected = [_expected(rows, linear) for rows in inputs]
            _post_init(kernel, scratch)
            problem = _difference(kernel, inputs, expected, TOLERANCES[dtype])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        problem = _plain(error)
    finally:
        if problem:
            with torch.inference_mode():
                for part, tensor in saved.items():
                    getattr(linear, part).copy_(tensor)
    return (None, problem) if problem else (kernel, "")


def sample_linear(
    format: LinearFormat,
    device: torch.device,
    dtype: torch.dtype,
    in_features: int = 256,
    out_features: int = 256,
    seed: int = 0,
) -> SampleLinear:
    """A random packed linear of the format, half of its scales negative, as our symmetric grids have them."""
    generator = torch.Generator().manual_seed(seed)
    bits, size = format.bits, format.group_size
    in_features = max(in_features, 2 * size)
    shapes = stored_shapes(in_features, out_features, bits, size)
    maxq = (1 << bits) - 1
    q = torch.randint(0, maxq + 1, (in_features, out_features), generator=generator)
    zeros = torch.randint(1, maxq + 1, shapes.scales, generator=generator)
    if format.sym:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    signs = torch.randint(0, 2, shapes.scales, generator=generator) * 2 - 1
    scales = (torch.rand(shapes.scales, generator=generator) + 0.5) * signs / (maxq * in_features**0.5)
    g_idx = torch.arange(in_features) // (in_features if size == -1 else size)
    if format.desc_act:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    packed = pack_rows(zeros.T, bits).T.contiguous() if format.zeros_v2 else pack_zeros(zeros, bits)
    return SampleLinear(
        in_features,
        out_features,
        bits,
        size,
        format.zeros_v2,
        pack_rows(q, bits).to(device),
        packed.to(device),
        scales.to(device, torch.float16),
        g_idx.to(device, torch.int32),
        torch.randn(out_features, generator=generator).to(device, dtype),
    )


@dataclass
class SampleLinear:
    """A packed linear's tensors, without a module around them."""

    in_features: int
    out_features: int
    bits: int
    group_size: int
    zeros_v2: bool
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None


@dataclass
class _Scratch:
    """ExLlamaV2's buffer for one dequantized weight, shared by its linears and as large as the largest.

    GPTQModel's own would also hold the outputs of 8 rows of 2048 tokens, which the kernel never uses: 1.6 GiB
    for StarChat Alpha. A kernel keeps a pointer into it, so it must never be made anew.
    """

    values: int = 0
    spaces: dict[torch.device, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, linear: PackedLinear) -> _Scratch:
        return cls(linear.in_features * linear.out_features)

    def fit(self, linears: list[Any]) -> None:
        sizes = [linear.in_features * linear.out_features for linear in linears]
        self.values = max([self.values, *sizes])

    def space(self, device: torch.device) -> Any:
        if device not in self.spaces:
            scratch = importlib.import_module("gptqmodel.utils.exllamav2").ScratchSpace
            self.spaces[device] = scratch(scratch_bytes=2 * self.values + 256, dev=device)
        return self.spaces[device]


def _build(cls: type[nn.Module], linear: PackedLinear, dtype: torch.dtype) -> nn.Module:
    """The kernel with `linear`'s tensors in it, not yet repacked. Raises what the kernel refuses with."""
    bits, zeros = linear.bits, unpack_zeros(linear.qzeros, linear.bits, v2=linear.zeros_v2)
    arguments: dict[str, Any] = {
        "bits": bits,
        "group_size": linear.group_size,
        # The tensors are asked, since a config may say otherwise: Marlin never looks at a zero-point.
        "desc_act": not _groups_in_order(linear),
        "sym": _symmetric(linear),
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "pack_dtype": torch.int32,
        "register_buffers": True,
        "dtype": dtype,
    }
    with torch.device("meta"):
        kernel = cls(**arguments)
    kernel.eval()
    if getattr(cls, "REQUIRES_FORMAT_V2", False):
        # A field by field conversion: adding to whole words carries where a zero-point of 0 is stored.
        qzeros = linear.qzeros if linear.zeros_v2 else pack_rows(zeros.T, bits).T.contiguous()
    else:
        qzeros = pack_zeros(zeros, bits) if linear.zeros_v2 else linear.qzeros
    wanted: Any = kernel.scales
    tensors = {
        "qweight": linear.qweight,
        "qzeros": qzeros,
        "scales": linear.scales.to(wanted.dtype),
        "g_idx": linear.g_idx,
        "bias": linear.bias,
    }
    for part, tensor in tensors.items():
        if tensor is None:
            continue
        tensor = tensor.detach()  # an alias: a kernel that sets .data must not change the linear's
        if part in kernel._parameters:
            setattr(kernel, part, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(kernel, part, tensor)
    return kernel


def _post_init(kernel: nn.Module, scratch: _Scratch) -> None:
    """Let the kernel repack its tensors. Raises what it raises."""
    # Compiling dequantization once for each of hundreds of linears would take longer than it saves.
    kernel.optimized = True  # type: ignore[assignment]
    post_init: Any = kernel.post_init
    if "scratch_space" in inspect.signature(post_init).parameters:
        space = scratch.space(kernel.qweight.device)  # type: ignore[arg-type]
        post_init(scratch_space=space)
        kernel.scratch_space = space  # it keeps a pointer alone, so this keeps the memory
    else:
        post_init()
    left = [n for n, t in [*kernel.named_parameters(), *kernel.named_buffers()] if t.is_meta]
    if left:
        raise RuntimeError(f"it has no values for {left[0]}")


def _difference(
    kernel: nn.Module, inputs: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float
) -> str:
    """What is wrong with the kernel's outputs, or nothing."""
    for rows, right in zip(inputs, expected, strict=True):
        got = kernel(rows)
        if got.shape != right.shape or got.dtype is not rows.dtype:
            return f"it gave {list(got.shape)} of {got.dtype} for {list(right.shape)} of {rows.dtype}"
        error = float((got.float() - right).norm() / right.norm())
        if not error <= tolerance:  # not a number is no small number
            return f"its output for {len(rows)} rows differs from the reference by {error:.2g} of its norm"
    return ""


def _random_rows(rows: int, linear: PackedLinear, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, linear.in_features, generator=generator)
    # With a mean of 0 the error of a zero-point that is off by one would all but cancel out at 8 bits.
    return (values + 1).to(linear.qweight.device, dtype)


def _expected(rows: torch.Tensor, linear: PackedLinear) -> torch.Tensor:
    return reference.linear(
        rows.float(),
        linear.qweight,
        linear.qzeros,
        linear.scales,
        linear.g_idx,
        linear.bits,
        linear.bias,
        v2=linear.zeros_v2,
    )


def _groups_in_order(linear: PackedLinear) -> bool:
    size = linear.in_features if linear.group_size == -1 else linear.group_size
    return bool((linear.g_idx == torch.arange(linear.in_features, device=linear.g_idx.device) // size).all())


def _symmetric(linear: PackedLinear) -> bool:
    zeros = unpack_zeros(linear.qzeros, linear.bits, v2=linear.zeros_v2)
    return bool((zeros == 1 << (linear.bits - 1)).all())


def _shape_key(linear: PackedLinear) -> tuple[object, ...]:
    return (
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        _groups_in_order(linear),
        _symmetric(linear),
        linear.scales.dtype,
        linear.qweight.device,
    )


def _reference_choice(passed_over: list[PassedOver]) -> KernelChoice:
    reason = "no kernel of GPTQModel's works here" if passed_over else "GPTQModel has no kernel for this"
    return KernelChoice(REFERENCE, reason, None, tuple(passed_over))


def _plain(error: Exception) -> str:
    """The error in one line, classes by their bare names."""
    return re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", one_line(error))
