"""The roofline: bytes and operations compared with real models, rates with a fake clock."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.benchmarks.latency import roofline
from lowmem.benchmarks.latency.energy import CardMeter, Zone, find_meter, host_meter
from lowmem.benchmarks.latency.roofline import (
    Rates,
    copy_rate,
    decode_bytes,
    decode_ceiling,
    look,
    matmul_rate,
    prefill_ceiling,
    prefill_flops,
    read_rate,
)
from torch.utils.flop_counter import FlopCounterMode

from lowmem.kernels.native import library as native
from lowmem.plan.memory import Form
from lowmem.plan.shape import ModelShape, read_shape
from tests.helpers import save_source, tiny_model
from tests.rtn_helpers import layer_linears, write_rtn_checkpoint

CPU = torch.device("cpu")
BF16 = Form("dense", "bfloat16")


@pytest.fixture(scope="module", params=["gpt_bigcode_mqa", "llama"])
def model_and_shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tiny_model(request.param)
    folder = save_source(model, tmp_path_factory.mktemp("roofline") / request.param, tokenizer=False)
    return model, read_shape(folder)


@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_operations_equal_those_counted_by_torch(model_and_shape: Any, tokens: int) -> None:
    """torch's counter sees every product of a real forward pass. For attention it counts the full square,
    not the causal triangle."""
    model, shape = model_and_shape
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.ones((1, tokens), dtype=torch.long), logits_to_keep=1)
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = {op: n for op, n in counted.items() if "scaled_dot" in op or "bmm" in op}
    square = 4 * shape.layers * shape.heads * shape.head_dim * tokens**2
    triangle = 4 * shape.layers * shape.heads * shape.head_dim * tokens * (tokens + 1) // 2
    assert sum(attention.values()) == square
    products = sum(counted.values()) - sum(attention.values())
    assert prefill_flops(shape, tokens) - triangle == products


def test_weights_of_linears(model_and_shape: Any, tmp_path: Path) -> None:
    """The number of weights is the same for packed and unpacked linears."""
    model, shape = model_and_shape
    expected = sum(linear.weight.numel() for linear in layer_linears(model).values())
    assert shape.linear_weights == expected
    for bits in (8, 4, 3):
        folder = tmp_path / str(bits)
        write_rtn_checkpoint(tiny_model(shape_kind(shape)), folder, bits=bits, tokenizer=False)
        assert read_shape(folder).linear_weights == expected


def shape_kind(shape: ModelShape) -> str:
    return "llama" if shape.model_type == "llama" else "gpt_bigcode_mqa"


def test_bytes_of_gpt_bigcode_by_hand(tmp_path: Path) -> None:
    """Two layers of 64 features and 4 heads on one KV head of 16, 4096 tokens, a tied head, 256 positions."""
    shape = read_shape(save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "m", tokenizer=False))
    linears = (64 * 96 + 96) + (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64)
    weights = (
        2 * (linears + 4 * 64) + 2 * 64 + 4096 * 64
    )  # norms, the last norm, the head; position embeddings are not read
    a_token = 2 * 2 * 16  # keys and values of two layers
    # Five new tokens after 10: the four timed steps attend to 11, 12, 13 and 14.
    mean = (11 + 12 + 13 + 14) * a_token / 4
    assert decode_bytes(shape, BF16, 10, 5) == 2 * (weights + mean)
    assert decode_ceiling(shape, BF16, 10, 5, 1e9) == pytest.approx(1e9 / (2 * (weights + mean)))


def test_bytes_of_llama_by_hand(tmp_path: Path) -> None:
    """An untied head is read completely; of the embedding a step reads only one row."""
    shape = read_shape(save_source(tiny_model("llama"), tmp_path / "m", tokenizer=False))
    linears = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    weights = 2 * (linears + 2 * 64) + 64 + 4096 * 64
    a_token = 2 * 2 * 2 * 16
    assert decode_bytes(shape, Form("dense", "float32"), 100, 2) == 4 * (weights + 101 * a_token)


def test_prefill_is_bound_by_the_slower_of_memory_and_arithmetic(model_and_shape: Any) -> None:
    _, shape = model_and_shape
    weights = decode_bytes(shape, BF16, 0, 0)
    assert prefill_ceiling(shape, BF16, 16, 1e18, 1e9) == pytest.approx(16e9 / prefill_flops(shape, 16))
    assert prefill_ceiling(shape, BF16, 16, 1e9, 1e18) == pytest.approx(16e9 / weights)
    assert prefill_ceiling(shape, BF16, 1, 1e9, 1e18) == pytest.approx(1e9 / weights)


# --- rates -------------------------------------------------------------------------------------------------


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass takes a second."""

    def best(one_pass: Any, seconds: float) -> float:
        one_pass()
        return 1.0

    monkeypatch.setattr(roofline, "best", best)


@pytest.mark.usefixtures("one_second")
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("nbytes", [1 << 20, 96 << 20])
def test_all_read_bytes_are_counted(nbytes: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C library or torch, each pass reads a whole buffer whose pages are present."""
    buffers: list[torch.Tensor] = []
    monkeypatch.setattr(native, "available", lambda: compiled)
    where, name = (native, "read") if compiled else (torch, "max")
    monkeypatch.setattr(where, name, lambda tensor: buffers.append(tensor) or 0)
    assert read_rate(nbytes, CPU) == sum(buffer.nbytes for buffer in buffers)
    assert {buffer.nbytes for buffer in buffers} == {nbytes} and len(buffers) == max(1, (64 << 20) // nbytes)
    assert bool(buffers[0].all())


@pytest.mark.usefixtures("one_second")
def test_reads_and_writes_of_a_copy_are_counted() -> None:
    assert copy_rate(32 << 20, CPU) == 8 * (32 << 20)
    assert copy_rate(1 << 20, CPU) == 128 * (1 << 20)


@pytest.mark.usefixtures("one_second")
def test_the_fastest_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_CPU_SIZES", (16, 64, 32))
    assert matmul_rate(torch.bfloat16, CPU) == 2 * 64**3


def test_after_a_slow_product_no_larger_one_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies bfloat16 at less than 1 GFLOP/s on a CPU that has no instructions for it."""
    tried: list[int] = []

    def slow(one_pass: object, seconds: float) -> float:
        tried.append(1)
        return 0.5 if len(tried) < 2 else 4.0

    monkeypatch.setattr(roofline, "best", slow)
    assert matmul_rate(torch.bfloat16, CPU, 0.01) == 2 * 512**3 / 0.5
    assert len(tried) == 2


def test_measured_rates_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are in a wide plausible range, since machines differ. Large models are not read twice."""
    monkeypatch.setattr(roofline, "LARGE_READ", 32 << 20)
    monkeypatch.setattr(roofline, "_CPU_SIZES", (128,))
    rates = look(1 << 20, torch.float32, CPU, 0.01)
    assert 1e8 < rates.read < 1e14 and 1e8 < rates.own < 1e14 and 1e7 < rates.matmul < 1e16
    asked: list[int] = []
    monkeypatch.setattr(roofline, "read_rate", lambda nbytes, *_: asked.append(nbytes) or 5.0)
    assert look(1 << 40, torch.float32, CPU, 0.0) == Rates(5.0, 5.0, pytest.approx(0, abs=1e16))
    assert len(asked) == 1


@pytest.mark.gpu
def test_rates_of_a_card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card")
    rates = look(1 << 20, torch.float16, torch.device("cuda", 0), 0.05)
    assert 1e10 < rates.read < 1e14 and 1e11 < rates.matmul < 1e16


# --- energy ------------------------------------------------------------------------------------------------


def rapl_zone(root: Path, folder: str, name: str, energy: int, largest: int = 999) -> Path:
    zone = root / folder
    zone.mkdir(parents=True)
    (zone / "name").write_text(name + "\n")
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text(f"{largest}\n")
    return zone / "energy_uj"


def test_packages_and_memory_are_counted_once(tmp_path: Path) -> None:
    """Cores are part of their package, and psys covers the whole platform; neither is counted twice."""
    first = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 100)
    rapl_zone(tmp_path, "intel-rapl:0:0", "core", 50)
    dram = rapl_zone(tmp_path, "intel-rapl:0:1", "dram", 10)
    second = rapl_zone(tmp_path, "intel-rapl:1", "package-1", 990)
    rapl_zone(tmp_path, "intel-rapl:2", "psys", 700)
    meter = host_meter(tmp_path)
    assert meter is not None and [zone.file for zone in meter.zones] == [first, dram, second]
    before = meter.read()
    first.write_text("400\n")
    dram.write_text("15\n")
    second.write_text("30\n")  # it wrapped around at 999: 40 more
    assert meter.joules(before, meter.read()) == pytest.approx((300 + 5 + 40) / 1e6)


def test_no_meter_without_readable_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_meter(tmp_path / "none") is None
    rapl_zone(tmp_path, "intel-rapl:0", "psys", 1)
    assert host_meter(tmp_path) is None
    hidden = rapl_zone(tmp_path / "b", "intel-rapl:0", "package-0", 1)
    hidden.unlink()
    hidden.mkdir()  # unreadable, like the counters of root for other users
    meter = host_meter(tmp_path / "b")
    monkeypatch.setattr("lowmem.benchmarks.latency.energy.host_meter", lambda: meter)
    assert meter is not None and find_meter(CPU) is None


def test_a_counter_that_is_not_a_number(tmp_path: Path) -> None:
    meter = host_meter_of(rapl_zone(tmp_path, "intel-rapl:0", "package-0", 1))
    meter.zones[0].file.write_text("?")
    with pytest.raises(OSError, match="not a number"):
        meter.read()


def host_meter_of(file: Path) -> Any:
    from lowmem.benchmarks.latency.energy import HostMeter

    return HostMeter((Zone(file, 999),))


def test_a_cards_millijoules() -> None:
    class Library:
        total = 5000

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: object, pointer: Any) -> int:
            if handle != "card":
                return 3
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.total
            return 0

    library = Library()
    meter = CardMeter(library, "card")
    before = meter.read()
    library.total = 7500
    assert meter.joules(before, meter.read()) == 2.5
    with pytest.raises(OSError, match="cannot read"):
        CardMeter(library, "another").read()
