"""Placing tensors: mapped, in slices, quantized on the fly, on two devices; and the memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowmem import config
from lowmem.kernels import bitsandbytes as bnb
from lowmem.loading import placing
from lowmem.loading.loader import LoadOptions, load, weight_bytes
from lowmem.loading.placing import Placement, connect, moved
from tests.commands.command_lines import ENVIRONMENT
from tests.helpers import TINY_STARCHAT, save_source, tiny_model
from tests.loading.test_loader import assert_same_logits, logits
from tests.rtn_helpers import layer_linears, write_rtn_checkpoint


def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows at a time."""
    monkeypatch.setattr(placing, "SLICE_BYTES", 1)
    monkeypatch.setattr(placing, "QUANTIZED_SLICE_BYTES", 1)


KINDS = ["gpt_bigcode_mqa", "llama"]


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_a_cast_are_mapped(kind: str, tmp_path: Path) -> None:
    """Weights share the file's pages; writing into them does not reach the file."""
    save_source(tiny_model(kind), tmp_path, dtype=torch.bfloat16)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = load(tmp_path, LoadOptions(dtype=torch.bfloat16))
    storages = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    assert len(storages) == 1, "one map of one file"
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_tensor_that_is_not_aligned_is_read(tmp_path: Path) -> None:
    """Safetensors files of other tools may start their data anywhere."""
    model = tiny_model("llama")
    save_source(model, tmp_path, dtype=torch.float32)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip(b" ")
    header += b" " * (1 + -(len(header) + 8) % 4)  # the data then begins one byte past a multiple of 4
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    loaded = load(tmp_path, LoadOptions(dtype=torch.float32))
    assert_same_logits(logits(loaded.model), logits(model))


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_slices_give_the_same_weights(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With slices of 64 rows every table is moved in several pieces."""
    model = tiny_model("gpt_bigcode_mqa")
    save_source(model, tmp_path, format=format, dtype=torch.float16)
    small_slices(monkeypatch)
    state = load(tmp_path, LoadOptions(dtype=torch.float32)).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor.half().float()), name


@pytest.mark.parametrize("method", ["int8", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sliced", [False, True])
def test_on_the_fly_is_what_bitsandbytes_makes_of_the_whole_model(
    method: bnb.Method, kind: str, sliced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the dense model with each linear replaced by bitsandbytes' own conversion."""
    import bitsandbytes
    import transformers

    model: Any = tiny_model(kind, hidden=128)
    save_source(model, tmp_path, dtype=torch.bfloat16)
    if sliced:
        small_slices(monkeypatch)
    loaded = load(tmp_path, LoadOptions(dtype=torch.bfloat16, on_the_fly=method))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, linear in layer_linears(model).items():
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        if method == "int8":
            other: Any = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
            other.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False)
        else:
            other = bitsandbytes.nn.Linear4bit(
                *shape, quant_type="nf4", compress_statistics=False, compute_dtype=torch.bfloat16
            )
            other.weight = bitsandbytes.nn.Params4bit(
                linear.weight.data, quant_type="nf4", compress_statistics=False, module=other
            )
        other.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, other.to("cpu").eval())
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.kernel == {"int8": "bitsandbytes int8", "nf4": "bitsandbytes NF4"}[method]
    dense = load(tmp_path, LoadOptions(dtype=torch.bfloat16))
    assert (
        0
        < (logits(dense.model) - logits(loaded.model)).float().norm()
        < 0.5 * logits(dense.model).float().norm()
    )
    assert weight_bytes(loaded.model) < weight_bytes(dense.model)


def test_a_linear_that_nf4_cannot_slice_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 inputs are not a multiple of 64: a block spans two rows."""
    model = tiny_model("gpt_bigcode_mha", hidden=96, heads=3)
    save_source(model, tmp_path, dtype=torch.bfloat16)
    whole = logits(load(tmp_path, LoadOptions(dtype=torch.bfloat16, on_the_fly="nf4")).model)
    small_slices(monkeypatch)
    assert torch.equal(
        whole, logits(load(tmp_path, LoadOptions(dtype=torch.bfloat16, on_the_fly="nf4")).model)
    )


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "llama", "qwen2"])
@pytest.mark.parametrize("quantized", [False, True])
def test_layers_beside_the_card_change_nothing(kind: str, quantized: bool, tmp_path: Path) -> None:
    """Both halves are on the CPU here; that tensors do move is the next test's, and the gpu tests'."""
    model = tiny_model(kind, layers=3)
    if quantized:
        write_rtn_checkpoint(model, tmp_path)
    else:
        save_source(model, tmp_path)
    loaded = load(tmp_path, LoadOptions(dtype=torch.float32, split=1))
    assert loaded.cpu_layers == 2
    assert_same_logits(logits(loaded.model), logits(model))


def test_tensors_follow_the_layers() -> None:
    """A recorder in place of `.to`: what each layer and the norm behind them are moved to."""
    seen: list[tuple[str, torch.device]] = []

    class Recorder(torch.Tensor):
        def to(self, *args: Any, **_: Any) -> Any:
            seen.append((current[0], args[0]))
            return self

    class Layer(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor, mask: Any = None, pair: Any = None) -> torch.Tensor:
            return x

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = Layer("wte")
            self.h = nn.ModuleList([Layer(f"h{i}") for i in range(4)])
            self.ln_f = Layer("ln_f")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = Inner()

    model = Model()
    card = torch.device("cuda", 0)
    placement = Placement(card, "transformer.h", 2)
    assert [placement.of(f"transformer.h.{i}.x").type for i in range(4)] == ["cuda", "cuda", "cpu", "cpu"]
    assert placement.of("transformer.ln_f.weight") == placement.of("lm_head.weight") == card
    connect(model, placement)
    x = torch.zeros(1).as_subclass(Recorder)
    current = [""]
    inner = model.transformer
    for module in [inner.wte, *inner.h, inner.ln_f]:
        current[0] = module.name
        module(x, mask=x, pair=(x, {"k": [x]}))
    cpu = torch.device("cpu")
    expected = {"wte": card, "h0": card, "h1": card, "h2": cpu, "h3": cpu, "ln_f": card}
    assert dict(seen) == expected
    assert len(seen) == 4 * 6


def test_moved_leaves_other_things_alone() -> None:
    cache = object()
    value = (1, None, cache, [torch.ones(1)], {"a": torch.ones(2)})
    result = moved(value, torch.device("meta"))
    assert result[:3] == (1, None, cache)
    assert result[3][0].is_meta and result[4]["a"].is_meta


CHILD = """
import json, sys, pathlib
import torch
torch.set_num_threads(1)
from lowmem.loading.loader import LoadOptions, load
from lowmem.plan import device as machine
small, path, method = sys.argv[1:]
options = LoadOptions(dtype=torch.bfloat16, on_the_fly=method if method != "stored" else None)
load(small, options)  # the libraries come in
before = machine.host_memory_used()
pathlib.Path("/proc/self/clear_refs").write_text("5")
loaded = load(path, options)
print(json.dumps({"weights": loaded.weight_bytes, "peak": machine.host_memory_peak() - before}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """A model whose largest tensor has 256 MiB in 16 bits, eight slices, in both of them."""
    base = tmp_path_factory.mktemp("large")
    model = tiny_model("gpt_bigcode_mqa", layers=1, hidden=128, heads=4, vocab=1 << 20, positions=64)
    return {
        dtype: save_source(model, base / str(dtype), dtype=dtype) for dtype in (torch.float16, torch.bfloat16)
    }


@pytest.mark.parametrize(
    ("dtype", "method"),
    [
        (torch.float16, "stored"),
        (torch.bfloat16, "stored"),
        (torch.float16, "nf4"),
        pytest.param(torch.bfloat16, "nf4", marks=pytest.mark.slow),
        pytest.param(torch.float16, "int8", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "int8", marks=pytest.mark.slow),
    ],
)
def test_a_load_takes_the_model_and_a_slice(
    method: str, dtype: torch.dtype, large: dict[torch.dtype, Path]
) -> None:
    """Measured in a process of its own: the model's size and a constant, whatever is cast or quantized. The
    largest tensor read whole would show."""
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(TINY_STARCHAT), str(large[dtype]), method],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout)
    assert numbers["weights"] > 255 << 20
    assert numbers["peak"] < numbers["weights"] + 3 * config.SLICE_BYTES
    if method == "stored" and dtype is torch.bfloat16:
        assert numbers["peak"] < 64 << 20, "nothing is read before it is used"
