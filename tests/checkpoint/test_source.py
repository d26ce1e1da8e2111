"""Sources return the tensors that were written, from every kind of folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.checkpoint.source.bin import BinSource
from lowmem.checkpoint.source.names import resolve_names
from lowmem.checkpoint.source.open import TensorInfo, open_source
from lowmem.checkpoint.source.safetensors import SafetensorsSource
from lowmem.errors import SourceError
from tests.helpers import (
    DIALOGUE_TOKENS,
    REPO,
    STARCHAT_VOCAB,
    TINY_STARCHAT,
    fails,
    save_source,
    starchat_replica,
    tiny_model,
    write_weights,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt_bigcode_mqa", vocab=4096)


@pytest.fixture(scope="module")
def replica(tmp_path_factory) -> Path:
    return starchat_replica(tmp_path_factory.mktemp("starchat") / "replica", n_positions=512)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return save_source(model, tmp_path / "source", shards=3)


# ---- reading what was written


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_tensor_comes_back(model, tmp_path, format, shards, dtype):
    folder = save_source(
        model, tmp_path / "s", format=format, shards=shards, dtype=dtype, duplicate_head=True
    )
    source = open_source(str(folder))
    assert (source._kind, source.display, source.path) == (format, str(folder), folder)
    written = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    assert set(source.infos) == set(written)
    assert len({info.file for info in source.infos.values()}) == shards
    for name, tensor in written.items():
        got, info = source.read(name), source.infos[name]
        assert torch.equal(got, tensor) and got.dtype == dtype
        assert (info.shape, info.dtype) == (tuple(tensor.shape), str(dtype).removeprefix("torch."))
        assert info.nbytes == tensor.numel() * dtype.itemsize
        assert got.is_contiguous() and got.data_ptr() % 64 == 0
        got.zero_()  # its own memory: the next read is not touched by this
        assert torch.equal(source.read(name), tensor)
    source.release()


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "rows",
    [
        slice(3, 9),
        slice(4090, 9999),
        slice(-5, None),
        slice(5, 5),
        slice(1, 40, 7),
        torch.tensor([7, 8, 9, 3, 4095, 7]),
    ],
    ids=str,
)
def test_rows_of_a_table(model, tmp_path, format, rows):
    source = open_source(str(save_source(model, tmp_path / "s", format=format)))
    table = model.state_dict()["transformer.wte.weight"]
    got = source.read("transformer.wte.weight", rows)
    assert torch.equal(got, table[rows]) and got.is_contiguous()
    assert got.untyped_storage().nbytes() == got.numel() * 4  # not a view of the whole table
    for bad in (torch.tensor([4096]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            source.read("transformer.wte.weight", bad)
    with pytest.raises(ValueError, match=r"ln_f\.bias"):
        source.read("transformer.ln_f.bias", slice(0, 2))


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_float64_comes_as_float32_and_integers_are_no_weights(model, tmp_path, format):
    folder = save_source(model, tmp_path / "s")
    (folder / "model.safetensors").unlink()
    wide = torch.randn(5, 7, dtype=torch.float64)
    tensors = {
        "a": wide,
        "b": torch.arange(6).reshape(2, 3),
        "c": torch.arange(4),
        "d": wide[0].clone(),
        "e": wide.t(),
    }
    write_weights(tensors, folder, format=format)
    source = open_source(str(folder))
    assert source.infos["a"] == TensorInfo((5, 7), "float32", source.infos["a"].file)
    assert torch.equal(source.read("a"), wide.float())
    assert torch.equal(source.read("a", slice(1, 3)), wide[1:3].float())
    assert torch.equal(source.read("e"), wide.t().float()) and source.read("e").is_contiguous()
    assert torch.equal(source.read("c"), torch.arange(4))  # a 1-D buffer that no linear owns
    with pytest.raises(SourceError, match="'b' is int64"):
        source.read("b")


def test_a_transposed_view_in_a_pickle_is_laid_out_anew(model, tmp_path):
    folder = save_source(model, tmp_path / "s", format="bin")
    values = torch.randn(6, 4)
    torch.save({"v": values.t(), "part": values[2:4]}, folder / "pytorch_model.bin")
    source = open_source(str(folder))
    assert torch.equal(source.read("v"), values.t()) and source.read("v").is_contiguous()
    assert torch.equal(source.read("part"), values[2:4])


def test_single_file_and_unusual_names(model, folder, tmp_path):
    one = save_source(model, tmp_path / "one")
    (one / "model.safetensors").rename(one / "weights.safetensors")
    for what in (one, one / "weights.safetensors"):
        source = open_source(str(what))
        assert source.path == one and "transformer.wte.weight" in source.infos
    # A complete numbered set needs no index; an incomplete one is named.
    (folder / "model.safetensors.index.json").unlink()
    assert set(open_source(str(folder)).infos) == set(source.infos)
    (folder / "model-00002-of-00003.safetensors").unlink()
    fails("has no model-00002-of-00003.safetensors", str(folder))
    shutil.copy(one / "weights.safetensors", one / "other.safetensors")
    fails("no index", str(one))


def test_safetensors_are_preferred_to_pickles(model, tmp_path):
    folder = save_source(model, tmp_path / "s")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert isinstance(open_source(str(folder)), SafetensorsSource)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_memory_is_bounded_by_the_tensor(model, tmp_path, format):
    """32 tensors of 4 MiB are read in turn: peak memory must hold only a few of them."""
    folder = save_source(model, tmp_path / "s", format=format)
    for path in folder.glob("*model*"):
        path.unlink()
    big = torch.zeros(2**20)
    write_weights({f"t{i}": big.clone() for i in range(32)}, folder, format=format, shards=2)
    code = """
import sys
from lowmem.checkpoint.source import bin
from lowmem.checkpoint.source.open import open_source
bin.REMAP_BYTES = 16 << 20
def peak():
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) / 1024
source = open_source(sys.argv[1])
source.read('t0'); before = peak()
for i in range(32):
    tensor = source.read(f't{i}')
print(peak() - before)
"""
    # Freed blocks go back to the system at once, so that what is counted is what is held.
    env = {**os.environ, "PYTHONPATH": str(REPO), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    # MiB, of 128 in all: two tensors, and for pickles what is mapped at a time beside them.
    assert float(done.stdout) < (12 if format == "safetensors" else 32)


# ---- names and tied heads


def infos(*names: str) -> dict[str, TensorInfo]:
    return {name: TensorInfo((2, 2), "float32", "f") for name in names}


@pytest.mark.parametrize(
    ("stored", "expected", "result"),
    [
        (["transformer.h.0.w", "lm_head.w"], ["transformer.h.0.w", "lm_head.w"], None),
        (["h.0.w", "wte.w"], ["transformer.h.0.w", "transformer.wte.w"], ["h.0.w", "wte.w"]),
        (["h.0.w", "lm_head.w"], ["transformer.h.0.w", "lm_head.w"], ["h.0.w", "lm_head.w"]),
        (["model.h.0.w", "model.wte.w"], ["h.0.w", "wte.w"], ["model.h.0.w", "model.wte.w"]),
        (
            ["model.a.h.0.w", "model.lm_head.w"],
            ["a.h.0.w", "lm_head.w"],
            ["model.a.h.0.w", "model.lm_head.w"],
        ),
        (["a.b.h.w", "a.b.x.w"], ["h.w", "x.w"], ["a.b.h.w", "a.b.x.w"]),
    ],
)
def test_resolve_names(stored, expected, result):
    assert resolve_names(infos(*stored), expected) == dict(zip(expected, result or expected, strict=True))


def test_resolve_names_says_the_first_that_is_missing():
    with pytest.raises(SourceError, match=r"'transformer\.h\.1\.w'"):
        resolve_names(
            infos("h.0.w", "wte.w"), ["transformer.h.0.w", "transformer.h.1.w", "transformer.h.2.w"]
        )
    with pytest.raises(SourceError, match=r"'y\.w'"):  # one stored tensor cannot be two of the model's
        resolve_names(infos("w"), ["x.w", "y.w"])
    assert resolve_names({}, []) == {}


@given(st.lists(st.text("ab.", min_size=1, max_size=9), unique=True, max_size=8), st.text("ab", max_size=2))
def test_resolve_names_under_any_prefix(names, prefix):
    """Names under one common prefix are resolved one to one."""
    stored = infos(*(f"{prefix}.{name}" if prefix else name for name in names))
    found = resolve_names(stored, names)
    assert (
        list(found) == names and len(set(found.values())) == len(names) and set(found.values()) <= set(stored)
    )


def test_a_bare_base_model_as_transformers_saves_it(model, tmp_path):
    model.transformer.save_pretrained(tmp_path / "base")
    source = open_source(str(tmp_path / "base"))
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    for name, stored in resolve_names(source.infos, names).items():
        assert torch.equal(source.read(stored), model.state_dict()[name])


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_head_is_tied(model, tmp_path, format, monkeypatch):
    names = ("transformer.wte.weight", "lm_head.weight")
    assert open_source(str(save_source(model, tmp_path / "a", format=format))).head_is_tied(*names)
    twice = save_source(model, tmp_path / "b", format=format, duplicate_head=True)
    source = open_source(str(twice))
    reads: list[int] = []
    read = source.read
    monkeypatch.setattr(
        source, "read", lambda name, rows=None: (t := read(name, rows), reads.append(t.nbytes))[0]
    )
    monkeypatch.setattr("lowmem.checkpoint.source.base._COMPARE_BYTES", 100_000)
    assert source.head_is_tied(*names)
    assert len(reads) > 10 and max(reads) <= 100_000
    assert sum(reads) == 2 * source.infos["lm_head.weight"].nbytes
    with pytest.raises(SourceError, match="no tensor 'nope'"):
        source.head_is_tied("nope", "lm_head.weight")
    other = model.state_dict() | {"lm_head.weight": model.lm_head.weight.detach().clone()}
    other["lm_head.weight"][-1, -1] += 1
    for path in twice.glob("*model*"):
        path.unlink()
    write_weights({name: t.detach().clone() for name, t in other.items()}, twice, format=format)
    assert not open_source(str(twice)).head_is_tied(*names)


def test_a_missing_head_that_is_not_tied(tmp_path):
    model = tiny_model("llama", tied=False)
    folder = save_source(model, tmp_path / "s")
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    write_weights(tensors, folder)
    with pytest.raises(SourceError, match=r"no tensor 'lm_head\.weight'"):
        open_source(str(folder)).head_is_tied("model.embed_tokens.weight", "lm_head.weight")


# ---- real layouts


def test_starchat_alphas_layout(replica):
    source = open_source(str(replica))
    assert isinstance(source, BinSource) and len(source.shards()) == 4
    assert {info.dtype for info in source.infos.values()} == {"float16"}
    assert source.infos["lm_head.weight"].shape == (STARCHAT_VOCAB, 64)
    assert source.config().vocab_size == STARCHAT_VOCAB and source.config().multi_query
    assert source.license_name() == "bigcode-openrail-m"
    assert source.head_is_tied("transformer.wte.weight", "lm_head.weight")
    tokenizer = source.tokenizer()
    assert len(tokenizer) == STARCHAT_VOCAB
    assert tokenizer.convert_tokens_to_ids(list(DIALOGUE_TOKENS)) == [49152, 49153, 49154, 49155]
    text = "<|user|>\ndef f(x): return x + 12345  # é\n<|end|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and ids[0] == 49153 and ids[-1] == 49155
    tiny = open_source(str(TINY_STARCHAT)).tokenizer()
    assert tokenizer("import os\n").input_ids == tiny("import os\n").input_ids


def test_the_embedded_model_equals_transformers_own_reading():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_STARCHAT, dtype="auto").state_dict()
    source = open_source(str(TINY_STARCHAT))
    names = resolve_names(source.infos, [name for name in model if name != "lm_head.weight"])
    for name, stored in names.items():
        got = source.read(stored)
        assert torch.equal(got, model[name]) and got.dtype == model[name].dtype == torch.bfloat16
