"""Indexes, configs, tokenizers, side files, licences and fingerprints of source folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lowmem.checkpoint.source.open import open_source
from lowmem.errors import SourceError
from tests.helpers import (
    fails,
    save_source,
    tiny_model,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt_bigcode_mqa", vocab=4096)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return save_source(model, tmp_path / "source", shards=3)


# ---- indexes and folders


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_an_index_that_lies(model, tmp_path, format):
    folder = save_source(model, tmp_path / "s", format=format, shards=2)
    (path,) = folder.glob("*.index.json")
    index = json.loads(path.read_text())

    def with_map(**changes: object) -> str:
        path.write_text(json.dumps({"weight_map": index["weight_map"] | changes}))
        return str(folder)

    file = index["weight_map"]["transformer.wte.weight"]
    for bad in ("../x", "/etc/passwd", "a/b.safetensors", "..", "", "C:\\x", 7, None, "a\nb"):
        fails("not the name of a file in the same folder", with_map(extra=bad))
    fails("has no gone-00001", with_map(extra="gone-00001"))
    fails(f"{file} does not hold tensor 'ghost'", with_map(ghost=file))
    path.write_text("{")
    fails("not valid JSON", str(folder))
    path.write_text('{"weight_map": []}')
    fails("has no weight_map", str(folder))


def test_no_checkpoint(tmp_path, model):
    fails("does not exist", str(tmp_path / "nothing"))
    fails("does not exist", "a/b/c")
    fails("does not exist", "x" * 5000)
    fails("does not exist", "a\0b")
    fails("does not exist", "")
    fails("holds no weights", str(tmp_path))
    (tmp_path / "empty.gguf").touch()
    fails("is empty", str(tmp_path / "empty.gguf"))
    (tmp_path / "notes.txt").write_text("hello")
    fails("not a checkpoint", str(tmp_path / "notes.txt"))
    folder = save_source(model, tmp_path / "s")
    (folder / "config.json").unlink()
    fails("has no config.json", str(folder))
    fails("has no config.json", str(folder / "model.safetensors"))
    for text, message in (("{", "not valid JSON"), ("[1]", "JSON object"), ("\xff", "not valid JSON")):
        (folder / "config.json").write_text(text, encoding="latin-1")
        fails(message, str(folder))


def test_a_local_folder_wins_over_a_hub_id(model, tmp_path, monkeypatch):
    save_source(model, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_source("owner/name").path == Path("owner/name")


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "already quantized .4-bit g128."),
        ({"quant_method": "awq", "w_bit": 4}, "quantized in AWQ"),
        ({"load_in_8bit": True}, "quantized in bitsandbytes"),
        ({"quant_method": "fp8"}, "quantized in FP8"),
        ({"quant_method": "new"}, "quant_method is 'new'"),
    ],
    ids=str,
)
def test_an_already_quantized_source(folder, quantization, said):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    assert "16-bit original" in fails(said, str(folder), quantized=False).hint


def test_configs(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    source = open_source(str(folder))
    assert (source.config().model_type, source.config().n_embd) == ("gpt_bigcode", 64)
    for change, message in (
        ({"model_type": "no_such_model"}, "model_type 'no_such_model', which transformers"),
        ({"model_type": 3}, "has no model_type"),
        ({"n_embd": "many"}, "not a usable config"),
    ):
        # auto_map would have transformers run the checkpoint's own code, if we let it.
        (folder / "evil.py").write_text("raise SystemExit('ran')")
        auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        path.write_text(json.dumps(config | {"auto_map": auto_map} | change))
        with pytest.raises(SourceError, match=message) as caught:
            open_source(str(folder)).config()
        assert "\n" not in str(caught.value)


# ---- tokenizers, side files, licences, fingerprints


def test_tokenizer(folder):
    source = open_source(str(folder))
    tokenizer = source.tokenizer()
    text = "def f(x):\n    return 42"
    assert tokenizer.is_fast and tokenizer.decode(tokenizer(text).input_ids) == text
    (folder / "tokenizer.json").write_text('{"broken": ')
    with pytest.raises(SourceError, match="cannot be read") as caught:
        source.tokenizer()
    assert "\n" not in str(caught.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="has no tokenizer"):
        source.tokenizer()


def test_side_files_are_data_of_this_folder_only(folder, tmp_path):
    for name in (
        "LICENSE",
        "LICENSE.md",
        "LICENSE.py",
        "LICENSE.bin",
        "USE_POLICY.md",
        "chat_template.jinja",
        "handler.py",
    ):
        (folder / name).write_text("x")
    (tmp_path / "secret").write_text("s")
    (folder / "NOTICE").symlink_to(tmp_path / "secret")
    (folder / "merges.txt").symlink_to(folder / "LICENSE")  # a link inside the folder is fine
    names = {path.name for path in open_source(str(folder)).side_files()}
    assert names == {
        "LICENSE",
        "LICENSE.md",
        "USE_POLICY.md",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_side_files_of_the_hub_cache(model, tmp_path):
    """Every file of a snapshot in the hub's cache is a link to a blob."""
    root = tmp_path / "models--owner--name"
    snapshot = save_source(model, root / "snapshots" / "abc")
    (root / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(root / "blobs" / f"blob-{path.name}")
        path.symlink_to(Path("../../blobs") / f"blob-{path.name}")
    (snapshot / "LICENSE").symlink_to(Path("/etc/hostname"))
    source = open_source(str(snapshot))
    assert {path.name for path in source.side_files()} == {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert source.read("transformer.ln_f.bias").shape == (64,)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: bigcode-openrail-m\ntags: [a]\n---\n# x", "bigcode-openrail-m"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit"),
        ("# a card without front matter\nlicense: mit", None),
        ("---\nlicense: mit", None),
        ("---\nlicense: !!python/object/apply:os.system ['false']\n---\n", None),
        ("---\n[: bad\n---\n", None),
        ("---\n- mit\n---\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\n" + "[" * 5000 + "\n---\n", None),
    ],
)
def test_license_name(folder, card, licence):
    assert open_source(str(folder)).license_name() is None
    (folder / "README.md").write_text(card)
    assert open_source(str(folder)).license_name() == licence


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_fingerprint_is_of_the_content(model, tmp_path, format):
    folder = save_source(model, tmp_path / "s", format=format, shards=2)
    first = open_source(str(folder)).fingerprint()
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    os.utime(copy / "config.json", (1, 1))
    assert open_source(str(copy)).fingerprint() == first
    seen = {first}
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (copy / name).write_bytes((folder / name).read_bytes() + b"\n")
        seen.add(open_source(str(copy)).fingerprint())
        shutil.copyfile(folder / name, copy / name)
    shard = next(copy.glob("*-00002-of-*"))
    blob = bytearray(shard.read_bytes())
    blob[len(blob) // 2] ^= 1
    shard.write_bytes(blob)
    seen.add(open_source(str(copy)).fingerprint())
    (copy / "LICENSE").write_text("new")
    seen.add(open_source(str(copy)).fingerprint())
    assert len(seen) == 6


def test_fingerprint_of_a_large_file_samples_it(folder, tmp_path):
    """Changes at both ends and in the middle are noticed, and the whole file is not read."""
    size = 3 * 2**30
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"big": entry}).encode()
    (folder / "model.safetensors.index.json").unlink()
    for shard in folder.glob("model-*"):
        shard.unlink()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)  # sparse: takes no room on disk
    source = open_source(str(folder))
    first = source.fingerprint()
    for offset, count in ((path.stat().st_size - 1, 1), (size // 2, 2**26)):
        with path.open("r+b") as stream:
            stream.seek(offset)
            stream.write(b"\1" * count)
        assert path.stat().st_size == 8 + len(header) + size
        second = source.fingerprint()
        assert second != first
        first = second
