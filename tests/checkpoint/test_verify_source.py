"""verify for checkpoints of other tools: the zip's checksums find a flipped bit of a pickle shard."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from lowmem.checkpoint.headers.bin import read_bin_header
from lowmem.checkpoint.verify.converted import verify
from lowmem.cli import main
from tests.checkpoint.test_source_gguf import Q, write_gguf
from tests.helpers import save_source, tiny_model


@pytest.fixture(scope="module")
def starchat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As StarChat Alpha is published: four float16 shards, a stored copy of the tied head, an index."""
    model = tiny_model("gpt_bigcode_mqa", hidden=32, vocab=4096)
    folder = tmp_path_factory.mktemp("source")
    return save_source(model, folder, format="bin", shards=4, dtype=torch.float16, duplicate_head=True)


def test_whole_sources_are_ok(starchat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[tuple[int, int]] = []
    report = verify(starchat, lambda done, total: steps.append((done, total)))
    assert report.ok, report.problems
    assert report.tensors > 20 and not report.ours and report.format is None
    assert steps == sorted(steps)
    write_gguf(tiny_model("llama", vocab=4096, hidden=32), tmp_path / "m.gguf", (Q.F16,), "llama")
    for path in (tmp_path, tmp_path / "m.gguf"):
        found = verify(path)
        assert found.ok and found.tensors > 10, found.problems
    assert main(["verify", str(starchat)]) == 0
    assert capsys.readouterr().out.startswith("ok: ")


def places(shard: Path) -> list[tuple[str, int, int]]:
    """(entry, offset of its bytes, their number) of everything in the archive."""
    found = []
    with zipfile.ZipFile(shard) as archive, shard.open("rb") as stream:
        for entry in archive.infolist():
            stream.seek(entry.header_offset + 26)
            name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
            found.append((entry.filename, entry.header_offset + 30 + name + extra, entry.file_size))
    return found


def test_a_flipped_bit_in_any_tensor_of_any_shard_is_found_by_name(starchat: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(starchat, tmp_path / "copy"))
    shards = sorted(folder.glob("*.bin"))
    assert len(shards) == 4
    tried = 0
    for shard in shards:
        data = shard.read_bytes()
        keys = {tensor.key: name for name, tensor in read_bin_header(shard).items()}
        stored = [place for place in places(shard) if "/data/" in place[0]]
        for entry, start, size in (stored[0], stored[-1]):
            for at in (start, start + size // 2, start + size - 1):
                damaged = bytearray(data)
                damaged[at] ^= 1 << tried % 8
                shard.write_bytes(damaged)
                problems = [str(problem) for problem in verify(folder).problems]
                name = keys[entry.rpartition("/")[2]]
                assert (
                    f"{shard.name}: {name}: was changed: its bytes do not have the archive's checksum"
                    in problems
                )
                tried += 1
        shard.write_bytes(data)
    assert tried == 24 and verify(folder).ok


def test_other_faults_of_a_source(tmp_path: Path) -> None:
    """A value that is not finite, a missing tensor, a wrong shape, an extra tensor."""
    model = tiny_model("llama", vocab=4096, hidden=32)
    folder = save_source(model, tmp_path, format="bin")
    file = folder / "pytorch_model.bin"
    whole = torch.load(file, weights_only=True)
    name = "model.layers.1.mlp.up_proj.weight"
    for change, words in (
        ({name: whole[name].clone().fill_(torch.nan)}, f"{name}: has values that are not finite"),
        ({name: whole[name][:3].clone()}, f"{name}: has shape [3, 32], the model needs [64, 32]"),
        ({name: None}, f"holds no tensor '{name}'"),
    ):
        torch.save({k: v for k, v in {**whole, **change}.items() if v is not None}, file)
        assert any(words in str(problem) for problem in verify(folder).problems), words
    torch.save({**whole, "stranger": torch.zeros(3)}, file)
    report = verify(folder)
    assert report.ok and any("stranger" in note for note in report.notes)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert str(verify(folder).problems[0]).startswith(file.name)
