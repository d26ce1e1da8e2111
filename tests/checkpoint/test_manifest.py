"""quantization_config as different tools write it, and the digests of a folder."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lowmem.checkpoint.files.whole import FileDigest
from lowmem.checkpoint.formats import LinearFormat, QuantizationFormat
from lowmem.checkpoint.gptq_config import parse_quantization
from lowmem.checkpoint.manifest import (
    MANIFEST_FILE,
    digest_file,
    find_quantization,
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
    assert data["checkpoint_format"] == ("gptq_p" if bits in (7, 6, 5) else "gptq")
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
        {"bits": 9},
        {"bits": 5},
        {"bits": 6, "checkpoint_format": "gptq_v2"},
        {"dynamic": {"+:.*down.*": {"bits": 7}}},
        {"bits": True},
        {"bits": None},
        {"group_size": 0},
        {"group_size": -2},
        {"group_size": 12.5},
        {"checkpoint_format": "gptq_x"},
        {"is_marlin_format": True},
        {"pack_dtype": "int16"},
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


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bits": "4"}, LinearFormat(4, 128)),
        ({"bits": 4.0, "group_size": "32"}, LinearFormat(4, 32)),
        ({"group_size": None}, LinearFormat(4, -1)),
        ({"group_size": "-1"}, LinearFormat(4, -1)),
        ({"sym": None, "desc_act": None}, LinearFormat(4, 128, sym=False)),
        ({"sym": "true", "desc_act": "True"}, LinearFormat(4, 128, desc_act=True)),
        ({"sym": 0, "desc_act": 1}, LinearFormat(4, 128, sym=False, desc_act=True)),
        ({"quant_method": None}, LinearFormat(4, 128)),
        ({"quant_method": "GPTQ", "checkpoint_format": None}, LinearFormat(4, 128)),
        ({"checkpoint_format": None, "format": "gptq_v2"}, LinearFormat(4, 128, layout="gptq_v2")),
        ({"is_marlin_format": None, "dynamic": None, "lm_head": None, "meta": None}, LinearFormat(4, 128)),
        ({"pack_dtype": "torch.int32", "rotation": None, "lm_head": True}, LinearFormat(4, 128)),
        ({"bits": 5, "checkpoint_format": "gptq_p"}, LinearFormat(5, 128)),
        ({"bits": 3, "checkpoint_format": "gptq_p"}, LinearFormat(3, 128, layout="gptq_p")),
        ({"bits": None, "wbits": 3, "group_size": 64}, LinearFormat(3, 64)),
    ],
    ids=str,
)
def test_numbers_as_strings_and_flags_as_null_are_taken_as_meant(
    change: dict[str, Any], expected: LinearFormat
) -> None:
    assert parse_quantization({**OURS, **change}).default == expected


def test_the_first_tools_promised_nothing_about_zero_points() -> None:
    read = parse_quantization({"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert read.default == LinearFormat(4, 128, sym=False)


AUTO_ROUND = {  # as auto-round 0.10 writes it
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "seqlen": 2048,
    "autoround_version": "0.10.0",
    "block_name_to_quantize": "model.layers",
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
}


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptq", "gptq"),
        ("auto_round:gptq:exllamav2", "gptq"),
        ("auto_gptq", "gptq"),
        (None, "gptq"),
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("autoround:exllamav2", "gptq_v2"),
        ("auto_round:auto_awq", ""),
        ("auto_round:llm_compressor", ""),
        ("auto_round:fp8", ""),
        ("mlx", ""),
    ],
)
def test_auto_rounds_packings(packing: str | None, layout: str) -> None:
    """Its `qlinear_torch_zp` subtracts one from zero-points, `qlinear_torch` does not."""
    data = {**AUTO_ROUND, "packing_format": packing}
    if not layout:
        with pytest.raises(SourceError, match="packing_format"):
            parse_quantization(data)
        return
    for method in ("auto-round", "intel/auto-round"):
        read = parse_quantization({**data, "quant_method": method})
        assert read.default == LinearFormat(4, 128, layout=layout)
        assert read.quantizer == ("auto-round:0.10.0",)
    old = {key: value for key, value in data.items() if key != "packing_format"} | {"backend": packing}
    assert parse_quantization(old).default.layout == layout


def test_auto_rounds_linears_of_other_widths() -> None:
    extra = {
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32},
        ".*self_attn.*": {"bits": 16, "act_bits": 16},
        "lm_head": {"bits": 4, "group_size": 64, "sym": False, "data_type": "int"},
        "k_proj$": {"bits": 2},
    }
    read = parse_quantization({**AUTO_ROUND, "extra_config": extra})
    assert read.of("model.layers.0.mlp.down_proj") == LinearFormat(8, 32)
    assert read.of("model.layers.1.mlp.down_proj") == LinearFormat(4, 128)
    assert read.of("model.layers.1.self_attn.q_proj") is None
    assert read.of("lm_head") == LinearFormat(4, 64, sym=False)
    assert read.of("model.layers.0.cross.k_proj") == LinearFormat(2, 128)


def test_dynamic_overrides_as_gptqmodel_resolves_them() -> None:
    dynamic = {
        r"+:.*\.1\..*gate.*": {"bits": 8, "group_size": 32},
        r".*\.(?:1[0-9]|2)\..*up_proj": {"bits": "2"},
        r"-:.*down.*": {},
        r"+:lm_head": {"bits": 8, "desc_act": True},
    }
    read = parse_quantization({**OURS, "dynamic": dynamic})
    names = [
        f"model.layers.{i}.mlp.{leaf}_proj" for i in (0, 1, 2, 12, 21) for leaf in ("gate", "up", "down")
    ]
    for name in (*names, "lm_head"):
        for pattern, override in dynamic.items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
                expected = None
                if not pattern.startswith("-:"):
                    bits = int(override.get("bits", 4))  # type: ignore[call-overload]
                    group_size = int(override.get("group_size", 128))  # type: ignore[call-overload]
                    expected = LinearFormat(bits, group_size, desc_act=bool(override.get("desc_act")))
                assert read.of(name) == expected, name
                break
        else:
            assert read.of(name) == LinearFormat(4, 128)
    with pytest.raises(SourceError, match=r"dynamic.*not evaluated"):
        parse_quantization({**OURS, "dynamic": {"+:(a+)+$": {"bits": 8}}})


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, "AWQ"),
        ({"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True}, "AWQ"),
        ({"quant_method": "exl2", "bits": 4.65}, "EXL2"),
        ({"quant_method": "exl3", "bits": 3.0}, "EXL3"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "aqlm"}, "AQLM"),
        ({"quant_method": "bitnet"}, "BitNet"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, "ModelOpt"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "Marlin"),
        ({"quant_method": "gptq", "bits": 5, "format": "bitblas"}, "BitBLAS"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "marlin"),
        ({**AUTO_ROUND, "act_bits": 8}, "act_bits"),
        ({**AUTO_ROUND, "data_type": "mx_fp"}, "data_type"),
        ({**AUTO_ROUND, "rotation_config": {"hadamard": True}}, "rotated"),
        ({"quant_method": "gptq", "bits": 4, "rotation": "hadamard"}, "rotated"),
        ({"quant_method": "something-new"}, "something-new"),
    ],
    ids=str,
)
def test_other_methods_are_named(data: dict[str, Any], named: str) -> None:
    with pytest.raises(SourceError, match=named) as caught:
        parse_quantization(data)
    assert caught.value.hint


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
