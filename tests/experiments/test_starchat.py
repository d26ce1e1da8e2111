"""The made-up StarChat: its files are the real ones' in all but the values, and the values are usable."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from lowmem.benchmarks.experiments.starchat import __main__ as make_starchat
from lowmem.benchmarks.experiments.starchat.__main__ import (
    fill_shard,
    make_values,
    write_starchat_shaped,
)
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions
from lowmem.benchmarks.experiments.starchat.random_weights import TOKENIZER_FILES
from lowmem.benchmarks.experiments.starchat.replicas import starchat_header_replica
from transformers import AutoTokenizer

from lowmem.checkpoint.headers.bin import read_bin_header
from lowmem.errors import OutputError
from lowmem.loading.loader import LoadOptions, load
from lowmem.models.dialogue import Dialogue
from tests.helpers import REPO, TINY_STARCHAT

SMALL = {"n_embd": 128, "heads": 2, "n_positions": 512}


def small_tokenizer(folder: Path) -> None:
    """tiny-starchat's: to train one of 49156 entries takes longer than all the rest."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY_STARCHAT / name, folder / name)


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(make_starchat, "_write_tokenizer", small_tokenizer)
        return write_starchat_shaped(tmp_path_factory.mktemp("shaped") / "model", layers=40, **SMALL)


def test_its_files_are_those_that_torch_would_have_saved(shaped: Path, tmp_path: Path) -> None:
    replica = starchat_header_replica(tmp_path / "replica", layers=40, **SMALL)
    for path in replica.iterdir():
        if path.suffix == ".bin":
            mine, theirs = read_bin_header(shaped / path.name), read_bin_header(path)
            assert mine == theirs and list(mine) == list(theirs)
        else:
            assert (shaped / path.name).read_bytes() == path.read_bytes()
    (shard,) = shaped.glob("*.bin")
    with zipfile.ZipFile(shard) as archive:
        assert archive.testzip() is None  # every CRC-32
    tensors = torch.load(shard, weights_only=True)
    again = tmp_path / "again.bin"
    torch.save(tensors, again)
    with zipfile.ZipFile(shard) as ours, zipfile.ZipFile(again) as theirs_zip:
        mine_crc = [(e.filename.partition("/")[2], e.file_size, e.CRC) for e in ours.infolist()]
        its_crc = [(e.filename.partition("/")[2], e.file_size, e.CRC) for e in theirs_zip.infolist()]
        # The last entry is of the file's own making.
        assert [e for e in mine_crc if "data/" in e[0]][:-1] == [e for e in its_crc if "data/" in e[0]][:-1]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, make_values(name, tensor.shape, 0)), name
    assert torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])
    assert not torch.equal(tensors["transformer.h.0.ln_1.weight"], tensors["transformer.h.1.ln_1.weight"])


def test_several_shards_are_filled_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.benchmarks.experiments.starchat.replicas.SHARD_BYTES", 8_000_000)
    replica = starchat_header_replica(tmp_path / "replica", layers=3, **SMALL)
    shards = sorted(replica.glob("*.bin"))
    assert len(shards) > 2
    for shard in shards:
        fill_shard(shard, 7)
        for name, tensor in torch.load(shard, weights_only=True).items():
            assert torch.equal(tensor, make_values(name, tensor.shape, 7)), name


@pytest.mark.slow
def test_the_tokenizer_has_starchats_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(Dimensions(1).config()))
    make_starchat._write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 49156
    found = Dialogue.detect(tokenizer)
    assert found is not None
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    assert tokenizer.convert_tokens_to_ids(list(names)) == [49152, 49153, 49154, 49155]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<fim_prefix>"]) == [0, 1]
    text = "def f(x):\n    return x + 123  # Überraschung 🎉\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and max(ids) < 49152
    assert [tokenizer.decode([i]) for i in tokenizer("123")["input_ids"]] == ["1", "2", "3"]


@torch.inference_mode()
@pytest.mark.slow
def test_activations_stay_finite_and_columns_stand_out(shaped: Path) -> None:
    """Through all 40 layers, also in float16's range, and no layer drowns the others."""
    loaded = load(shaped, LoadOptions(dtype=torch.float32))
    ids = torch.randint(0, 49156, (1, 64), generator=torch.Generator().manual_seed(1))
    inputs: list[torch.Tensor] = []
    for layer in loaded.model.transformer.h:
        layer.mlp.c_fc.register_forward_hook(lambda _m, args, _o: inputs.append(args[0][0]))
    result = loaded.model(ids, output_hidden_states=True)
    norms = [float(h.norm(dim=-1).mean()) for h in result.hidden_states[:-1]]
    assert all(b < 2 * a for a, b in itertools.pairwise(norms[2:]))
    assert all(h.abs().max() < 1000 for h in result.hidden_states)
    assert result.logits.isfinite().all() and 1 < result.logits.std() < 8
    for x in inputs:  # the loudest input column of a linear, against the middle one
        column = x.square().mean(0).sqrt()
        assert column.max() > 3 * column.median()


def test_a_full_disk_or_a_folder_in_use_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        write_starchat_shaped(used, layers=1, **SMALL)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=31 * 10**9))
    with pytest.raises(OutputError, match=r"takes 31\.71 GB, and .* has 31\.00 GB free"):
        write_starchat_shaped(tmp_path / "full")
    assert [p.name for p in tmp_path.iterdir()] == ["used"] and [p.name for p in used.iterdir()] == [
        "mine.txt"
    ]


def test_what_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path, _seed: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_starchat, "fill_shard", full)
    monkeypatch.setattr(make_starchat, "_write_tokenizer", lambda _folder: None)
    with pytest.raises(OSError):
        write_starchat_shaped(tmp_path / "model", layers=1, **SMALL)
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    command = [
        sys.executable,
        "-m",
        "lowmem.benchmarks.experiments.starchat",
        str(tmp_path / "file"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
