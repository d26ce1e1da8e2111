"""The doctor: facts of made-up machines, failing checks, and a card's checks on the CPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.commands import doctor as doctor_command
from lowmem.config import BITS
from lowmem.doctor import examination, gpu, kernels, machine
from lowmem.doctor.examination import examine
from lowmem.doctor.facts import facts
from lowmem.doctor.kernels import pace
from lowmem.doctor.machine import Card, Machine, look
from lowmem.doctor.report import Check, guarded, passed
from lowmem.generate.decoders.contract import DecoderRefused
from lowmem.kernels import dispatch, gptqmodel
from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.dispatch import KernelChoice, PassedOver
from lowmem.kernels.registry import Reference, Triton
from lowmem.loading.loader import LoadOptions
from lowmem.plan import bandwidth
from tests.helpers import REPO

CPU = torch.device("cpu")
GIB = 1 << 30
RTX = Card("cuda:0", "CUDA", "NVIDIA GeForce RTX 3060", "8.6", 12 * GIB, 11 * GIB, True)
HEALTHY = Machine(
    python="3.12.1",
    platform="Linux-6.8-x86_64",
    versions=dict.fromkeys(machine.PACKAGES, "1.0"),
    torch_error="",
    cuda_build="12.8",
    driver="570.1",
    driver_cuda=(12, 8),
    cards=(RTX,),
    nvcc="/usr/local/cuda/bin/nvcc",
    compiler="/usr/bin/gcc",
    cpu="A CPU, 8 cores",
    flags=frozenset({"avx2"}),
    memory_total=32 * GIB,
    memory_available=20 * GIB,
    limit=None,
    cache=Path("/home/user/.cache/lowmem"),
    disk_free=100 * GIB,
)
NO_CARD = replace(HEALTHY, driver=None, driver_cuda=None, cards=(), cuda_build=None)


def line(found: Any, name: str) -> Check:
    """The only check with this name."""
    lines = [check for check in found if check.name == name]
    assert len(lines) == 1, (name, [check.name for check in found])
    return lines[0]


def test_a_healthy_machine_has_no_warning() -> None:
    found = list(facts(HEALTHY))
    assert {check.status for check in found} == {"ok"} and passed(found)
    card = line(found, "cuda:0").detail
    for part in ("RTX 3060", "8.6", "11.00 GiB free of 12.00 GiB", "bfloat16"):
        assert part in card
    assert "570.1" in line(found, "driver").detail and "12.8" in line(found, "driver").detail


def test_a_machine_without_a_card_is_healthy_too() -> None:
    """It gets no advice about compilers for a card."""
    found = list(facts(NO_CARD))
    assert {check.status for check in found} == {"ok"}
    assert "CPU" in line(found, "driver").detail
    assert not {"nvcc", "C compiler", "cards"} & {check.name for check in found}


@pytest.mark.parametrize(
    "change, name, status, advice",
    [
        ({"compiler": None}, "C compiler", "warning", "apt install gcc python3-dev"),
        ({"versions": {"torch": "2", "transformers": "5"}}, "triton", "warning", "pip install triton"),
        ({"versions": {"torch": "2"}}, "transformers", "missing", "pip install lowmem"),
        ({"versions": {}}, "torch", "missing", "pip install lowmem"),
        ({"torch_error": "OSError: libcudart.so", "cards": ()}, "torch", "missing", "torch again"),
        ({"cards": (), "cuda_build": None}, "cards", "warning", "torch with CUDA"),
        ({"cards": (), "driver_cuda": (11, 8)}, "cards", "warning", "Update the driver"),
        ({"cards": ()}, "cards", "warning", "nvidia-smi"),
        ({"cards": (replace(RTX, capability="6.1", bfloat16=False),)}, "cuda:0", "warning", "7.5"),
        ({"cards": (replace(RTX, free=2 * GIB),)}, "cuda:0", "warning", "Close other programs"),
        ({"flags": frozenset()}, "CPU", "warning", "AVX2"),
        ({"disk_free": GIB}, "cache", "warning", "lowmem rm"),
    ],
)
def test_problems_come_with_advice(change: dict[str, Any], name: str, status: str, advice: str) -> None:
    found = list(facts(replace(HEALTHY, **change)))
    check = line(found, name)
    assert check.status == status and advice in check.advice
    assert passed(found) == (status != "missing")


def test_arm_hears_that_only_an_emulator_ran_it() -> None:
    found = line(facts(replace(HEALTHY, platform="Linux-6.8-aarch64-with-glibc2.36")), "operating system")
    assert found.status == "warning"
    assert "ran for ARM in an emulator" in found.detail and "never on a processor" in found.detail


def test_a_containers_limit_is_reported() -> None:
    found = facts(replace(HEALTHY, limit=8 * GIB))
    assert "limited to 8.00 GiB" in line(found, "memory").detail
    assert "limited" not in line(facts(replace(HEALTHY, limit=64 * GIB)), "memory").detail


def test_a_card_needs_no_toolkit_and_hears_what_is_not_proved() -> None:
    found = list(facts(replace(HEALTHY, nvcc=None)))
    assert line(found, "nvcc").status == "ok" and "not needed" in line(found, "nvcc").detail
    assert "never run on one by us" in line(found, "triton").detail


@pytest.mark.parametrize("bits", BITS)
def test_the_pace_of_a_width_names_the_fastest_kernel_and_its_share(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with made-up times: 1 µs for a copy of the packed weight."""
    spec = LinearSpec(256, 128)
    monkeypatch.setattr(dispatch, "kernels_for", lambda specs, device: (Triton(), Reference()))
    times = {"TritonLinear": 2e-6}

    def seconds(module: Any, x: Any) -> float:
        assert x.shape == (1, 256)
        return times.get(type(module).__name__, 9e-6)

    size = 256 * 128 * bits / 8 + 2 * 128 * (2 + bits / 8)
    found = pace(bits, CPU, torch.bfloat16, size / 1e-6, spec=spec, seconds=seconds)
    assert found.startswith("lowmem Triton, ") and ", 50% of a copy; reference: slower" in found
    with pytest.raises(RuntimeError, match="no kernel"):
        monkeypatch.setattr(dispatch, "kernels_for", lambda specs, device: ())
        pace(bits, CPU, torch.bfloat16, 1e9, spec=spec, seconds=seconds)


def test_a_failing_check_is_a_line() -> None:
    def breaks() -> str:
        raise RuntimeError("CUDA error: an illegal memory access\nmore\nlines")

    check = guarded("card", "kernel", breaks, "Report it")
    assert check.status == "missing" and check.advice == "Report it"
    assert "illegal memory access" in str(check) and "\n" not in str(check)


def test_this_machine() -> None:
    """The facts of this machine agree with Linux's files."""
    found = look()
    assert found.python == ".".join(map(str, sys.version_info[:3])) and found.torch_error == ""
    assert found.memory_total > GIB and 0 < found.memory_available <= found.memory_total
    assert found.versions["torch"] and found.disk_free > 0
    assert len(found.cards) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert ("avx2" in found.flags) == ("avx2" in Path("/proc/cpuinfo").read_text())
    assert list(facts(found))


def test_the_reference_is_checked_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "equal to float64" in kernels.reference_works(CPU)
    right = kernels.reference.linear
    monkeypatch.setattr(kernels.reference, "linear", lambda *a, **k: right(*a, **k) * 1.01)
    with pytest.raises(RuntimeError, match="differs"):
        kernels.reference_works(CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "scaled_dot_product_attention"])
@pytest.mark.parametrize("fault", [5.0, torch.nan])
def test_torchs_products_are_checked_for_real(
    name: str, dtype: torch.dtype, fault: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value of a product is wrong, or not a number."""
    assert "equal to float32" in kernels.dense_works(CPU, dtype)
    right = getattr(kernels.functional, name)

    def wrong(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        found: torch.Tensor = right(*tensors, **options)
        if tensors[0].dtype == dtype and found.shape[-2] == 3:
            found[..., -1, -1] += fault
        return found

    monkeypatch.setattr(kernels.functional, name, wrong)
    with pytest.raises(RuntimeError, match="differs"):
        kernels.dense_works(CPU, dtype)


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_bitsandbytes_is_checked_for_real(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "of the dense linear" in kernels.bnb_works(method, CPU, torch.bfloat16)
    fill = kernels.bnb.quantize_into

    def wrong(module: Any, slices: Any, *rest: Any) -> None:
        fill(module, ((row, part.flip(1)) for row, part in slices), *rest)

    monkeypatch.setattr(kernels.bnb, "quantize_into", wrong)
    with pytest.raises(RuntimeError, match="differs"):
        kernels.bnb_works(method, CPU, torch.bfloat16)


def test_the_kernel_of_each_width_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvcc Triton works, and better kernels say what they need."""
    choice = KernelChoice(
        "TritonV2Linear", "GPTQModel's best here", passed_over=(PassedOver("MarlinLinear", "needs nvcc"),)
    )
    monkeypatch.setattr(dispatch, "choose_kernel", lambda *_: choice)
    check = kernels.chosen("kernels", 4, torch.device("cuda", 0), torch.float16)
    assert check.status == "ok" and check.name == "4-bit GPTQ"
    assert check.detail == "TritonV2Linear, GPTQModel's best here (not MarlinLinear: needs nvcc)"
    monkeypatch.setattr(dispatch, "choose_kernel", lambda *_: replace(choice, name=dispatch.REFERENCE))
    slow = kernels.chosen("kernels", 4, torch.device("cuda", 0), torch.float16)
    assert slow.status == "warning" and "slowly" in slow.advice


# The checks of a card, run on the CPU.


def test_a_cards_checks_pass_on_the_cpu() -> None:
    found = list(gpu.gpu_checks(CPU, torch.bfloat16))
    assert {check.status for check in found} == {"ok"}, [str(check) for check in found]
    assert [check.name for check in found] == [
        "greedy tokens",
        "memory",
        "compiled decode",
        *(f"{bits}-bit GPTQ" for bits in BITS),
        "bitsandbytes int8",
        "bitsandbytes nf4",
    ]
    assert "24 tokens" in line(found, "greedy tokens").detail
    assert "24 tokens, logits within" in line(found, "compiled decode").detail


def test_a_card_with_wrong_results_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong kernel, another model, and a refused compiled decode."""
    install = dispatch.install

    def wrong(model: Any, *rest: Any) -> str:
        for module in model.modules():
            if hasattr(module, "qzeros"):
                module.scales = module.scales.abs() * 1.2
        return install(model, *rest)

    monkeypatch.setattr(dispatch, "install", wrong)
    with pytest.raises(RuntimeError, match="differs from the reference"):
        gpu.kernel_in_model(4, CPU, torch.float32)

    real = gpu.load

    def spoiled(folder: Path, options: LoadOptions) -> Any:
        loaded = real(folder, options)
        if options.device != "cpu" or options.on_the_fly:
            loaded.model.transformer.wpe.weight.mul_(-1)
        return loaded

    monkeypatch.setattr(gpu, "load", spoiled)
    with pytest.raises(RuntimeError, match=r"token \d+ is \d+, on the CPU \d+"):
        gpu.same_tokens_as_cpu(CPU)

    def refuse(*_: Any, **__: Any) -> Any:
        raise DecoderRefused("the graph says no")

    monkeypatch.setattr(gpu, "GraphDecoder", refuse)
    check = gpu.decode_works("a model", CPU, torch.float32)
    assert isinstance(check, Check) and check.status == "warning" and check.detail == "the graph says no"


def test_packing_in_place_keeps_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 8 bits the logits barely change, so the kernels are compared on sensible numbers."""
    dense, packed = (gpu.load(gpu._tiny(), LoadOptions(dtype=torch.float32)) for _ in range(2))
    gpu.pack_model(packed, 8)
    ids = torch.tensor([gpu._prompt(dense)])
    with torch.inference_mode():
        right, got = dense.model(ids).logits, packed.model(ids).logits
    assert 1e-5 < float((got - right).norm() / right.norm()) < 0.02


# The whole examination of made-up machines.


@pytest.fixture
def no_computing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Replaces the checks that compute by ones that record their device."""
    asked: list[str] = []
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(bandwidth, "measure_host", lambda: 4e10)

    def note(name: str) -> Any:
        def check(device: torch.device, dtype: torch.dtype) -> Any:
            asked.append(f"{name} {device} {dtype}")
            yield Check(name, str(device), "ok", "works")

        return check

    monkeypatch.setattr(bandwidth, "card_bandwidth", lambda device: 3.6e11)
    monkeypatch.setattr(kernels, "kernel_checks", note("kernels"))
    monkeypatch.setattr(gpu, "gpu_checks", note("model"))
    return asked


def test_every_card_is_tried(no_computing: list[str]) -> None:
    old = replace(RTX, device="cuda:1", bfloat16=False)
    found = list(examine(replace(HEALTHY, cards=(RTX, old))))
    assert no_computing == [
        "kernels cpu torch.bfloat16",
        "kernels cuda:0 torch.bfloat16",
        "model cuda:0 torch.bfloat16",
        "kernels cuda:1 torch.float16",
        "model cuda:1 torch.float16",
    ]
    rates = [check.detail for check in found if check.name == "bandwidth"]
    assert rates[0].startswith("40.0 GB/s") and rates[1].startswith("360 GB/s")
    assert passed(found)


def test_without_a_card_only_the_cpu_is_tried(no_computing: list[str]) -> None:
    found = list(examine(NO_CARD))
    assert passed(found) and no_computing == ["kernels cpu torch.bfloat16"]
    assert [(c.area, c.status) for c in found if c.name == "all"] == [("kernels on a card", "skipped")]


def test_quick_computes_nothing(no_computing: list[str]) -> None:
    found = list(examine(HEALTHY, quick=True))
    assert "bandwidth" not in {check.name for check in found} and no_computing == []
    assert line(found, "all").status == "skipped", "what is not tried is not called ok"


def test_a_broken_torch_is_reported_and_nothing_else_is_tried(no_computing: list[str]) -> None:
    broken = replace(HEALTHY, torch_error="ImportError: libcudnn.so.9", cards=())
    found = list(examine(broken))
    assert not passed(found) and "libcudnn" in line(found, "torch").detail
    assert no_computing == []


def test_a_failing_card_gives_lines_and_no_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a card every check of cuda:0 raises, and the doctor still finishes."""
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(bandwidth, "measure_host", lambda: 4e10)
    monkeypatch.setattr(gptqmodel, "backends", lambda *_: ())  # it takes seconds
    if torch.cuda.is_available():
        pytest.skip("here it would not fail")
    found = list(examine(HEALTHY))
    on_card = [check for check in found if "cuda:0" in check.area]
    assert len(on_card) > 12 and not any(check.status == "ok" for check in on_card)
    assert all("\n" not in str(check) for check in found)
    assert {check.status for check in found if "cpu" in check.area} == {"ok"}
    assert not passed(found)


def test_the_hub_is_checked_only_with_online(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline() -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(examination, "reach_hub", offline)
    found = list(examine(NO_CARD, quick=True, online=True))
    assert line(found, "hub").status == "warning" and passed(found)
    found = list(examine(NO_CARD, quick=True))
    assert line(found, "hub").status == "skipped" and passed(found)


# The command.


def command(monkeypatch: pytest.MonkeyPatch, found: Machine, *arguments: str) -> int:
    monkeypatch.setattr(machine, "look", lambda: found)
    parser = argparse.ArgumentParser()
    doctor_command.add_arguments(parser)
    return doctor_command.run(parser.parse_args(["--quick", *arguments]))


def test_lines_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, HEALTHY) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "ok       card: cuda:0: NVIDIA GeForce RTX 3060" in out
    assert out.splitlines()[-1].endswith("all requirements are met")


def test_exit_codes_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning exits with 0, a missing requirement with 1."""
    assert command(monkeypatch, replace(HEALTHY, nvcc=None), "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["ok"] and {"area", "name", "status", "detail", "advice"} == set(record["checks"][0])
    assert command(monkeypatch, replace(HEALTHY, versions={}), "--json") == 1
    assert not json.loads(capsys.readouterr().out)["ok"]
    assert command(monkeypatch, replace(HEALTHY, versions={})) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("2 requirements missing")


def test_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts of drivers are not markup."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    odd = replace(RTX, name="[bold]Card[/bold]")
    assert command(monkeypatch, replace(HEALTHY, cards=(odd,), compiler=None)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "[bold]Card" in out and "warning" in out and "1 warning" in out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import argparse, sys; from lowmem.commands import doctor as d\n"
        "d.add_arguments(argparse.ArgumentParser())\n"
        "print({'torch', 'numpy', 'rich', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
