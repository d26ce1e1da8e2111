"""quantization_config as different tools write it, and the digests of a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lowmem.checkpoint.formats import LinearFormat, QuantizationFormat
from lowmem.checkpoint.manifest import (
    MANIFEST_FILE,
    FileDigest,
    digest_file,
    find_quantization,
    parse_quantization,
    quantization_config_dict,
    read_manifest,
    read_quantization,
    write_manifest,
)
from lowmem.config import BITS, QuantConfig
from lowmem.errors import SourceError, VerifyError

OURS = quantization_config_dict(QuantConfig(group_size=128), version="1.2.3")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 64, 128])
def test_what_we_write_we_read(bits: int, group_size: int) -> None:
    config = QuantConfig(bits=bits, group_size=group_size, sym=False, desc_act=True)
    data = json.loads(json.dumps(quantization_config_dict(config, version="1.2.3")))
    read = parse_quantization(data)
    assert read.uniform and read.default == LinearFormat(bits, group_size, sym=False)
    assert read.quantizer[0] == "lowmem:1.2.3"
    # Act-order with static groups: no reader needs a permutation, and none must look for one.
    assert data["desc_act"] is False and data["static_groups"] is True and data["meta"]["act_order"] is True


def test_transformers_reads_what_we_write() -> None:
    from transformers import GPTQConfig

    read = GPTQConfig.from_dict(dict(OURS))
    assert (read.bits, read.group_size, read.sym, read.desc_act, read.format) == (4, 128, True, False, "gptq")


def test_a_group_size_to_be_chosen_is_not_written() -> None:
    with pytest.raises(ValueError, match="group size"):
        quantization_config_dict(QuantConfig(group_size=0), version="1.2.3")


AUTO_GPTQ = {  # as auto-gptq 0.7.1 wrote it
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.1,
    "desc_act": True,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": None,
    "is_marlin_format": False,
    "quant_method": "gptq",
}
GPTQMODEL = {  # as GPTQModel wrote it
    "bits": 8,
    "group_size": 32,
    "desc_act": False,
    "sym": False,
    "lm_head": False,
    "method": "gptq",
    "quant_method": "gptq",
    "format": "gptq_v2",
    "checkpoint_format": "gptq_v2",
    "pack_dtype": "int32",
    "dynamic": {"-:.*gate.*": {}},
    "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05},
}


def test_formats_of_others() -> None:
    assert parse_quantization(AUTO_GPTQ) == QuantizationFormat(LinearFormat(4, 128, desc_act=True))
    read = parse_quantization(GPTQMODEL)
    assert read.default == LinearFormat(8, 32, sym=False, layout="gptq_v2")
    assert read.quantizer == ("gptqmodel:7.7.0",)
    assert read.of("model.layers.0.mlp.gate_proj") is None
    assert read.of("model.layers.0.mlp.up_proj") == read.default


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "awq"},
        {"quant_method": None},
        {"bits": 5},
        {"bits": "4"},
        {"bits": True},
        {"bits": None},
        {"group_size": 0},
        {"group_size": -2},
        {"group_size": "128"},
        {"group_size": 12.5},
        {"checkpoint_format": "marlin"},
        {"checkpoint_format": "gptq_p"},
        {"is_marlin_format": True},
        {"pack_dtype": "int16"},
        {"lm_head": True},
        {"dynamic": {"+:.*down.*": {"bits": 8}}},
        {"dynamic": [1]},
        {"sym": "yes"},
        {"desc_act": 3},
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_name(change: dict[str, Any]) -> None:
    field = next(iter(change)).replace("is_marlin_format", "checkpoint_format")
    with pytest.raises(SourceError, match=field):
        parse_quantization({**OURS, **change})


def test_read_from_a_folder(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    assert find_quantization(tmp_path) is None
    with pytest.raises(SourceError, match="no quantization_config"):
        read_quantization(tmp_path)
    old = {key: value for key, value in AUTO_GPTQ.items() if key != "quant_method"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(old))
    assert read_quantization(tmp_path).default.bits == 4
    config.write_text(json.dumps({"quantization_config": GPTQMODEL}))
    assert read_quantization(tmp_path).default.bits == 8  # config.json wins
    config.write_text(json.dumps({"quantization_config": [1]}))
    with pytest.raises(SourceError, match="not an object"):
        read_quantization(tmp_path)
    config.write_text("{")
    with pytest.raises(SourceError, match="JSON"):
        read_quantization(tmp_path)


def test_digest_is_hashlibs_across_chunks(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # 2.4 MiB: three chunks
    (tmp_path / "file").write_bytes(data)
    heard: list[int] = []
    digest = digest_file(tmp_path / "file", heard.append)
    assert digest == FileDigest(hashlib.sha256(data).hexdigest(), len(data))
    assert sum(heard) == len(data) and len(heard) == 3


def test_manifest_round_trip(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / "b.txt").write_bytes(b"two")
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    write_manifest(tmp_path)
    assert read_manifest(tmp_path) == {
        "a.txt": FileDigest(hashlib.sha256(b"").hexdigest(), 0),
        "b.txt": FileDigest(hashlib.sha256(b"two").hexdigest(), 3),
    }
    data = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert data["version"] == 1 and list(data["files"]) == ["a.txt", "b.txt"]
    first = (tmp_path / MANIFEST_FILE).read_bytes()
    write_manifest(tmp_path)  # the manifest does not list itself, so writing again gives the same bytes
    assert (tmp_path / MANIFEST_FILE).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "folder", MANIFEST_FILE]


def test_known_digests_are_not_computed_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    write_manifest(tmp_path, {"a": FileDigest("00", 1), "gone": FileDigest("11", 1)})
    assert read_manifest(tmp_path) == {"a": FileDigest("00", 1)}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 2, "files": {}}',
        '{"version": 1}',
        '{"version": 1, "files": {"../a": {"sha256": "00", "bytes": 1}}}',
        '{"version": 1, "files": {"a": {"sha256": 5, "bytes": 1}}}',
        '{"version": 1, "files": {"a": {"sha256": "00", "bytes": "1"}}}',
        '{"version": 1, "files": {"a": "00"}}',
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(VerifyError, match=MANIFEST_FILE):
        read_manifest(tmp_path)
