"""lowmem's own kernels behind QuantLinear: what they take and refuse."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lowmem.checkpoint.formats import LAYOUTS, LinearFormat
from lowmem.checkpoint.headers.safetensors import read_header
from lowmem.checkpoint.packing import pack_rows, pack_zeros, unpack_rows, unpack_zeros
from lowmem.checkpoint.source.mapped import MappedFiles
from lowmem.config import PREFILL_CHUNK
from lowmem.doctor import kernels as doctor
from lowmem.kernels.native import header
from lowmem.kernels.native import library as native
from lowmem.kernels.native import linear as native_linear
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.kernels.registry import Native
from lowmem.kernels.trial import spec_of
from tests.helpers import REPO

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
KINDS = [(bits, layout.name) for layout in LAYOUTS.values() for bits in layout.bits]
"""Every width in every layout."""
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def quant_linear(
    inputs: int,
    outputs: int,
    bits: int = 4,
    group_size: int = 32,
    *,
    sym: bool = True,
    bias: bool = True,
    layout: str = "",
    g_idx: torch.Tensor | None = None,
    seed: int = 0,
) -> QuantLinear:
    """Random, with half of the scales negative. g_idx: the groups of the inputs; the default is in order."""
    made = QuantLinear(
        inputs,
        outputs,
        LinearFormat(bits, group_size, sym, g_idx is not None, layout),
        bias=bias,
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(seed)
    groups = made.scales.shape[0]
    q = torch.randint(0, 1 << bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(1, 1 << bits, (groups, outputs), generator=generator)
    if sym:
        zeros.fill_(1 << (bits - 1))
    made.qweight = pack_rows(q, bits, made.format.layout)
    made.qzeros = pack_zeros(zeros, bits, made.format.layout)
    signs = torch.randint(0, 2, (groups, outputs), generator=generator) * 2 - 1
    made.scales = ((torch.rand(groups, outputs, generator=generator) + 0.5) * signs / (1 << bits)).half()
    size = inputs if group_size == -1 else group_size
    made.g_idx = (torch.arange(inputs) // size if g_idx is None else g_idx).int()
    if bias:
        made.bias = torch.randn(outputs, generator=generator)
    return made


def exact(linear: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """The product in float64, from the stored tensors."""
    groups = linear.g_idx.long()
    zeros = unpack_zeros(linear.qzeros, linear.bits, linear.format.layout).double()[groups]
    q = unpack_rows(linear.qweight, linear.bits, linear.format.layout)
    weight = (q - zeros) * linear.scales.double()[groups]
    y = x.double() @ weight
    return y if linear.bias is None else y + linear.bias.double()


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got.double() - right).norm() / right.norm())


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    groups=st.integers(1, 5),
    group_size=st.sampled_from((32, 64, 96, 128, -1)),
    words=st.integers(1, 7),
    rows=st.sampled_from((1, 2, 3, 16, 17, 40)),
    dtype=st.sampled_from(list(TOLERANCES)),
    sym=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_linear_agrees_with_float64(
    kind: tuple[int, str],
    groups: int,
    group_size: int,
    words: int,
    rows: int,
    dtype: torch.dtype,
    sym: bool,
    bias: bool,
    seed: int,
) -> None:
    bits, layout = kind
    inputs = groups * (32 if group_size == -1 else group_size)
    linear = quant_linear(inputs, 32 * words, bits, group_size, sym=sym, bias=bias, layout=layout, seed=seed)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    right = exact(linear, x)
    linear.use_native(activation_bits=16)
    got = linear(x)
    assert linear.row_invariant and got.dtype is dtype
    assert error(got, right) < TOLERANCES[dtype]


@needs_native
@pytest.mark.parametrize("bits", header.WIDTHS)
def test_16_bit_activations_lose_bits_only_where_free_or_requested(bits: int) -> None:
    linear = quant_linear(256, 96, bits, 64)
    x = torch.randn(2 * header.DECODE_ROWS + 1, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = {}
    for asked in (None, *native_linear.ACTIVATION_BITS):
        linear.use_native(activation_bits=asked)
        results[asked] = linear(x)
        assert torch.equal(linear(x[:1]), results[asked][:1]), "a step's rows as a prompt's"
        exact_in_float32 = error(linear(x.float()), exact(linear, x.float()))
        assert exact_in_float32 < TOLERANCES[torch.float32], "never float32"
    assert torch.equal(results[None], results[16 if bits > 4 else {4: 12}.get(bits, 8)])
    assert torch.equal(results[12], results[16]) == (bits > 4)
    for most in (12, 16):
        assert error(results[most], exact(linear, x)) < TOLERANCES[torch.bfloat16]
    assert TOLERANCES[torch.bfloat16] < error(results[8], exact(linear, x)) < 0.02
    with pytest.raises(ValueError, match="activations of 10 bits"):
        linear.use_native(activation_bits=10)


@needs_native
def test_any_leading_shape_and_any_strides() -> None:
    linear = quant_linear(64, 96)
    linear.use_native()
    rows = torch.randn(6, 64)
    right = linear(rows)
    assert torch.equal(linear(rows.view(2, 3, 64)), right.view(2, 3, 96))
    assert torch.equal(linear(rows[0]), right[0])
    assert torch.equal(linear(rows.T.contiguous().T), right)
    assert torch.equal(linear(rows[::2]), right[::2])
    assert linear(rows[:0]).shape == (0, 96)
    with pytest.raises(ValueError, match="for 64 inputs"):
        linear(torch.randn(1, 32))


@needs_native
def test_a_rows_bits_depend_on_neither_rows_nor_threads() -> None:
    linear = quant_linear(256, 160, 4, 128)
    linear.use_native()
    rows = torch.randn(2 * PREFILL_CHUNK + 3, 256)
    whole = linear(rows)
    assert all(torch.equal(linear(rows[row]), whole[row]) for row in (0, 5, PREFILL_CHUNK, len(rows) - 1))
    before = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(linear(rows), whole)
            assert native.library().lm_threads() == count
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("outputs", [32, 64, 160])
@pytest.mark.parametrize("bits", header.WIDTHS)
def test_the_tiled_layout_changes_no_bit(bits: int, outputs: int, sym: bool) -> None:
    """Also with a last tile that is not full, and for another holder of the struct's address."""
    linear = quant_linear(256, outputs, bits, 64, sym=sym)
    linear.use_native()
    rows = torch.randn(33, 256)
    right = [linear(rows[:count]) for count in (1, 33)]
    packed = linear.packed
    assert packed is not None and not linear.use_tiled_layout(), (
        "its tensors are in memory: that would be two copies"
    )
    address = packed.address
    packed.to_tiled()
    packed.to_tiled()
    linear.qweight.zero_()  # must not be read any more
    assert packed.address == address and packed.struct.tiled == 1
    assert all(torch.equal(linear(rows[: len(y)]), y) for y in right)


@needs_native
@pytest.mark.parametrize("outputs", [32, 160])
def test_3_bits_in_planes_are_those_of_a_stream(outputs: int, tmp_path: Path) -> None:
    """Bit for bit, and the file's tensor is left as it is."""
    stream, planes = (quant_linear(256, outputs, 3, 64, layout=name) for name in ("gptq", "gptq_p"))
    assert not torch.equal(stream.qweight, planes.qweight)
    save_file({"qweight": planes.qweight}, tmp_path / "w.safetensors")
    mapped = MappedFiles().tensor(read_header(tmp_path / "w.safetensors"), "qweight")
    assert mapped is not None
    planes.qweight = mapped
    weight = stream.dequantize()
    for linear in (stream, planes):
        linear.use_native()
    for count in (1, 3, 40):
        rows = torch.randn(count, 256)
        assert torch.equal(planes(rows), stream(rows))
    assert planes.packed is not None and planes.packed.struct.tiled and not planes.use_tiled_layout()
    assert torch.equal(planes.dequantize(), weight)


@needs_native
def test_a_mapped_weight_takes_the_tiled_layout(tmp_path: Path) -> None:
    linear = quant_linear(256, 96)
    save_file({"qweight": linear.qweight}, tmp_path / "w.safetensors")
    mapped = MappedFiles().tensor(read_header(tmp_path / "w.safetensors"), "qweight")
    assert mapped is not None
    linear.qweight = mapped
    weight, rows = linear.dequantize(), torch.randn(3, 256)
    assert not linear.use_tiled_layout(), "not native yet"
    linear.use_native()
    right = linear(rows)
    assert linear.use_tiled_layout() and torch.equal(linear(rows), right)
    assert torch.equal(linear.dequantize(), weight)  # from the file again


SCATTERED = {
    "act-order": torch.arange(128)[torch.randperm(128, generator=torch.Generator().manual_seed(3))] // 32,
    "groups in another order": torch.tensor([2, 0, 3, 1]).repeat_interleave(32),
    "groups of several sizes": torch.tensor([0] * 64 + [2] * 32 + [3] * 32),
    "scattered groups of several sizes": torch.tensor([0, 1] * 32 + [2, 1] * 32),
}


@needs_native
@pytest.mark.parametrize("g_idx", SCATTERED.values(), ids=SCATTERED)
@pytest.mark.parametrize(
    ("bits", "layout"), [(6, "gptq_p"), (5, "gptq_p"), (4, "gptq"), (3, "gptq"), (3, "gptq_p")]
)
def test_groups_in_any_order(g_idx: torch.Tensor, bits: int, layout: str) -> None:
    """Inputs are brought into the order of their groups; the weight does not change."""
    linear = quant_linear(128, 64, bits, 32, sym=False, g_idx=g_idx, layout=layout)
    x = torch.randn(5, 128)
    right, weight, bytes_before = exact(linear, x), linear.dequantize(), linear.qweight.nbytes
    linear.use_native()
    assert error(linear(x), right) < 1e-6
    assert torch.equal(linear.dequantize(), weight)
    assert linear.qweight.nbytes == bytes_before  # the old one was freed
    linear.packed = None
    assert error(linear(x), right) < 1e-5, "the reference applies the order as well"
    linear.use_native()
    assert error(linear(x), right) < 1e-6
    assert set(linear.state_dict()) == {"qweight", "qzeros", "scales", "g_idx", "bias"}


@needs_native
def test_a_last_group_that_is_not_full() -> None:
    """576 inputs in groups of 128, like SmolLM2."""
    linear = quant_linear(576, 64, 4, 128)
    x = torch.randn(3, 576)
    right = exact(linear, x)
    linear.use_native()
    assert error(linear(x), right) < 1e-6 and linear.order is None


@needs_native
def test_a_replaced_tensor_is_used() -> None:
    """The kernels hold addresses, which must not outlive their tensors."""
    linear = quant_linear(64, 64)
    x = torch.randn(2, 64)
    linear.use_native()
    other = quant_linear(64, 64, seed=1)
    for name in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        setattr(linear, name, getattr(other, name))
        assert not linear.row_invariant
    assert error(linear(x), exact(other, x)) < 1e-5
    linear.use_native()
    kept = copy.deepcopy(linear)
    assert linear.row_invariant and not kept.row_invariant
    assert torch.allclose(kept(x), linear(x), atol=1e-5)
    assert not kept.to(torch.float32).row_invariant
    state = {name: tensor * 0 for name, tensor in linear.state_dict().items()}
    linear.load_state_dict(state, assign=True)
    assert not linear.row_invariant


@needs_native
def test_gradients_go_through_the_reference() -> None:
    linear = quant_linear(64, 64)
    linear.use_native()
    x = torch.randn(2, 64, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, linear.dequantize().sum(0).expand(2, -1), atol=1e-4)
    with torch.no_grad():
        assert not linear(x).requires_grad


@needs_native
def test_weights_that_cannot_be_read_safely_are_refused() -> None:
    linear = quant_linear(64, 64)
    linear.use_native()
    good: dict[str, Any] = {
        "qweight": linear.qweight,
        "scales": linear.scales,
        "zeros": None,
        "bias": linear.bias,
        "bits": 4,
        "group": 32,
    }
    native_linear.Packed(**good)
    words = linear.qweight
    shifted = torch.empty(words.nbytes + 1, dtype=torch.uint8)[1:].numpy().view("<i4")
    for change in (
        {"bits": 5},
        {"group": 16},
        {"group": 48},
        {"group": 0},
        {"qweight": words.long()},
        {"qweight": words[:7]},
        {"qweight": words[:, :32]},
        {"qweight": words.T.contiguous().T},
        {"qweight": torch.from_numpy(shifted).view(words.shape)},
        {"qweight": words.to("meta")},
        {"scales": linear.scales[:1]},
        {"scales": linear.scales.double()},
        {"scales": linear.scales[:, ::2].repeat(1, 2).T.contiguous().T},
        {"zeros": torch.zeros(2, 64, dtype=torch.int32)},
        {"zeros": torch.zeros(1, 64, dtype=torch.uint8)},
        {"bias": torch.zeros(63)},
        {"bias": torch.zeros(64, dtype=torch.int32)},
    ):
        with pytest.raises(native_linear.Unsuitable):
            native_linear.Packed(**{**good, **change})
    odd = quant_linear(96, 32, 4, 48)  # two groups, each half of a kernel's vector too long
    with pytest.raises(native_linear.Unsuitable, match="multiples of 32"):
        odd.use_native()
    x = torch.randn(2, 96)
    assert error(odd(x), exact(odd, x)) < 1e-5 and not odd.row_invariant


@needs_native
def test_two_threads_at_once_share_the_workspace_in_turn() -> None:
    linears = [quant_linear(256, 256, 4, 128, seed=seed) for seed in range(2)]
    rows = torch.randn(33, 256)
    right = [exact(linear, rows) for linear in linears]
    for linear in linears:
        linear.use_native()
    worst: list[float] = []

    def work(index: int) -> None:
        worst.extend(error(linears[index](rows), right[index]) for _ in range(60))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 120 and max(worst) < 1e-6


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP is looked for on Linux")
def test_the_kernels_run_on_torchs_threads() -> None:
    """The process keeps a single team of OpenMP threads."""
    code = """
import os, torch
from lowmem.kernels.native import header
from lowmem.kernels.native import library as native
from tests.kernels.test_native_linear import quant_linear
torch.set_num_threads(3)
def threads(): return len(os.listdir("/proc/self/task"))
linear = quant_linear(256, 512, 4, 128)
x = torch.randn(64, 256)
torch.randn(1 << 20).exp_()  # starts torch's team
before = threads()
linear.use_native(); linear(x)
assert native.threads_are_torchs() and native.library().lm_threads() == 3
assert threads() == before, (before, threads())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_counts_the_workspace(dtype: torch.dtype) -> None:
    """Of a whole chunk: the library takes no more than the kernel states, besides the threads' own.

    It takes as much with one of the instruction sets: half of that is the least.
    """
    linear = quant_linear(2048, 128, 4, 64)
    linear.use_native()
    assert linear.packed is not None
    taken = native.library().lm_linear_workspace(
        linear.packed.address, 8 * PREFILL_CHUNK, native_linear.PLANES[dtype]
    )
    stated = Native().workspace(spec_of(linear), PREFILL_CHUNK, dtype.itemsize)
    threads = native.library().lm_threads()
    assert stated / 2 < taken <= stated + threads * (320 << 10) + (64 << 10)


# The doctor.


@needs_native
def test_the_doctor_computes_with_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    line = doctor.native_works("kernels")
    assert isinstance(line, str) and native.isa_name() in line and "equal to float64" in line
    assert "torch's" in line or sys.platform != "linux"
    right = native_linear.linear
    monkeypatch.setattr(native_linear, "linear", lambda *a: right(*a) * 1.001)
    with pytest.raises(RuntimeError, match="differs"):
        doctor.native_works("kernels")


def test_the_doctor_says_what_to_do_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: "not compiled when it was installed: install a C compiler")
    check = doctor.native_works("kernels")
    assert not isinstance(check, str)
    assert check.status == "warning" and check.advice == "Install a C compiler"
    assert check.detail == "not compiled when it was installed"
