"""Embeddings and heads stay in the float16 of their file: exactly what is stored, and no copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowmem.checkpoint.source.mapped import is_mapped
from lowmem.config import SamplingParams
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.decoders.native import NativeDecoder
from lowmem.generate.decoders.native_families import why_not
from lowmem.generate.engine import Engine
from lowmem.kernels.native import header
from lowmem.kernels.native import library as native
from lowmem.kernels.native import linear as native_linear
from lowmem.kernels.stored_embeddings import StoredEmbedding, StoredHead, keep_as_stored
from lowmem.loading.loader import LoadOptions, load
from tests.generate.native_helpers import filled
from tests.helpers import save_source, tiny_model
from tests.kernels.native_oracle import ISAS, same, using
from tests.rtn_helpers import write_rtn_checkpoint

needs_library = pytest.mark.skipif(not native.available(), reason="the library is not compiled")
BF16 = torch.bfloat16


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param) as can:
        if not can:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param


def checkpoint(folder: Path, kind: str = "gpt_bigcode_mqa", **options: Any) -> Path:
    """Packed at 4 bits, all else in float16. Its embedding is not what bfloat16 holds."""
    write_rtn_checkpoint(tiny_model(kind, dtype=torch.float16, **options), folder)
    return folder


def cast_as_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model with its embedding cast to bfloat16, everything else as it is."""
    with monkeypatch.context() as patched:
        patched.setattr("lowmem.loading.placing.keep_as_stored", lambda *_: None)
        return load(folder, LoadOptions(dtype=BF16)).model


# ---- the kernel ------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("bias", [None, torch.float32, torch.float16, BF16], ids=str)
def test_a_float16_weight_against_float64(isa: str, bias: torch.dtype | None) -> None:
    """in * 2^-24 of the sum of all |x w|, as for bfloat16; some weights are denormal."""
    rng = torch.Generator().manual_seed(1)
    for inputs, outputs in ((1, 1), (7, 3), (31, 24), (64, 50), (100, 9), (515, 33)):
        weight = torch.randn(outputs, inputs, generator=rng).half()
        weight[torch.rand(weight.shape, generator=rng) < 0.3] *= 2.0**-20
        b = None if bias is None else torch.randn(outputs, generator=rng).to(bias)
        x = torch.randn(11, inputs, generator=rng)
        exact = x.double() @ weight.double().T + (0 if b is None else b.double())
        size = x.double().abs() @ weight.double().abs().T + (0 if b is None else b.double().abs())
        y = native_linear.dense_linear(x, weight, b)
        assert ((y.double() - exact).abs() <= size * (inputs + 1) * 2.0**-24).all()
        for rows in (1, 2, 3, 5, 10):
            assert same(native_linear.dense_linear(x[11 - rows :], weight, b), y[11 - rows :]), rows


@needs_library
def test_every_float16_is_itself(isa: str) -> None:
    """All 65536 of them, 100 to a row; infinity and NaN too."""
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite, other = values[values.isfinite()], values[~values.isfinite()]
    for inputs, chosen in ((1, values), (33, finite)):
        weight = torch.zeros(len(chosen), inputs, dtype=torch.float16)
        place = torch.arange(len(chosen)) % inputs
        weight[torch.arange(len(chosen)), place] = chosen
        y = native_linear.dense_linear(torch.ones(1, inputs), weight)[0]
        assert same(y + 0.0, chosen.float() + 0.0)
    assert len(other) == 2 * 1024


@needs_library
def test_what_the_kernel_would_not_read_safely_is_refused() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8, dtype=torch.float16)
    assert torch.equal(native_linear.dense_linear(x, weight), torch.full((2, 4), 8.0))
    assert native_linear.dense_linear(x[:0], weight).shape == (0, 4)
    assert native_linear.dense_linear(x[0], weight).shape == (4,)
    for bad in (weight.float(), weight[:, :7], weight[:, ::2], weight[0], weight[:0], weight.T):
        with pytest.raises(ValueError):
            native_linear.dense_linear(x, bad)
    with pytest.raises(ValueError):
        native_linear.dense_linear(x, weight, torch.ones(3))
    with pytest.raises(ValueError):
        native_linear.dense_linear(x.requires_grad_(), weight)


# ---- a loaded model --------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "gpt_bigcode_mha", "starcoder2", "llama", "qwen2"])
def test_tables_stay_in_their_file(kind: str, tmp_path: Path) -> None:
    """The very pages, one tensor for a tied head, and no parameter that hides the activations' dtype."""
    loaded = load(checkpoint(tmp_path, kind), LoadOptions(dtype=BF16))
    model = loaded.model
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, StoredEmbedding) and isinstance(head, StoredHead)
    tables = [m for m in model.modules() if isinstance(m, StoredEmbedding | StoredHead)]
    assert len(tables) == 2 + hasattr(model.base_model, "wpe")
    assert all(m.weight.dtype is torch.float16 and is_mapped(m.weight) for m in tables)
    assert (head.weight is table.weight) == (kind not in ("llama", "qwen2"))
    assert model.dtype is BF16 and loaded.dtype is BF16
    assert {p.dtype for p in model.parameters()} == {BF16}
    assert "float16" not in {str(p.dtype) for p in model.parameters()}
    assert table(torch.tensor([[1, 2]])).dtype is BF16
    model.tie_weights()
    assert (head.weight is table.weight) == (kind not in ("llama", "qwen2"))
    assert head.weight.dtype is torch.float16


def float32_tables(model: Any) -> Any:
    """The model itself with embedding and head as they are stored, in float32: the oracle."""
    table = model.transformer.wte.weight.float()

    class Lookup(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).to(BF16)

    class Head(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return (input.double() @ self.weight.double().T).float()

    for name in ("wte", "wpe"):
        weight = getattr(model.transformer, name).weight
        new = Lookup(*weight.shape)
        new.weight = nn.Parameter(weight.float(), requires_grad=False)
        setattr(model.transformer, name, new)
    model.lm_head = Head(table.shape[1], table.shape[0], bias=False)
    model.lm_head.weight = nn.Parameter(table, requires_grad=False)
    return model


@needs_library
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 60])
@torch.inference_mode()
def test_prefill_is_nearer_to_the_stored_model_than_a_cast(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle has the stored tables in float32, and its head multiplies in float64."""
    folder = checkpoint(tmp_path, hidden=128)
    model, cast = load(folder, LoadOptions(dtype=BF16)).model, cast_as_before(folder, monkeypatch)
    assert type(cast.lm_head) is nn.Linear and cast.lm_head.weight.dtype is BF16
    ids = torch.randint(0, 4096, (1, 60), generator=torch.Generator().manual_seed(2))
    exact = float32_tables(load(folder, LoadOptions(dtype=BF16)).model)(ids, logits_to_keep=rows).logits
    got, before = model(ids, logits_to_keep=rows).logits, cast(ids, logits_to_keep=rows).logits
    assert got.dtype is BF16 and got.shape == exact.shape
    error, error_before = ((y.float() - exact).norm() / exact.norm() for y in (got, before))
    if rows <= header.DECODE_ROWS:
        # Only the logits themselves are rounded: nothing is nearer in bfloat16.
        assert ((got.float() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()
        assert error < 0.8 * error_before
    else:
        assert error < 1.1 * error_before < 0.01


@needs_library
@torch.inference_mode()
def test_decode_reads_the_stored_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A native step equals one with float32 tables in all but float32 rounding; a cast's does not."""
    folder = checkpoint(tmp_path)
    model, cast = load(folder, LoadOptions(dtype=BF16)).model, cast_as_before(folder, monkeypatch)
    assert why_not(model, 64) == ""
    engine = Engine(model, context=64)
    tokens = [t.id for t in engine.generate([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=5))]
    assert isinstance(engine.decoder.fast, NativeDecoder) and len(tokens) == 5

    def stepped(some: Any) -> torch.Tensor:
        slot = filled(model, 20)
        return NativeDecoder(EagerDecoder(some), slot.capacity).step([Feed(slot, [5, 6])]).logits[0]

    rounded = load(folder, LoadOptions(dtype=BF16)).model  # float16 tables that hold what bfloat16 does
    for table in (rounded.transformer.wte, rounded.transformer.wpe, rounded.lm_head):
        table.weight = table.weight.to(BF16).half()  # a buffer
    ours, before = stepped(model), stepped(cast)
    # 2^-3 to 2^-14 of bfloat16 are all float16: the two kernels multiply the same numbers.
    error = (stepped(rounded) - before).norm() / before.norm()
    assert error < 1e-4 < 1e-3 < (ours - before).norm() / before.norm()


@needs_library
def test_a_gradient_passes_the_head(tmp_path: Path) -> None:
    head = load(checkpoint(tmp_path, "llama"), LoadOptions(dtype=BF16)).model.lm_head
    x = torch.randn(3, 64).to(BF16).requires_grad_()
    head(x)[0, 7].backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0], head.weight[7].to(BF16)) and not x.grad[1:].any()


# ---- where it is not done --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["reference", "torch", "missing", "float32", "float16", "stored in bfloat16", "dense"]
)
def test_else_the_tables_have_the_activations_dtype(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(way, BF16)
    if way in ("reference", "torch"):
        monkeypatch.setenv("LOWMEM_CPU_KERNEL", way)
    if way == "missing":
        monkeypatch.setattr(native, "_load", lambda: "not here")
    stored = BF16 if way == "stored in bfloat16" else torch.float16
    if way == "dense":
        save_source(tiny_model("gpt_bigcode_mqa"), tmp_path, dtype=stored)
    else:
        write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa", dtype=stored), tmp_path)
    model = load(tmp_path, LoadOptions(dtype=dtype)).model
    assert type(model.transformer.wte) is nn.Embedding and type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.dtype is dtype


@needs_library
def test_only_plain_tables_are_swapped() -> None:
    """Of a tied pair both or none; what computes something of its own stays as it is."""

    class Scaled(nn.Embedding):
        """Another forward."""

    def swapped(model: Any, *names: str) -> set[str]:
        keep_as_stored(model, names, BF16)
        return {n for n, m in model.named_modules() if isinstance(m, StoredEmbedding | StoredHead)}

    tied = ("transformer.wte.weight", "transformer.wpe.weight")
    with torch.device("meta"):
        scaled = Scaled(4096, 64)
    model = tiny_model("gpt_bigcode_mqa")
    model.transformer.wte = scaled
    model.tie_weights()
    assert swapped(model, *tied) == {"transformer.wpe"}
    model = tiny_model("gpt_bigcode_mqa")
    model.transformer.h[0].extra = nn.Embedding(8, 64)
    both = {"transformer.wte", "transformer.wpe", "lm_head"}
    assert swapped(model, *tied, "transformer.h.0.extra.weight", "no.such.tensor") == both
    model = tiny_model("llama", tied=False)
    assert swapped(model, "lm_head.weight") == {"lm_head"}
