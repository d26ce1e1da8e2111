"""Checkpoints by their headers alone, without heavy libraries, agree with the readers of weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from lowmem.benchmarks.experiments.starchat.replicas import gptq_header_replica, starchat_header_replica
from safetensors import safe_open
from safetensors.torch import save_file

from lowmem.checkpoint.headers.folder import gguf_metadata, read_config_json, tensor_headers
from lowmem.checkpoint.headers.gguf import TYPES
from lowmem.checkpoint.headers.safetensors import DTYPE_NAMES
from lowmem.checkpoint.source.open import open_source
from lowmem.config import BITS, QuantConfig
from lowmem.errors import SourceError
from tests.checkpoint.test_source_gguf import Q, real_file, write_gguf
from tests.convert.convert_helpers import quick_convert
from tests.helpers import save_source, starchat_replica, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt_bigcode_mqa", vocab=4096)


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


# ---- the same as the readers of weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_as_open_source_sees_it(model, tmp_path, format, shards, dtype):
    folder = save_source(model, tmp_path / "s", format=format, shards=shards, dtype=dtype)
    headers = tensor_headers(folder)
    infos = open_source(str(folder)).infos
    assert {n: (h.shape, h.dtype, h.nbytes, h.file) for n, h in headers.items()} == {
        n: (i.shape, i.dtype, i.nbytes, i.file) for n, i in infos.items()
    }
    assert all(h.name == n for n, h in headers.items())


def test_a_numbered_set_without_an_index_and_a_single_file(model, tmp_path):
    folder = save_source(model, tmp_path / "s", shards=3)
    whole = tensor_headers(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert tensor_headers(folder) == whole
    one = folder / "model-00001-of-00003.safetensors"
    assert tensor_headers(one) == {n: h for n, h in whole.items() if h.file == one.name}
    one.unlink()
    with pytest.raises(SourceError, match="has no model-00001-of-00003"):
        tensor_headers(folder)


@pytest.mark.parametrize("bits", BITS)
def test_a_packed_checkpoint_by_safetensors_own_reader(tmp_path, bits):
    write_rtn_checkpoint(tiny_model("llama"), tmp_path / "q", bits=bits, shards=2)
    found = tensor_headers(tmp_path / "q")
    count = 0
    for file in (tmp_path / "q").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is not a mapping)
                tensor = opened.get_tensor(name)
                header = found[name]
                assert (header.shape, header.dtype) == (tuple(tensor.shape), str(tensor.dtype)[6:])
                assert (header.nbytes, header.file) == (tensor.nbytes, file.name)
                count += 1
    assert count == len(found)


def test_every_dtype_has_torchs_size():
    for name, itemsize in DTYPE_NAMES.values():
        assert getattr(torch, name).itemsize == itemsize, name


def test_stored_bytes_not_those_after_reading(tmp_path):
    """float64 is read as float32; its file is as large as it is."""
    save_file({"x": torch.zeros(3, 5, dtype=torch.float64)}, tmp_path / "model.safetensors")
    header = tensor_headers(tmp_path)["x"]
    assert (header.dtype, header.nbytes) == ("float64", 120)


# ---- GGUF


def test_a_gguf_by_the_gguf_packages_own_reader(tmp_path):
    path = tmp_path / "small.gguf"
    kinds = (Q.F16, Q.Q8_0, Q.BF16, Q.Q4_0, Q.F32, Q.Q5_1)
    model = tiny_model("llama", vocab=96, hidden=64, tied=False)
    write_gguf(model, path, kinds, "llama", {"general.license": "mit"})
    found = tensor_headers(path)
    assert tensor_headers(tmp_path) == found
    tensors = gguf.GGUFReader(path).tensors
    assert len(found) == len(tensors) > 20
    for tensor in tensors:
        header = found[tensor.name]
        assert header.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (header.dtype, header.nbytes) == (tensor.tensor_type.name, int(tensor.n_bytes))
        assert header.file == "small.gguf"
    metadata = gguf_metadata(tmp_path)
    assert metadata["general.architecture"] == "llama"
    assert (metadata["llama.block_count"], metadata["general.license"]) == (2, "mit")
    assert "tokenizer.ggml.tokens" not in metadata


def test_the_real_gguf():
    found = tensor_headers(real_file())
    assert sum(math.prod(h.shape) for h in found.values()) == 134_515_008
    assert {h.dtype for h in found.values()} == {"F32", "Q4_1", "Q8_0"}
    assert gguf_metadata(real_file())["llama.embedding_length"] == 576


def test_our_table_of_ggml_types_is_that_of_the_gguf_package():
    for number, (name, *sizes) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, tuple(sizes)) == (name, gguf.GGML_QUANT_SIZES[kind])


def test_a_type_that_only_the_gguf_package_knows(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    import numpy as np

    writer.add_tensor("x", np.zeros((2, 66), dtype=np.uint8), raw_dtype=Q.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (header,) = tensor_headers(path).values()
    assert (header.shape, header.dtype, header.nbytes) == ((2, 256), "IQ2_XXS", 132)


def test_a_part_of_a_split_model_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    model = tiny_model("llama", vocab=96)
    write_gguf(model, path, (Q.F16,), "llama", {"split.count": 3})
    for read in (tensor_headers, gguf_metadata):
        with pytest.raises(SourceError, match="one of 3 parts"):
            read(path)


# ---- what is damaged or missing


def damage_index(folder: Path, **changes: object) -> None:
    (path,) = folder.glob("*.index.json")
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": index["weight_map"] | changes}))


def shard(folder: Path) -> Path:
    return sorted(path for path in folder.iterdir() if "-00002-of-" in path.name)[0]


def duplicate(folder: Path) -> None:
    next(iter(folder.glob("*.index.json"))).unlink()
    if shard(folder).suffix == ".safetensors":
        shutil.copyfile(folder / "model-00001-of-00003.safetensors", shard(folder))


DAMAGE = {
    "cut short": lambda f: os.truncate(shard(f), shard(f).stat().st_size - 7),
    "cut to a stump": lambda f: os.truncate(shard(f), 60),
    "emptied": lambda f: os.truncate(shard(f), 0),
    "gone": lambda f: shard(f).unlink(),
    "a ghost in the index": lambda f: damage_index(f, ghost=shard(f).name),
    "a path in the index": lambda f: damage_index(f, x="../x.safetensors"),
    "an index that is no JSON": lambda f: next(iter(f.glob("*.index.json"))).write_text("{"),
    "a tensor twice": duplicate,
    "nothing": lambda f: [path.unlink() for path in f.iterdir() if path.name != "config.json"],
    "two GGUFs": lambda f: [
        *[path.unlink() for path in f.iterdir() if path.name != "config.json"],
        (f / "a.gguf").touch(),
        (f / "b.gguf").touch(),
    ],
}


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_gives_the_message_of_the_readers_of_weights(model, tmp_path, format, case):
    folder = save_source(model, tmp_path / "s", format=format, shards=3)
    DAMAGE[case](folder)
    with pytest.raises(SourceError) as theirs:
        open_source(str(folder))
    with pytest.raises(SourceError) as ours:
        tensor_headers(folder)
    assert str(ours.value) == str(theirs.value)
    assert "\n" not in str(ours.value)


@pytest.mark.parametrize("path", ["nothing", "a\0b", "notes.txt", "empty.gguf", "empty.safetensors"])
def test_what_is_no_checkpoint(tmp_path, path):
    for name in ("notes.txt", "empty.gguf", "empty.safetensors"):
        (tmp_path / name).touch()
    for read in (tensor_headers, read_config_json, gguf_metadata):
        with pytest.raises(SourceError) as caught:
            read(tmp_path / path)
        assert "\n" not in str(caught.value)


def test_config_json_as_it_stands(model, tmp_path):
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "q", bits=3)
    config = read_config_json(tmp_path / "q")
    assert (config["n_embd"], config["quantization_config"]["bits"]) == (64, 3)
    assert read_config_json(tmp_path / "q" / "model.safetensors") == config
    (tmp_path / "q" / "config.json").write_text("[]")
    with pytest.raises(SourceError, match="JSON object"):
        read_config_json(tmp_path / "q")


def test_headers_need_no_heavy_library(model, tmp_path):
    """A plan must not cost the seconds that torch takes to import."""
    save_source(model, tmp_path / "safetensors", shards=2)
    save_source(model, tmp_path / "bin", format="bin", shards=2)
    (tmp_path / "gguf").mkdir()
    write_gguf(tiny_model("llama", vocab=96), tmp_path / "gguf" / "x.gguf", (Q.Q4_1,), "llama")
    code = (
        "import sys\n"
        "from lowmem.checkpoint.headers.folder import gguf_metadata, read_config_json, tensor_headers\n"
        "import lowmem.checkpoint.cache\n"
        "for folder in sys.argv[1:]:\n"
        "    assert len(tensor_headers(folder)) > 10\n"
        "    gguf_metadata(folder) if folder.endswith('gguf') else read_config_json(folder)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    folders = [str(tmp_path / kind) for kind in ("safetensors", "bin", "gguf")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, *folders], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr


# ---- StarChat Alpha's real layout


def test_the_replica_is_starchat_alpha_by_every_number(tmp_path):
    folder = starchat_header_replica(tmp_path / "starchat")
    found = tensor_headers(folder)
    assert sum(math.prod(h.shape) for n, h in found.items() if n != "lm_head.weight") == 15_517_480_960
    assert sum(h.nbytes for h in found.values()) == 31_638_990_848
    assert {h.dtype for h in found.values()} == {"float16"}
    assert len({h.file for h in found.values()}) == 4
    assert found["transformer.h.39.attn.c_attn.weight"].shape == (6400, 6144)
    assert found["lm_head.weight"].shape == found["transformer.wte.weight"].shape == (49156, 6144)
    assert disk_bytes(folder) < 5_000_000
    for file in folder.glob("*.bin"):  # torch sees the same, mapped
        for name, tensor in torch.load(file, mmap=True, weights_only=True).items():
            assert (found[name].shape, found[name].file) == (tuple(tensor.shape), file.name)
            assert found[name].nbytes == tensor.nbytes


@pytest.mark.parametrize(("bits", "mebibytes"), [(8, 15_483), (4, 8_196), (3, 6_375)])
def test_the_packed_replica_is_of_the_published_size(tmp_path, bits, mebibytes):
    folder = gptq_header_replica(tmp_path / "q", bits, 128)
    found = tensor_headers(folder)
    assert round(sum(h.nbytes for h in found.values()) / 2**20) == mebibytes
    assert len(list(folder.glob("*.safetensors"))) == math.ceil(mebibytes / 4096)
    assert disk_bytes(folder) < 5_000_000


def test_replicas_of_small_dimensions_are_what_is_really_written(tmp_path):
    """The same code at a size for which real files can be written, by torch.save and by the converter."""
    dimensions = {"layers": 2, "n_embd": 64, "heads": 4, "n_positions": 256}
    real = starchat_replica(tmp_path / "real", **dimensions)
    replica = starchat_header_replica(tmp_path / "replica", **dimensions)
    placed = {name: (h.shape, h.dtype, h.nbytes) for name, h in tensor_headers(real).items()}
    assert {name: (h.shape, h.dtype, h.nbytes) for name, h in tensor_headers(replica).items()} == placed
    assert read_config_json(real) == read_config_json(replica)
    quick_convert(real, tmp_path / "out", QuantConfig(bits=3, group_size=32), rows=4, row_length=32)
    packed = gptq_header_replica(tmp_path / "packed", 3, 32, **dimensions)
    written = [replace(h, begin=0) for h in tensor_headers(tmp_path / "out").values()]
    assert [replace(h, begin=0) for h in tensor_headers(packed).values()] == written
    mine, theirs = read_config_json(packed), read_config_json(tmp_path / "out")
    mine["quantization_config"].pop("meta"), theirs["quantization_config"].pop("meta")
    assert mine == theirs
    report = json.loads((packed / "lowmem-report.json").read_text())
    assert report.keys() <= json.loads((tmp_path / "out" / "lowmem-report.json").read_text()).keys()
