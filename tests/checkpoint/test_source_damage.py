"""Damaged and malicious source files are refused with the fault named."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowmem.checkpoint.headers.safetensors import read_header
from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.source.safetensors import read_tensor
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


# ---- damaged safetensors


def test_truncated_shard_says_what_is_missing(folder):
    shard = folder / "model-00002-of-00003.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 5)
    fails(
        f"model-00002-of-00003.safetensors is truncated: header promises {size} bytes, file has {size - 5}",
        str(folder),
    )
    os.truncate(shard, 100)
    fails("model-00002-of-00003.safetensors is truncated: header promises", str(folder))
    os.truncate(shard, 3)
    fails("model-00002-of-00003.safetensors is truncated", str(folder))
    os.truncate(shard, 0)
    fails("model-00002-of-00003.safetensors is empty", str(folder))
    shard.unlink()
    fails("has no model-00002-of-00003.safetensors", str(folder))


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_file_that_shrinks_after_it_was_opened(model, tmp_path, format):
    folder = save_source(model, tmp_path / "s", format=format)
    source = open_source(str(folder))
    (weights,) = folder.glob("*model.*")
    os.truncate(weights, weights.stat().st_size // 3)
    with pytest.raises(SourceError, match="truncated"):
        for name in source.infos:
            source.read(name)


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: list[object], begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LYING = {
    "past the end": ({"x": entry([4], 0, 16)}, b"0" * 12, "truncated: header promises"),
    "bytes left over": ({"x": entry([2], 0, 8)}, b"0" * 12, "4 bytes after its last tensor"),
    "overlap": ({"y": entry([2], 0, 8), "x": entry([2], 4, 12)}, b"0" * 12, "'x' overlaps"),
    "gap": ({"y": entry([1], 0, 4), "x": entry([1], 8, 12)}, b"0" * 12, "'x' leaves a gap"),
    "wrong size": ({"x": entry([3], 0, 8)}, b"0" * 8, "'x' of shape"),
    "backwards": ({"x": entry([0], 8, 4)}, b"0" * 8, "'x' of shape"),
    "negative shape": ({"x": entry([-1, -2], 0, 8)}, b"0" * 8, "'x' has a shape"),
    "negative offset": ({"x": entry([2], -8, 0)}, b"0" * 8, "'x' has data_offsets"),
    "fractions": ({"x": entry([2.0], 0, 8)}, b"0" * 8, "'x' has a shape"),
    "booleans": ({"x": entry([True], 0, 4)}, b"0" * 4, "'x' has a shape"),
    "huge": ({"x": entry([2**40, 2**40], 0, 2**82)}, b"0" * 8, "'x' has a shape"),
    "huge but empty": ({"x": entry([0, 2**62, 2**62], 0, 0)}, b"", "'x' has a shape"),
    "petabytes": ({"x": entry([2**48], 0, 2**50)}, b"0" * 8, "truncated"),
    "unknown dtype": ({"x": entry([2], 0, 8, "F31")}, b"0" * 8, "'x' has dtype 'F31'"),
    "dtype no string": ({"x": entry([2], 0, 8, ["F32"])}, b"0" * 8, "'x' has dtype"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, b"0" * 4, "'x' has a shape"),
    "no entry": ({"x": 3}, b"", "'x' has no description"),
    "three offsets": (
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}},
        b"0" * 4,
        "data_offsets",
    ),
    "long name": ({"n" * 5000: entry([1], 0, 4)}, b"0" * 4, "name of 5000"),
    "a list": ([1], b"", "not a JSON object"),
    "not JSON": (b"{nope", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "nested too deep": (b"[" * 100000, b"", "not valid JSON"),
    "same name twice": (b'{"x":{},"x":{}}', b"", "same key twice"),
    "digits": (b'{"x":' + b"9" * 9999 + b"}", b"", "not valid JSON"),
    "bad metadata": ({"__metadata__": 3}, b"", "__metadata__"),
}


@pytest.mark.parametrize("case", LYING)
def test_a_header_that_lies(tmp_path, case):
    header, data, message = LYING[case]
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(SourceError, match=message) as caught:
        read_header(path)
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_header_length_beyond_the_format(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(SourceError, match="not a safetensors file"):
        read_header(path)


SOUND = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(5, dtype=torch.int64),
    "c": torch.zeros(0, 3),
    "d": torch.tensor(1.5, dtype=torch.bfloat16),
    "e": torch.tensor([True, False]),
    "f": torch.ones(3, dtype=torch.complex64),
}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_corrupted_header_is_an_error_or_reads_right(tmp_path, data):
    """Flip, insert or cut bytes in the header: a SourceError, or tensors whose bytes are the file's.

    Never another exception, and never an allocation beyond the file's own size.
    """
    path = tmp_path / "x.safetensors"
    save_file(SOUND, path)
    blob = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(blob[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "digit", "truncate", "insert"]))
        at = data.draw(st.integers(0, end - 1))
        if kind == "flip" and at < len(blob):
            blob[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "digit":
            digits = [i for i in range(8, min(end, len(blob))) if 48 <= blob[i] <= 57]
            if digits:
                blob[data.draw(st.sampled_from(digits))] = data.draw(st.integers(48, 57))
        elif kind == "truncate":
            del blob[at:]
        else:
            blob[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    path.write_bytes(blob)
    tracemalloc.start()
    try:
        header = read_header(path)
        for name, stored in header.tensors.items():
            tensor = read_tensor(path, name, stored)
            assert tensor.numel() * tensor.element_size() <= len(blob)
            assert bytes(tensor.view(-1).view(torch.uint8).tolist()) == bytes(blob[stored.begin : stored.end])
    except SourceError as error:
        assert "x.safetensors" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4_000_000


def test_our_reader_agrees_with_the_official_one(tmp_path):
    save_file(SOUND, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(read_tensor(header.path, name, header.tensors[name]), tensor)


# ---- pickles


class Evil:
    """Unpickled without restriction, this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_malicious_pickle_runs_nothing(model, tmp_path):
    folder = save_source(model, tmp_path / "s", format="bin")
    path, target = folder / "pytorch_model.bin", tmp_path / "was-run"
    torch.save({"x": torch.zeros(3), "evil": Evil(target)}, path)
    torch.load(path, weights_only=False)
    assert target.exists()  # the attack is real
    target.unlink()
    fails("pytorch_model.bin cannot be read without running its code", str(folder))
    path.write_bytes(pickle.dumps(Evil(target)))
    fails("pytorch_model.bin", str(folder))
    torch.save({"x": torch.zeros(3), "evil": Evil(target)}, path, _use_new_zipfile_serialization=False)
    fails("old format", str(folder))
    assert not target.exists()


def test_the_old_pickle_format_is_refused_with_advice(model, tmp_path):
    folder = save_source(model, tmp_path / "s", format="bin")
    torch.save({"x": torch.zeros(3)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "then torch.save" in fails("old format", str(folder)).hint


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_damaged_pickles(model, tmp_path):
    folder = save_source(model, tmp_path / "s", format="bin", shards=2)
    shard = folder / "pytorch_model-00002-of-00002.bin"
    blob = shard.read_bytes()
    for size in (0, 3, 100, len(blob) // 2, len(blob) - 1):
        shard.write_bytes(blob[:size])
        fails(shard.name, str(folder))
    for content in ([1, 2], {"x": 3}, {1: torch.zeros(2)}, torch.zeros(2), {"x": torch.zeros(2).to_sparse()}):
        torch.save(content, shard)
        fails(shard.name, str(folder))


def rezip(path: Path, change: object, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)  # type: ignore[operator]


def test_pickles_that_lie_about_sizes(model, tmp_path):
    folder = save_source(model, tmp_path / "s", format="bin")
    path = folder / "pytorch_model.bin"
    # A stride of 0 makes 4 bytes into a tensor of any shape.
    torch.save({"x": torch.zeros(1).expand(2**20, 2**30)}, path)
    fails("'x' of shape", str(folder))
    count, larger = b"M\x00\x10", b"J" + struct.pack("<i", 2**30)  # 4096 as a pickled int, and 2**30
    torch.save({"x": torch.zeros(4096)}, path)
    rezip(path, lambda data: data.replace(count, larger, 1))  # the storage
    fails("pytorch_model.bin", str(folder))
    torch.save({"x": torch.zeros(4096)}, path)
    rezip(path, lambda data: data.replace(count + b"\x85", larger + b"\x85", 1))  # the shape
    fails("pytorch_model.bin", str(folder))
    torch.save({"x": torch.zeros(4096)}, path)
    rezip(path, lambda data: data, zipfile.ZIP_DEFLATED)
    fails("compressed", str(folder))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_pickle_shard(model, tmp_path, at, bit):
    """A SourceError or tensors of the file's size, never another exception."""
    folder = tmp_path / "s"
    if not folder.exists():
        save_source(model, folder, format="bin")
    path = folder / "pytorch_model.bin"
    torch.save({"x": torch.arange(12.0).reshape(3, 4), "y": torch.ones(5, dtype=torch.float16)}, path)
    blob = bytearray(path.read_bytes())
    blob[at % len(blob)] ^= 1 << bit
    path.write_bytes(blob)
    try:
        source = open_source(str(folder))
        assert sum(info.nbytes for info in source.infos.values()) <= len(blob)
        for name, info in source.infos.items():
            if len(info.shape) != 2 or info.dtype in ("float32", "float16", "bfloat16"):
                source.read(name)
    except SourceError as error:
        assert "pytorch_model.bin" in str(error)
