"""The checks of software and hardware: pure functions of `Machine`."""

from __future__ import annotations

from lowmem.doctor.machine import Card, Machine
from lowmem.doctor.report import Check, Checks
from lowmem.text.units import format_bytes

NEEDED = ("torch", "transformers")
_LEAST_DISK = 10 << 30
_UNPROVED = "lowmem's kernels were run in its interpreter and compiled for cards, but never run on one by us"
_LEAST_CAPABILITY = (7, 5)  # Turing: the minimum of Marlin and Triton


def facts(machine: Machine) -> Checks:
    """Software, cards, compilers, CPU, memory and disk."""
    yield from _software(machine)
    yield from _cuda(machine)
    yield from _compilers(machine)
    yield from _host(machine)


def _software(machine: Machine) -> Checks:
    yield Check("system", "python", "ok", f"{machine.python} on {machine.platform}")
    for name in NEEDED:
        version = machine.versions.get(name)
        if version is None:
            yield Check(
                "system", name, "missing", "not installed", "Install lowmem again: pip install lowmem"
            )
        elif name == "torch" and machine.torch_error:
            yield Check("system", name, "missing", machine.torch_error, "Install torch again")
        elif name == "torch":
            build = f"built for CUDA {machine.cuda_build}" if machine.cuda_build else "built without CUDA"
            yield Check("system", name, "ok", f"{version}, {build}")
        else:
            yield Check("system", name, "ok", version)


def _cuda(machine: Machine) -> Checks:
    if machine.torch_error:
        return
    if machine.driver is None and not machine.cards:
        yield Check("card", "driver", "ok", "no NVIDIA driver: models run on the CPU")
        return
    runs = f", runs CUDA up to {'.'.join(map(str, machine.driver_cuda))}" if machine.driver_cuda else ""
    yield Check("card", "driver", "ok", f"NVIDIA {machine.driver}{runs}")
    if not machine.cards:
        yield _no_card(machine)
    for card in machine.cards:
        yield _card(card)


def _no_card(machine: Machine) -> Check:
    """The driver is installed, but torch finds no card."""
    advice = "Check the output of nvidia-smi, and $CUDA_VISIBLE_DEVICES"
    if machine.cuda_build is None:
        advice = "Install torch with CUDA: https://pytorch.org/get-started/locally/"
    elif machine.driver_cuda and machine.driver_cuda[0] < int(machine.cuda_build.split(".")[0]):
        advice = f"Update the driver, or install a torch for CUDA {machine.driver_cuda[0]}"
    return Check("card", "cards", "warning", "the driver is installed, but torch finds no card", advice)


def _card(card: Card) -> Check:
    memory = f"{format_bytes(card.free)} free of {format_bytes(card.total)}"
    capability = ".".join(map(str, card.capability))
    bfloat16 = "bfloat16 in hardware" if card.bfloat16 else "no bfloat16 in hardware: float16 is used"
    detail = f"{card.name}, compute capability {capability}, {memory}, {bfloat16}"
    name = f"cuda:{card.index}"
    if card.capability < _LEAST_CAPABILITY:
        return Check(
            "card", name, "warning", detail, "The fast kernels need 7.5; lowmem uses plain torch or the CPU"
        )
    if card.free < card.total // 2:
        return Check(
            "card", name, "warning", detail, "Close other programs that use it, to run a better version"
        )
    return Check("card", name, "ok", detail)


def _compilers(machine: Machine) -> Checks:
    if not machine.cards:
        return
    advice = "Triton launches lowmem's kernels with one: apt install gcc python3-dev"
    if machine.compiler:
        yield Check("card", "C compiler", "ok", machine.compiler)
    else:
        yield Check("card", "C compiler", "warning", "not found", advice)
    version = machine.versions.get("triton")
    if version:
        yield Check("card", "triton", "ok", f"{version}; {_UNPROVED}")
    else:
        yield Check("card", "triton", "warning", "not installed", "For lowmem's kernels: pip install triton")
    without = (
        "not found, not needed: GPTQModel builds Marlin with it, which then competes with lowmem's kernels"
    )
    yield Check("card", "nvcc", "ok", machine.nvcc or without)
    if found := machine.versions.get("gptqmodel"):
        yield Check("card", "gptqmodel", "ok", found)


def _host(machine: Machine) -> Checks:
    flags = ", ".join(sorted(machine.flags)) or "no vector extensions that lowmem uses"
    if machine.flags & {"avx2", "avx512f"} or "x86" not in machine.platform:
        yield Check("host", "CPU", "ok", f"{machine.cpu}: {flags}")
    else:
        yield Check("host", "CPU", "warning", f"{machine.cpu}: {flags}", "Answers are slow without AVX2")
    memory = f"{format_bytes(machine.memory_available)} free of {format_bytes(machine.memory_total)}"
    if machine.limit is not None and machine.limit < machine.memory_total:
        memory += f", limited to {format_bytes(machine.limit)} by the container"
    yield Check("host", "memory", "ok", memory)
    if machine.cache is None:
        yield Check(
            "host", "cache", "warning", "this user has no home folder", "Set LOWMEM_CACHE to a folder"
        )
        return
    disk = f"{machine.cache}, {format_bytes(machine.disk_free)} free"
    if machine.disk_free < _LEAST_DISK:
        advice = "Conversions need more: remove some with lowmem rm, or set $LOWMEM_CACHE"
        yield Check("host", "cache", "warning", disk, advice)
    else:
        yield Check("host", "cache", "ok", disk)
