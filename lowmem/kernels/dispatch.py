"""Choose the kernel of each packed linear and put it in place."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowmem.cards import find as cards
from lowmem.cards.find import is_card
from lowmem.checkpoint.formats import LinearFormat
from lowmem.kernels.contract import Kernel, LinearSpec
from lowmem.kernels.native import library
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.kernels.registry import REFERENCE, VARIABLE, Reference, kernels_for
from lowmem.kernels.trial import by_speed, sample_linear, sample_spec, shape_key, spec_of, trial


@dataclass(frozen=True)
class PassedOver:
    """A kernel that is not used, and why."""

    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}"


@dataclass(frozen=True)
class KernelChoice:
    """The kernel for one format on one device."""

    name: str
    reason: str
    """One line for the user."""
    passed_over: tuple[PassedOver, ...] = ()
    """The preferred ones that are not used."""


@dataclass
class Installed:
    """The kernels that multiply the linears of a model."""

    used: Counter[str] = field(default_factory=Counter)
    """How many linears each kernel has, by its name."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """Kernels that refused a linear or failed on it, by name, and why the first time."""

    @property
    def name(self) -> str:
        """For users: the kernel, or each one with its number of linears."""
        names = self.used.most_common()
        if len(names) == 1:
            return names[0][0]
        return ", ".join(f"{name} {count}" for name, count in names)

    def __add__(self, other: Installed) -> Installed:
        return Installed(self.used + other.used, {**other.passed_over, **self.passed_over})


def choose_kernel(device: torch.device, format: LinearFormat, dtype: torch.dtype) -> KernelChoice:
    """Choose the kernel that `install` will try first for this format.

    It is the first kernel that passes a check with a small linear. On a card this imports GPTQModel
    (seconds) and may compile a kernel (minutes, once). Raises InvalidRequestError when LOWMEM_CPU_KERNEL
    names no kernel.
    """
    return best_kernel(kernels_for([sample_spec(format)], device), device, format, dtype)


def best_kernel(
    kernels: Sequence[Kernel], device: torch.device, format: LinearFormat, dtype: torch.dtype
) -> KernelChoice:
    """Choose the first of `kernels` whose result for a small random linear agrees with the reference.

    Raises torch.OutOfMemoryError when the device is out of memory.
    """
    passed_over: list[PassedOver] = []
    for kernel in kernels:
        sample = sample_linear(sample_spec(format), device, dtype)
        problem = ""
        if kernel.trusted:
            problem = kernel.why_not(sample_spec(format), str(device), str(dtype).removeprefix("torch."))
        else:
            problem = trial(kernel, sample, dtype)[1]
        if not problem:
            return KernelChoice(kernel.name, kernel.about, tuple(passed_over))
        passed_over.append(PassedOver(kernel.name, problem))
    if is_card(device):
        reason = "plain torch, slowly: no kernel for cards works here"
    elif not kernels:
        reason = f"plain torch, as {VARIABLE} asks"
    else:
        reason = "plain torch on a CPU, slowly"
    return KernelChoice(REFERENCE, reason, tuple(passed_over))


def install(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    notify: Callable[[str], None] | None = None,
    activation_bits: int | None = None,
) -> str:
    """Give every QuantLinear of a filled model its kernel; returns the names of the kernels, for users.

    Linears that are not on the card get a CPU's kernels. notify: called with a line before a kernel is tried
    that may have to be compiled. activation_bits: see QuantLinear.use_native. Raises torch.OutOfMemoryError
    when a repacked linear does not fit, and InvalidRequestError when LOWMEM_CPU_KERNEL names no kernel.
    """
    names: list[str] = []
    for place in dict.fromkeys((device, torch.device("cpu"))):
        specs = linear_specs(model, place.type)
        found = Installed()
        for format in dict.fromkeys(spec.format for spec in specs.values()):
            group = {name: spec for name, spec in specs.items() if spec.format == format}
            kernels = kernels_for(list(group.values()), place, activation_bits)
            report = notify if is_card(place) else None
            found += replace_linears(model, group, kernels, dtype, report)
        if specs:
            names.append(f"{found.name} on the CPU" if names else found.name)
    return ", ".join(names) or REFERENCE


def linear_specs(model: nn.Module, device_type: str) -> dict[str, LinearSpec]:
    """The packed linears of a model on devices of a type ("cpu", "cuda"), by name."""
    return {
        name: spec_of(module)
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and module.qweight.device.type == device_type
    }


def replace_linears(
    model: nn.Module,
    names: Iterable[str],
    kernels: Sequence[Kernel],
    dtype: torch.dtype,
    notify: Callable[[str], None] | None = None,
) -> Installed:
    """Replace each named QuantLinear by the first of `kernels` that is right, or else by the reference.

    One at a time: a kernel that repacks needs a copy of one linear on the device, freed before the next, and
    a trial another copy on the host. Raises torch.OutOfMemoryError, with the model still whole.
    """
    found = Installed()
    passed: set[tuple[object, ...] | None] = set()
    orders: dict[tuple[object, ...], tuple[Kernel, ...]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        linear: Any = model.get_submodule(name)  # the only reference, once it is replaced
        ordered, shape = tuple(kernels), None
        if len(kernels) > 1 and is_timed(linear):
            shape = shape_key(linear)
            if shape not in orders:
                if notify and not orders:
                    notify("timing kernels (a kernel's first use may compile it for minutes)")
                right, reasons = by_speed(kernels, linear, dtype)
                orders[shape] = tuple(right)
                passed |= {(kernel.name, *shape) for kernel in right}
                for other, reason in reasons.items():
                    found.passed_over.setdefault(other, f"{reason} ({name})")
            ordered = orders[shape]
        for kernel in (*ordered, Reference()):
            if notify and kernel.name not in {*found.used, *found.passed_over, REFERENCE}:
                notify(f"trying {kernel.name} (a kernel's first use may compile it for minutes)")
            key = None if kernel.trusted else (kernel.name, *(shape or shape_key(linear)))
            module, problem = trial(kernel, linear, dtype, passed=key in passed)
            if module is not None:
                if key:
                    passed.add(key)
                found.used[kernel.name] += 1
                setattr(model.get_submodule(parent), child, module)
                break
            found.passed_over.setdefault(kernel.name, f"{problem} ({name})")
    return found


def is_timed(linear: Any) -> bool:
    """Whether kernels for a linear are compared by their speed: on a card, where several may be right."""
    return cards.is_timed(linear.qweight.device)


def why_not_native() -> str:
    """Why our kernels are not used on a CPU (LOWMEM_CPU_KERNEL, or none compiled); "" when they are used."""
    asked = os.environ.get(VARIABLE, "")
    return f"{VARIABLE}={asked}" if asked in ("torch", "reference") else library.why_not()
