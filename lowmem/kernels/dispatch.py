"""Which kernel multiplies the packed linears on a device, and why. GPTQModel is imported for a card alone.

On a CPU: our own kernels (native.py), which were compiled when lowmem was installed; else torch's own
operators for what they can multiply (torch_ops.py); else the reference. LOWMEM_CPU_KERNEL=native, torch or
reference chooses, for tests and comparisons; what the chosen one cannot multiply keeps the reference.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import nn

from lowmem.checkpoint.formats import LinearFormat
from lowmem.errors import InvalidRequestError
from lowmem.kernels import torch_ops
from lowmem.kernels import trial as cuda
from lowmem.kernels.native import library as native
from lowmem.kernels.native import linear as native_linear
from lowmem.kernels.trial import REFERENCE, KernelChoice, PackedLinear, PassedOver

__all__ = [
    "REFERENCE",
    "VARIABLE",
    "KernelChoice",
    "choose_kernel",
    "install",
    "native_name",
    "why_not_native",
]

VARIABLE = "LOWMEM_CPU_KERNEL"
Way = Literal["native", "torch", "reference"]


@runtime_checkable
class SwitchableLinear(PackedLinear, Protocol):
    """A packed linear that can be told to use our own kernels."""

    def use_native(self, activation_bits: int | None = None) -> None:
        """From now on; raises native_linear.Unsuitable, and stays as it is, when they cannot take it."""


def choose_kernel(device: torch.device, format: LinearFormat, dtype: torch.dtype) -> KernelChoice:
    """The kernel that `install` would try first, tried on a small linear; its reason is for the user.

    On a card this imports GPTQModel (seconds) and may compile a kernel (minutes, once). Raises
    InvalidRequestError when LOWMEM_CPU_KERNEL names no kernel.
    """
    return cuda.best_kernel(format, device, dtype) if device.type == "cuda" else _for_cpu(format, dtype)


def install(
    model: nn.Module,
    format: LinearFormat,
    device: torch.device,
    dtype: torch.dtype,
    notify: Callable[[str], None] | None = None,
    activation_bits: int | None = None,
) -> str:
    """Give the packed linears of a filled model their kernels; the name of what was chosen.

    Linears that are not on the card get a CPU's. notify: told before a kernel is tried that may have to be
    compiled. Raises torch.OutOfMemoryError when a repacked linear does not fit, and InvalidRequestError when
    LOWMEM_CPU_KERNEL names no kernel.
    """
    names = []
    if device.type == "cuda":
        candidates = cuda.gptqmodel_candidates(format, device, dtype)
        names.append(cuda.replace_linears(model, format, device, dtype, candidates, notify).name)
    if on_cpu := [
        m for m in model.modules() if isinstance(m, PackedLinear) and m.qweight.device.type == "cpu"
    ]:
        name = _install_on_cpu(model, on_cpu, format, dtype, activation_bits)
        names.append(name if not names else f"{name} on the CPU")
    return ", ".join(names) or REFERENCE


def why_not_native() -> str:
    """Why our own kernels are not used on a CPU, whatever for: LOWMEM_CPU_KERNEL, or they are not there; ""
    if they are."""
    asked = os.environ.get(VARIABLE, "")
    if asked in ("torch", "reference"):
        return f"{VARIABLE}={asked}"
    return native.why_not()


def native_name() -> str:
    """What a user calls our own kernels: with the instruction set that they use."""
    return f"lowmem {native.isa_name()}"


def _way(format: LinearFormat, dtype: torch.dtype) -> tuple[Way, str, tuple[PassedOver, ...]]:
    """(which kernels a CPU uses, the reason, what is not used and why)."""
    asked = os.environ.get(VARIABLE) or "best"
    if asked not in ("best", "native", "torch", "reference"):
        raise InvalidRequestError(f"{VARIABLE}={asked} names no kernel", "Use native, torch or reference")
    passed: list[PassedOver] = []
    if asked in ("best", "native"):
        if native.available():
            own = "torch's threads" if native.threads_are_torchs() else "threads of their own"
            return "native", f"our own kernels, on {own}", ()
        passed.append(PassedOver("lowmem's own", native.why_not()))
    if asked in ("best", "torch"):
        problem = torch_ops.refuses(format, dtype)
        if not problem:
            return "torch", "torch's own operators on repacked weights", tuple(passed)
        passed.append(PassedOver("torch's operators", problem))
    if asked == "reference":
        return "reference", f"plain torch, as {VARIABLE} asks", ()
    return "reference", "plain torch on a CPU, slowly", tuple(passed)


def _for_cpu(format: LinearFormat, dtype: torch.dtype) -> KernelChoice:
    way, reason, passed = _way(format, dtype)
    if way == "native":
        return KernelChoice(native_name(), reason, None, passed)
    if way == "torch":
        found = cuda.best_kernel(format, torch.device("cpu"), dtype, torch_ops.candidates(format, dtype))
        if found.name != REFERENCE:
            return KernelChoice(found.name, reason, found.cls, passed, found.candidates)
        passed += found.passed_over
    return KernelChoice(
        REFERENCE, reason if way == "reference" else "plain torch on a CPU, slowly", None, passed
    )


def _install_on_cpu(
    model: nn.Module,
    linears: Sequence[PackedLinear],
    format: LinearFormat,
    dtype: torch.dtype,
    activation_bits: int | None,
) -> str:
    way = _way(format, dtype)[0]
    if way == "torch":
        cpu = torch.device("cpu")
        return cuda.replace_linears(model, format, cpu, dtype, torch_ops.candidates(format, dtype)).name
    if way == "reference":
        return REFERENCE
    used: Counter[str] = Counter()
    for linear in linears:
        try:
            cast(SwitchableLinear, linear).use_native(activation_bits)
            used[native_name()] += 1
        except native_linear.Unsuitable:
            used[REFERENCE] += 1
    names = used.most_common()
    return names[0][0] if len(names) == 1 else ", ".join(f"{name} {count}" for name, count in names)
