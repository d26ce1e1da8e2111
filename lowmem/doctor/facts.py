"""The checks of software and hardware: pure functions of `Machine`."""

from __future__ import annotations

from lowmem.cards.contract import Cards
from lowmem.cards.find import NOT_RUN
from lowmem.cards.kinds import CUDA, KINDS
from lowmem.doctor.machine import Card, Machine
from lowmem.doctor.report import Check, Checks
from lowmem.kernels.triton.presence import install_advice
from lowmem.text.units import format_bytes

NEEDED = ("torch", "transformers")
_LEAST_DISK = 10 << 30
_NO_FLAGS = {True: "no vector extensions that lowmem uses", False: "the kernels find what it supports"}
"""Whether the system is Linux, which lists them → what is said without any."""
_UNPROVED = "lowmem's kernels were run in its interpreter and compiled for cards, but never run on one by us"
_LEAST_CAPABILITY = (7, 5)  # Turing: the minimum of Marlin and Triton


def facts(machine: Machine) -> Checks:
    """Software, cards, compilers, CPU, memory and disk."""
    yield from _software(machine)
    yield from _drivers(machine)
    yield from _compilers(machine)
    yield from _host(machine)


def _software(machine: Machine) -> Checks:
    yield Check("system", "python", "ok", f"{machine.python} on {machine.platform}")
    if untried := _untried(machine.platform):
        advice = "Please report what does not work"
        yield Check("system", "operating system", "warning", untried, advice)
    for name in NEEDED:
        version = machine.versions.get(name)
        if version is None:
            yield Check(
                "system", name, "missing", "not installed", "Install lowmem again: pip install lowmem"
            )
        elif name == "torch" and machine.torch_error:
            yield Check("system", name, "missing", machine.torch_error, "Install torch again")
        elif name == "torch":
            builds = [*([f"CUDA {machine.cuda_build}"] if machine.cuda_build else []), *machine.builds]
            build = " and ".join(builds) or "the CPU only"
            yield Check("system", name, "ok", f"{version}, built for {build}")
        else:
            yield Check("system", name, "ok", version)


def _untried(platform: str) -> str:
    """What was not run on a system, by platform.platform(); "" for Linux on x86-64."""
    name = platform.partition("-")[0]
    if name == "Windows":
        return "lowmem's kernels ran in Wine, the rest with stand-ins for Windows; nothing on Windows by us"
    if name == "macOS":
        return "lowmem and its kernels were compiled and checked for macOS, but never run there by us"
    if "aarch64" in platform or "arm64" in platform:
        return "lowmem and its kernels ran for ARM in an emulator, but never on a processor by us"
    return "" if name == "Linux" else f"lowmem was never run on {name} by us"


def _drivers(machine: Machine) -> Checks:
    """Drivers, then cards."""
    if machine.torch_error:
        return
    if machine.driver is None and not machine.cards and not machine.drivers:
        yield Check("card", "driver", "ok", "no driver of a card: models run on the CPU")
        return
    if machine.driver:
        runs = f", runs CUDA up to {'.'.join(map(str, machine.driver_cuda))}" if machine.driver_cuda else ""
        yield Check("card", "driver", "ok", f"NVIDIA {machine.driver}{runs}")
    others = [kind for kind in KINDS if kind.label in machine.drivers]
    for kind in others:
        yield Check("card", f"{kind.label} driver", "ok", f"{kind.maker}'s driver is installed")
    if not machine.cards:
        if machine.driver:
            yield _no_card(machine)
        for kind in others:
            built = any(build.split()[0] == kind.label for build in machine.builds)
            advice = kind.visibility if built else kind.build_advice
            yield _missing(f"{kind.label} cards", f"{kind.label} card", advice)
    for card in machine.cards:
        yield _card(card)
    for kind in _kinds(machine):
        if kind is not CUDA:
            yield Check("card", kind.label, "warning", NOT_RUN, "Please report what the checks below say")


def _kinds(machine: Machine) -> list[Cards]:
    """The kinds of cards here."""
    return [kind for kind in KINDS if any(card.label == kind.label for card in machine.cards)]


def _no_card(machine: Machine) -> Check:
    """NVIDIA's driver is installed, but torch finds no card."""
    advice = CUDA.visibility
    if machine.cuda_build is None:
        advice = CUDA.build_advice
    elif machine.driver_cuda and machine.driver_cuda[0] < int(machine.cuda_build.split(".")[0]):
        advice = f"Update the driver, or install a torch for CUDA {machine.driver_cuda[0]}"
    return _missing("cards", "card", advice)


def _missing(name: str, what: str, advice: str) -> Check:
    detail = f"the driver is installed, but torch finds no {what}"
    return Check("card", name, "warning", detail, advice)


def _card(card: Card) -> Check:
    memory = f"{format_bytes(card.free)} free of {format_bytes(card.total)}"
    names = {"CUDA": f", compute capability {card.capability}", "ROCm": f", {card.capability}"}
    bfloat16 = "bfloat16 in hardware" if card.bfloat16 else "no bfloat16 in hardware: float16 is used"
    detail = f"{card.name}{names.get(card.label, '')}, {memory}, {bfloat16}"
    name = card.device
    if card.label == "CUDA" and tuple(map(int, card.capability.split("."))) < _LEAST_CAPABILITY:
        return Check(
            "card", name, "warning", detail, "The fast kernels need 7.5; lowmem uses plain torch or the CPU"
        )
    if card.free < card.total // 2:
        return Check(
            "card", name, "warning", detail, "Close other programs that use it, to run a better version"
        )
    return Check("card", name, "ok", detail)


def _compilers(machine: Machine) -> Checks:
    """What compiles and launches kernels for the cards here."""
    kinds = _kinds(machine)
    for kind in kinds:
        if not kind.triton:
            detail = f"does not compile for {kind.maker}'s GPUs: packed weights are multiplied by plain torch"
            yield Check("card", f"triton for {kind.label}", "ok", detail)
    compiled = [kind for kind in kinds if kind.triton]
    if not compiled:
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
        advice = f"For lowmem's kernels: {install_advice(compiled[0])}"
        yield Check("card", "triton", "warning", "not installed", advice)
    if CUDA in compiled:
        without = "not found, not needed: GPTQModel builds Marlin with it, a rival of lowmem's kernels"
        yield Check("card", "nvcc", "ok", machine.nvcc or without)
    if found := machine.versions.get("gptqmodel"):
        yield Check("card", "gptqmodel", "ok", found)


def _host(machine: Machine) -> Checks:
    flags = ", ".join(sorted(machine.flags)) or _NO_FLAGS[machine.platform.startswith("Linux")]
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
