"""Embeddings and heads in 8 bits: what is looked up is what is multiplied by, whatever the layout."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowmem.checkpoint.dequantize import PackedWeight, dequantize
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import pack_rows, pack_zeros
from lowmem.errors import SourceError
from lowmem.kernels.native import library as native
from lowmem.kernels.native import linear as native_linear
from lowmem.kernels.quantized_tables import (
    QuantizedEmbedding,
    QuantizedHead,
    QuantizedTable,
    RowTable,
    TiledTable,
    TiledWeight,
    quantize_tables,
    round_groups,
)
from lowmem.kernels.table_format import table_bytes, table_group
from lowmem.loading.loader import LoadOptions, load
from tests.helpers import TINY_STARCHAT, save_source, tiny_model
from tests.kernels.native_oracle import ISAS, Weight, same, using
from tests.rtn_helpers import write_rtn_checkpoint

needs_library = pytest.mark.skipif(not native.available(), reason="the library is not compiled")
BF16 = torch.bfloat16
CPU = torch.device("cpu")
SIZES = [(1, 32), (64, 96), (100, 256), (131, 192)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param) as can:
        if not can:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param


def values(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random rows; some are large, some small, one is zero."""
    rng = torch.Generator().manual_seed(seed)
    result = torch.randn(rows, columns, generator=rng) * 2.0 ** torch.randint(-8, 8, (rows, 1), generator=rng)
    result[rows // 2 if rows > 1 else 1 :][:1] = 0
    return result


def filled(table: QuantizedTable, weight: torch.Tensor) -> QuantizedTable:
    table.fill(0, weight)
    return table


# ---- rounding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128])
def test_no_value_is_further_off_than_half_a_step(group: int) -> None:
    """But for the few at the ends of the range, which are clamped."""
    weight = values(200, 256)
    codes, scales = round_groups(weight, group)
    assert codes.dtype is torch.int8 and scales.dtype is torch.float16
    step = scales.double().repeat_interleave(group, dim=1)
    off = (weight.double() - codes.double() * step).abs()
    inside = (codes > -128) & (codes < 127)
    assert (off <= step.abs() * 0.5001 + 1e-12)[inside].all()
    assert (off <= step.abs() * 1.01 + 1e-12).all()
    assert not codes[100].any() and not scales[100].any()  # zeros stay zeros


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_error_is_less_than_round_to_nearest_leaves(group: int) -> None:
    """Whose scale is the largest magnitude over 127, not rounded to float16; on a real embedding."""
    weight = load_file(TINY_STARCHAT / "model.safetensors")["transformer.wte.weight"].float()
    codes, scales = round_groups(weight, group)
    ours = weight.double() - codes.double() * scales.double().repeat_interleave(group, dim=1)
    grouped = weight.double().view(len(weight), -1, group)
    plain = grouped.abs().amax(-1, keepdim=True) / 127
    theirs = grouped - (grouped / plain).round() * plain
    assert ours.square().sum() < 0.98 * theirs.square().sum()


def test_what_has_few_values_is_kept_exactly() -> None:
    """-128 * s to 127 * s in every group: the least-squares scale is s itself."""
    rng = torch.Generator().manual_seed(3)
    codes = torch.randint(-128, 128, (50, 64), generator=rng)
    codes[:, ::32] = -128
    scales = torch.tensor([-0.5, 0.25, 2.0**-20]).repeat(17)[:50, None]
    found, found_scales = round_groups(codes * scales, 32)
    assert torch.equal(found.float() * found_scales.float().repeat_interleave(32, dim=1), codes * scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e8])
def test_values_that_no_scale_holds_are_refused(bad: float) -> None:
    weight = torch.ones(3, 64)
    weight[1, 40] = bad
    with pytest.raises(ValueError, match="not finite, or too large"):
        round_groups(weight, 32)


# ---- the two layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_both_layouts_hold_the_same(rows: int, columns: int) -> None:
    """In one piece or in slices of whole tiles, and in the bytes that a plan counts."""
    weight = values(rows, columns)
    group = table_group(columns)
    assert group is not None
    codes, scales = round_groups(weight, group)
    expected = codes.float() * scales.float().repeat_interleave(group, dim=1)
    for table in (RowTable(rows, columns, CPU), TiledTable(rows, columns)):
        for first in range(0, rows, 64):
            table.fill(first, weight[first : first + 64])
        assert torch.equal(table.dequantize(), expected)
        assert torch.equal(filled(type(table)(rows, columns, *[CPU] * isinstance(table, RowTable)), weight)
                           .dequantize(), expected)  # fmt: skip
        ids = torch.tensor([[0, rows - 1], [rows // 2, 0]])
        assert torch.equal(table.lookup(ids), expected[ids])
        assert sum(b.nbytes for b in table.buffers()) == table_bytes(rows, columns)
        x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1))
        bias = torch.arange(rows).float()
        assert torch.allclose(table.multiply(x, bias), x @ expected.T + bias, rtol=1e-4, atol=1e-3)


def test_the_words_are_gptqs() -> None:
    """The tiles of a packed GPTQ weight, as `dequantize` reads that."""
    weight = values(128, 64)
    table = TiledTable(128, 64)
    table.fill(0, weight)
    codes, scales = round_groups(weight, 64)
    q = (codes.int() + 128).T.contiguous()
    qweight = pack_rows(q, 8)
    assert torch.equal(table.qweight, qweight.view(16, 2, 64).transpose(0, 1))
    qzeros = pack_zeros(torch.full((1, 128), 128), 8)
    packed = PackedWeight(LinearFormat(8, 64), qweight, qzeros, scales.T.contiguous(), torch.zeros(64).int())
    assert torch.equal(dequantize(packed), table.dequantize())


@needs_library
@pytest.mark.parametrize("bias", [None, torch.float32, BF16], ids=str)
def test_the_product_is_that_of_the_same_weight_untiled(isa: str, bias: torch.dtype | None) -> None:
    """To the bit, for any rows and dtype; and float64's product with what is looked up, nearly."""
    for rows, columns in SIZES:
        table = TiledTable(rows, columns)
        table.fill(0, values(rows, columns))
        own = None if bias is None else torch.randn(rows).to(bias)
        codes, scales = round_groups(values(rows, columns), table.group)
        q = (codes.int() + 128).to(torch.uint8).T.contiguous()
        plain = Weight(8, table.group, q, scales.T.contiguous(), bias=own).packed()
        for dtype in (torch.float32, BF16):
            x = torch.randn(40, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
            y = native_linear.linear(TiledWeight(table, own), x)
            assert y.dtype is dtype and same(y, native_linear.linear(plain, x))
            for few in (1, 3, 16):
                assert same(native_linear.linear(TiledWeight(table, own), x[-few:]), y[-few:])
            exact = x.double() @ table.dequantize().double().T + (0 if own is None else own.double())
            error = (y.double() - exact).norm() / exact.norm()
            assert error < (1e-5 if dtype is torch.float32 else 0.003)


# ---- a model ---------------------------------------------------------------------------------------------


def checkpoint(folder: Path, kind: str = "gpt_bigcode_mqa", **options: Any) -> Path:
    """Packed at 4 bits, all else in float16."""
    write_rtn_checkpoint(tiny_model(kind, dtype=torch.float16, **options), folder)
    return folder


def dense(model: Any) -> Any:
    """A copy of a loaded model, with what its tables hold in plain float32 modules: the oracle."""
    copied = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        if isinstance(module, QuantizedEmbedding | QuantizedHead):
            weight = nn.Parameter(module.table.dequantize(), requires_grad=False)
            new: Any = (
                nn.Embedding(*weight.shape) if isinstance(module, nn.Embedding) else nn.Linear(1, 1, False)
            )
            new.weight = weight
            if isinstance(module, QuantizedHead):
                new.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, new)
    return copied


@pytest.mark.parametrize("kernel", ["native", "reference"])
@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "starcoder2", "llama", "qwen2"])
@torch.inference_mode()
def test_logits_are_those_of_the_dequantized_tables(
    kind: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied pair is one table, the others are two, and no 16-bit copy is left anywhere."""
    if kernel == "native" and not native.available():
        pytest.skip("the library is not compiled")
    monkeypatch.setenv("LOWMEM_CPU_KERNEL", kernel)
    folder = checkpoint(tmp_path, kind)
    model = load(folder, LoadOptions(dtype=torch.float32, head_bits=8)).model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedHead)
    assert (embedding.table is head.table) == (kind not in ("llama", "qwen2"))
    assert isinstance(head.table, TiledTable if kernel == "native" else RowTable)
    assert not [p for p in model.parameters() if p.numel() >= head.table.rows * head.table.columns]
    ids = torch.randint(0, 4096, (1, 30), generator=torch.Generator().manual_seed(1))
    assert torch.equal(embedding(ids), embedding.table.dequantize()[ids])
    expected, found = dense(model)(ids).logits, model(ids).logits
    assert found.dtype is torch.float32 and (found - expected).norm() < 1e-5 * expected.norm()
    plain = load(folder, LoadOptions(dtype=torch.float32)).model(ids).logits
    assert 1e-4 < (found - plain).norm() / plain.norm() < 0.03
    model.tie_weights()
    assert torch.equal(model(ids).logits, found)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, BF16], ids=str)
def test_every_stored_dtype_and_a_dense_model(stored: torch.dtype, tmp_path: Path) -> None:
    """The values of the file are rounded once, not those of a cast to the activations' dtype."""
    save_source(tiny_model("gpt_bigcode_mqa"), tmp_path, dtype=stored)
    loaded = load(tmp_path, LoadOptions(dtype=BF16, head_bits=8))
    weight = tiny_model("gpt_bigcode_mqa").transformer.wte.weight.detach().to(stored)
    codes, scales = round_groups(weight.float(), 64)
    table = loaded.model.transformer.wte.table
    assert torch.equal(table.dequantize(), codes.float() * scales.float().repeat_interleave(64, dim=1))
    assert loaded.label == "bfloat16, 8-bit head" and loaded.model.dtype is BF16
    assert loaded.model.transformer.wte(torch.tensor([3])).dtype is BF16


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "llama"])
def test_a_copy_computes_the_same(kind: str, tmp_path: Path) -> None:
    """Pointers into the original's memory do not travel; new tensors are read."""
    model = load(checkpoint(tmp_path, kind), LoadOptions(dtype=BF16, head_bits=8)).model
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert model(ids).logits.any()  # the library has read the table
        copied = copy.deepcopy(model)
        before = copied(ids).logits
        model.get_output_embeddings().table.scales.zero_()
        assert not model(ids).logits.any()
        assert torch.equal(copied(ids).logits, before)
        table = copied.get_output_embeddings().table
        if isinstance(table, TiledTable):
            table.scales = table.scales * 2
            assert not torch.equal(copied(ids).logits, before)


def test_a_gradient_passes_the_head(tmp_path: Path) -> None:
    head = load(checkpoint(tmp_path, "llama"), LoadOptions(dtype=BF16, head_bits=8)).model.lm_head
    x = torch.randn(3, 64).to(BF16).requires_grad_()
    head(x)[0, 7].backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0], head.table.dequantize()[7].to(BF16)) and not x.grad[1:].any()


def test_an_embedding_of_a_family_keeps_its_own_forward() -> None:
    """As Gemma 3's, which scales what it looks up; also with a padding token."""

    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 3

    own = Scaled(80, 64, padding_idx=79)
    table = filled(RowTable(80, 64, CPU), own.weight.detach())
    ids = torch.tensor([[5, 79], [0, 5]])
    expected = Scaled(80, 64)
    expected.weight = nn.Parameter(table.dequantize())
    embedding = QuantizedEmbedding(own, table, torch.float32)
    for _ in range(2):
        assert torch.equal(embedding(ids), expected(ids))
    assert not list(embedding.parameters())


# ---- what is refused -------------------------------------------------------------------------------------


def test_tables_that_compute_something_else_are_refused() -> None:
    class Odd(nn.Linear):
        """Another forward."""

    for change, message in (
        (lambda m: setattr(m, "lm_head", Odd(64, 4096)), "a head of Odd"),
        (lambda m: setattr(m.transformer, "wte", nn.Embedding(4096, 64, max_norm=1.0)), "an embedding of"),
        (lambda m: setattr(m.transformer, "wte", nn.Embedding(4096, 48)), "48 values are not a multiple"),
    ):
        model = tiny_model("gpt_bigcode_mqa")
        change(model)
        with pytest.raises(SourceError, match=message) as caught:
            quantize_tables(model, CPU, torch.float32)
        assert "--head-bits 16" in str(caught.value)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny_model("gpt_bigcode_mqa", dtype=torch.float16)
    model.transformer.wte.weight.data[77, 5] = float("nan")
    write_rtn_checkpoint(model, tmp_path)
    with pytest.raises(SourceError, match=r"'transformer\.wte\.weight' has values that are not finite"):
        load(tmp_path, LoadOptions(dtype=BF16, head_bits=8))


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="head_bits=4"):
        LoadOptions(head_bits=4)
