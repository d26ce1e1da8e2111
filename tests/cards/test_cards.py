"""Cards of four makers, of which this machine has none: torch is replaced by stand-ins."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from lowmem.cards import find, kinds
from lowmem.cards.find import (
    DEVICES,
    automatic,
    cards_of,
    driver_present,
    empty_caches,
    found_cards,
    is_card,
    is_timed,
    resolve_device,
    synchronize,
    widest_float,
)
from lowmem.checkpoint.formats import LinearFormat
from lowmem.config import SamplingParams
from lowmem.doctor import machine as doctor_machine
from lowmem.doctor.examination import card_paces
from lowmem.doctor.facts import facts
from lowmem.doctor.report import Check
from lowmem.errors import InvalidRequestError
from lowmem.generate import noise, sampling, transfer
from lowmem.generate.decoders.contract import DecoderRefused
from lowmem.generate.decoders.graph import CardGraphs
from lowmem.generate.sampling import Sampler
from lowmem.kernels import gptqmodel
from lowmem.kernels.registry import KernelSupport, Reference, Triton, kernels_for, planned
from lowmem.kernels.trial import sample_linear, sample_spec
from lowmem.kernels.triton import presence
from lowmem.kernels.triton.timing import choose
from lowmem.plan import device as machine
from lowmem.plan.bandwidth import card_bandwidth
from lowmem.plan.request import ModelRequest, find_card, plan_for
from tests.cards import fakes
from tests.cards.fakes import GIB, FakeCards
from tests.helpers import REPO, TINY_STARCHAT

CPU = torch.device("cpu")
Fake = Callable[[pytest.MonkeyPatch], FakeCards]
EVERY: list[tuple[Fake, str, str]] = [
    (fakes.cuda, "cuda", "CUDA"),
    (fakes.rocm, "cuda", "ROCm"),
    (fakes.xpu, "xpu", "XPU"),
    (fakes.mps, "mps", "MPS"),
]
every_kind = pytest.mark.parametrize("fake, type, label", EVERY, ids=[label for _, _, label in EVERY])


@every_kind
def test_a_card_is_found_and_has_its_makers_name(
    fake: Fake, type: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch)
    device = resolve_device(type)
    assert device == torch.device(type, 0) and is_card(device) and found_cards() == [device]
    assert cards_of(device).label == label and cards_of(type) is cards_of(device)
    assert find_card(type) == device
    assert not is_card(CPU) and resolve_device("cpu") == CPU


@every_kind
def test_memory_is_what_torch_says(
    fake: Fake, type: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fake(monkeypatch)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=40 * GIB))
    device = torch.device(type, 0)
    assert machine.card_memory_free(device) == 11 * GIB
    use = machine.memory_use(device)
    assert use.card == 2 * GIB and use.card_peak == (GIB if type == "mps" else 4 * GIB)
    synchronize(device)
    empty_caches()
    assert found.calls == ["synchronize", "empty_cache"]
    assert cards_of(device).reset_peak(device) == (type != "mps")


def test_apples_free_memory_is_at_most_what_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.mps(monkeypatch, most=12 * GIB, given=GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * GIB))
    assert machine.card_memory_free(torch.device("mps", 0)) == 3 * GIB


def test_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.cuda(monkeypatch)
    found = cards_of("cuda").properties(torch.device("cuda", 0))
    assert (found.capability, found.multiprocessors, found.total) == ("8.6", 28, 12 * GIB)
    fakes.rocm(monkeypatch)
    found = cards_of("cuda").properties(torch.device("cuda", 0))
    assert (found.capability, found.multiprocessors) == ("gfx1101", 30)
    assert found.bfloat16 and machine.bfloat16_is_fast(torch.device("cuda", 0))
    fakes.xpu(monkeypatch, float64=False)
    found = cards_of("xpu").properties(torch.device("xpu", 0))
    assert (found.name, found.multiprocessors) == ("Intel(R) Arc(TM) B580 Graphics", 20)
    assert found.bfloat16 and not found.float64 and not found.shares_memory
    fakes.mps(monkeypatch)
    found = cards_of("mps").properties(torch.device("mps", 0))
    assert found.name == "Apple M3" and found.shares_memory and not found.float64


# What `auto` picks.


def test_auto_prefers_cuda_then_xpu_and_leaves_shared_memory_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fakes.no_cards(monkeypatch)
    assert automatic() == CPU
    fakes.xpu(monkeypatch)
    assert automatic() == resolve_device("auto") == torch.device("xpu", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert automatic() == torch.device("cuda", 0)
    fakes.xpu(monkeypatch, integrated=True)
    assert automatic() == CPU and resolve_device("xpu") == torch.device("xpu", 0)
    fakes.mps(monkeypatch)
    assert automatic() == CPU and resolve_device("mps") == torch.device("mps", 0)


def test_work_in_float64_gets_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.xpu(monkeypatch)
    assert resolve_device("auto", float64=True) == torch.device("xpu", 0)
    fakes.xpu(monkeypatch, float64=False)
    assert resolve_device("auto", float64=True) == CPU and resolve_device("auto").type == "xpu"
    with pytest.raises(InvalidRequestError, match="xpu:0 has no 64-bit floats"):
        resolve_device("xpu:0", float64=True)
    fakes.mps(monkeypatch)
    with pytest.raises(InvalidRequestError, match="mps has no 64-bit floats"):
        resolve_device("mps", float64=True)


@pytest.mark.parametrize(
    "name, said",
    [
        ("cuda:1", "torch sees 1 CUDA card. Use --device cpu, or install the driver"),
        ("xpu", "device xpu is not available: torch sees 0 XPU cards. .*lowmem doctor"),
        ("mps", "torch sees 0 MPS cards"),
        ("rocm", "unknown device 'rocm'. torch calls ROCm cards cuda"),
        ("gpu", f"unknown device 'gpu'. Use {DEVICES}"),
        ("cuda:", "unknown device"),
        ("xpu:-1", "unknown device"),
    ],
)
def test_a_device_that_is_not_there(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.cuda(monkeypatch)
    with pytest.raises(InvalidRequestError, match=said):
        resolve_device(name)


def test_a_second_rocm_card_is_missed_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.rocm(monkeypatch, count=2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InvalidRequestError, match="torch sees 2 ROCm cards") as raised:
        resolve_device("cuda:2")
    assert "CUDA" not in str(raised.value)


# Planning waits for torch only where a card may be.


@pytest.mark.parametrize(
    "library, present",
    [
        ("libcuda.so.1", True),
        ("nvcuda.dll", True),
        ("libamdhip64.so", True),
        ("libze_loader.so.1", True),
        ("libz.so.1", False),
    ],
)
def test_the_drivers_of_three_makers(library: str, present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_exists", lambda path: False)

    def load(name: str) -> None:
        if name != library:
            raise OSError(name)

    monkeypatch.setattr(kinds.ctypes, "CDLL", load)
    assert driver_present() == present


def test_amds_kernel_driver_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_loads", lambda *names: False)
    monkeypatch.setattr(kinds, "_exists", lambda path: path == "/dev/kfd")
    assert driver_present()


def test_a_mac_plans_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU has to be asked for, so `auto` need not look."""
    monkeypatch.setattr(kinds, "_loads", lambda *names: False)
    monkeypatch.setattr(kinds, "_exists", lambda path: False)
    monkeypatch.setattr(kinds.sys, "platform", "darwin")
    monkeypatch.setattr(kinds.platform, "machine", lambda: "arm64")
    assert kinds.MpsCards().driver_present() and not driver_present()
    assert find_card("auto") is None


def test_no_torch_is_imported_to_name_the_cpu() -> None:
    script = (
        "import sys; from lowmem.cards import find; from lowmem.plan.request import find_card\n"
        "find.is_card('cuda:0'); find.driver_present(); find_card('cpu'); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


# Planning for a card.


@every_kind
def test_a_plan_for_a_card(fake: Fake, type: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is the card's; where that is the host's too, the host has only the rest."""
    found = fake(monkeypatch)
    found.free = 11 * GIB
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=40 * GIB))
    monkeypatch.setattr(machine, "host_memory_available", lambda: 40 * GIB)
    monkeypatch.setattr(machine, "host_memory_private", lambda: 0)
    plan = plan_for(ModelRequest(TINY_STARCHAT, device=type))
    assert plan.budget.device == f"{type}:0" and plan.budget.card == 11 * GIB
    assert plan.budget.host == (29 if type == "mps" else 40) * GIB
    assert plan.chosen.device == "card" and plan.budget.own_context == 0
    assert plan.budget.support.gptqmodel == (type != "mps")


def test_apples_plan_leaves_room_for_the_reference() -> None:
    (kernel,) = planned("gptq", cuda=True, support=KernelSupport(triton=False, gptqmodel=False))
    assert isinstance(kernel, Reference)
    (kernel,) = planned("gptq", cuda=True, support=KernelSupport(triton=False))
    assert kernel.name == "GPTQModel"


def test_a_named_card_gives_the_same_plan_whatever_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory_available", lambda: 40 * GIB)
    request = ModelRequest(TINY_STARCHAT, vram=12 * GIB, ram=8 * GIB)
    fakes.no_cards(monkeypatch)
    without = plan_for(request, named_card=True)
    fakes.xpu(monkeypatch)
    assert plan_for(request, named_card=True) == without


def test_the_bandwidth_of_a_card_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fakes.xpu(monkeypatch)
    found.free = 8 << 20
    sizes: list[int] = []
    real = torch.ones

    def ones(count: int, *, dtype: Any, device: torch.device) -> torch.Tensor:
        sizes.append(count)
        return real(count, dtype=dtype)

    monkeypatch.setattr(torch, "ones", ones)
    assert card_bandwidth(torch.device("xpu", 0)) > 0
    assert sizes == [1 << 20] and found.calls.count("synchronize") > 3


# Graphs.


@pytest.mark.parametrize("fake, type", [(fakes.cuda, "cuda"), (fakes.rocm, "cuda"), (fakes.xpu, "xpu")])
def test_graphs_share_a_pool(fake: Fake, type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake(monkeypatch)
    graphs = CardGraphs(torch.device(type, 0))
    output, replay = graphs.capture(lambda: torch.ones(1))
    replay()
    graphs.capture(lambda: torch.ones(1))
    assert output.item() == 1 and found.calls == ["capture None", "replay", "capture pool"]


def test_without_graphs_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.mps(monkeypatch)
    with pytest.raises(DecoderRefused, match="has no graphs for MPS"):
        CardGraphs(torch.device("mps", 0))
    fakes.xpu(monkeypatch)
    monkeypatch.delattr(torch.xpu, "XPUGraph")
    with pytest.raises(DecoderRefused, match="has no graphs for XPU"):
        CardGraphs(torch.device("xpu", 0))
    with pytest.raises(DecoderRefused, match="the model is on cpu"):
        CardGraphs(CPU)


# Doctor.


def examined(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    """The doctor's lines on cards, by name, with Triton and no compiler of CUDA's."""
    fake(monkeypatch)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=40 * GIB, total=48 * GIB))
    for kind in kinds.KINDS:
        mine = torch.version.hip is not None if kind.label == "ROCm" else kind.count() > 0
        monkeypatch.setattr(type(kind), "driver_present", lambda self, mine=mine: mine)
    monkeypatch.setattr(doctor_machine, "_driver_version", lambda: None)
    monkeypatch.setattr(doctor_machine, "_driver_cuda", lambda: None)
    return {check.name: check for check in facts(doctor_machine.look()) if check.area == "card"}


@pytest.mark.parametrize(
    "fake, device, label, said",
    [
        (fakes.rocm, "cuda:0", "ROCm", "AMD Radeon RX 7800 XT, gfx1101, 11.00 GiB free of 16.00 GiB"),
        (fakes.xpu, "xpu:0", "XPU", "Intel(R) Arc(TM) B580 Graphics, 11.00 GiB free of 12.00 GiB"),
        (fakes.mps, "mps:0", "MPS", "Apple M3, 11.00 GiB free of 12.00 GiB"),
    ],
)
def test_the_doctor_speaks_of_the_makers_card(
    fake: Fake, device: str, label: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of CUDA or nvcc, and that we never ran on such a card."""
    found = examined(fake, monkeypatch)
    assert said in found[device].detail and found[device].status == "ok"
    assert found[label].status == "warning" and "never run on such a card by us" in found[label].detail
    assert "driver is installed" in found[f"{label} driver"].detail
    text = " ".join(f"{check.name} {check.detail} {check.advice}" for check in found.values())
    assert not {"CUDA", "nvcc", "NVIDIA", "compute"} & set(text.replace(":", " ").split()) - {"cuda"}
    assert ("triton for MPS" in found) == (label == "MPS") and ("C compiler" in found) == (label != "MPS")


def test_the_doctor_of_a_cuda_card_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(fakes.cuda, monkeypatch)
    assert "compute capability 8.6" in found["cuda:0"].detail and "nvcc" in found
    assert not {"ROCm", "XPU", "MPS", "CUDA"} & found.keys()


def test_a_driver_without_a_card_gets_its_makers_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.no_cards(monkeypatch)
    base = doctor_machine.look()
    for builds, advice in (((), "torch with ROCm"), (("ROCm 7.1",), "rocminfo")):
        machine = replace(base, driver=None, cards=(), drivers=("ROCm",), builds=builds)
        found = {check.name: check for check in facts(machine)}
        assert found["ROCm cards"].status == "warning" and advice in found["ROCm cards"].advice


def test_only_what_can_be_timed_gets_a_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.xpu(monkeypatch)
    (line,) = card_paces(torch.device("xpu", 0), torch.float16)
    assert line.status == "skipped" and "cannot be timed" in line.detail
    assert is_timed(torch.device("cuda", 0)) and not is_timed(CPU)


# Kernels.


def test_gptqmodel_is_asked_for_amds_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def families(name: str) -> str:
        asked.append(name)
        raise ImportError("enough")

    importer = SimpleNamespace(AUTO_BACKEND_KERNEL_MAPPING={"gptq": {}})
    monkeypatch.setattr(gptqmodel, "_import_gptqmodel", lambda: (importer, families))
    spec = sample_spec(LinearFormat(4, 128))
    for fake, device in ((fakes.cuda, "cuda"), (fakes.rocm, "cuda"), (fakes.xpu, "xpu")):
        fake(monkeypatch)
        gptqmodel.backends([spec], torch.device(device, 0))
    assert asked == ["cuda", "rocm", "xpu"]


def test_sampling_without_64_bit_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that has none chooses the same tokens as the CPU."""
    logits = torch.randn(4096, generator=torch.Generator().manual_seed(0))

    def tokens() -> list[Any]:
        params = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=7, logprobs=2)
        sampler = Sampler(params, [1], 4096, CPU)
        return [sampler.choose(logits) for _ in range(40)]

    wide = tokens()
    for module in (noise, sampling, transfer):
        monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    real = torch.Tensor.to

    def narrow(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert torch.float64 not in args, "the card has no float64"
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", narrow)
    found = tokens()
    assert [one.id for one in found] == [one.id for one in wide]
    assert [one.top for one in found] == [one.top for one in wide]


def test_the_widest_float_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_WIDEST", {})
    fakes.xpu(monkeypatch, float64=False)
    assert widest_float(torch.device("xpu", 0)) is torch.float32 and widest_float(CPU) is torch.float64


# Triton.


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with Triton, a compiler and headers; `set` names what Triton compiles for."""
    presence.why_not_triton.cache_clear()
    monkeypatch.setattr(presence.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(presence, "compiler", lambda: "/usr/bin/gcc")
    monkeypatch.setattr(presence.Path, "is_file", lambda path: True)
    present = SimpleNamespace(set=lambda *names: monkeypatch.setattr(presence, "_backends", lambda: names))
    present.set("amd", "nvidia")
    yield present
    presence.why_not_triton.cache_clear()


def test_our_kernels_come_first_on_a_card(triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Apple's GPU they refuse with the reason; the reference follows."""
    triton.set("intel", "amd", "nvidia")
    monkeypatch.setattr("lowmem.kernels.registry.nvcc", lambda: "/usr/bin/nvcc")
    spec = sample_spec(LinearFormat(4, 128))
    for fake, device in ((fakes.xpu, "xpu:0"), (fakes.rocm, "cuda:0"), (fakes.mps, "mps:0")):
        fake(monkeypatch)
        presence.why_not_triton.cache_clear()
        (kernel,) = kernels_for([spec], torch.device(device))
        assert isinstance(kernel, Triton)
        assert bool(kernel.why_not(spec, device, "float16")) == (device == "mps:0")


def test_triton_must_compile_for_the_card(triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = sample_spec(LinearFormat(4, 128))
    for fake, device, lacks in (
        (fakes.cuda, "cuda:0", ""),
        (fakes.rocm, "cuda:0", ""),
        (fakes.xpu, "xpu:0", "this Triton is for amd and nvidia, not for intel"),
        (fakes.mps, "mps:0", "Triton does not compile for Apple's GPUs"),
    ):
        presence.why_not_triton.cache_clear()
        fake(monkeypatch)
        problem = Triton().why_not(spec, device, "bfloat16")
        assert lacks in problem and bool(problem) == bool(lacks)
    presence.why_not_triton.cache_clear()
    fakes.rocm(monkeypatch)
    triton.set("nvidia")
    assert "not for amd" in presence.why_not_triton("cuda:0")
    presence.why_not_triton.cache_clear()
    fakes.xpu(monkeypatch)
    triton.set("intel")
    assert presence.why_not_triton("xpu:0") == ""


def test_the_installed_triton_is_asked() -> None:
    """Its wheel compiles for two makers; where it is not installed, for none."""
    pytest.importorskip("triton")
    assert {"amd", "nvidia"} <= set(presence._backends())


def test_launches_are_for_the_cards_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear on an XPU card is launched for its 20 cores, as on a CUDA card with 20."""
    fakes.xpu(monkeypatch)
    linear = sample_linear(sample_spec(LinearFormat(4, 128)), CPU)
    there = SimpleNamespace(**{name: getattr(linear, name) for name in ("in_features", "out_features")})
    there.bias, there.format, there.middle = linear.bias, linear.format, True
    there.qweight = SimpleNamespace(device=torch.device("xpu", 0))
    asked: list[int] = []
    monkeypatch.setattr("lowmem.kernels.triton.timing.usual", lambda spec, count: asked.append(count))
    choose(there, torch.float16)  # type: ignore[arg-type]
    assert asked == [20]
