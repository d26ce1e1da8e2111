"""Checkpoints of other methods are named, in the same words by every reader."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.verify.converted import verify
from lowmem.errors import ForeignError
from lowmem.plan.shape import read_shape

UP = "model.layers.0.mlp.up_proj"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 256,
}


def i32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def f16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def bytes_(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


AWQ = {"qweight": i32(64, 16), "qzeros": i32(2, 16), "scales": f16(2, 128)}
MLX = {"weight": torch.zeros(128, 8, dtype=torch.uint32), "scales": f16(128, 1), "biases": f16(128, 1)}
EXL2 = {"q_weight": i32(8, 128), "q_scale": i32(2, 16), "q_scale_max": f16(2), "q_perm": f16(64)}
EXL3 = {"trellis": torch.zeros(4, 8, 16, dtype=torch.int16), "suh": f16(64), "svh": f16(128)}
LLM_COMPRESSOR = {"weight_packed": i32(128, 8), "weight_scale": f16(128, 2), "weight_shape": i32(2)}
FP8 = {"weight": torch.zeros(128, 64).to(torch.float8_e4m3fn), "weight_scale_inv": torch.zeros(1, 1)}
NF4 = {"weight": bytes_(4096, 1), "weight.absmax": bytes_(128), "weight.quant_map": torch.zeros(16)}
AQLM = {"codes": torch.zeros(8, 8, 1, dtype=torch.int16), "codebooks": f16(1, 256, 1, 8)}
GPTQ = {"qweight": i32(8, 128), "qzeros": i32(2, 16), "scales": f16(2, 128)}


def settings(**values: Any) -> dict[str, Any]:
    return {"quantization_config": values}


CASES: list[tuple[str, dict[str, torch.Tensor], dict[str, Any]]] = [
    ("AWQ", AWQ, settings(quant_method="awq", bits=4, version="gemm")),
    ("AWQ", AWQ, settings(quant_method="awq", bits=4, version="gemv")),
    ("MLX", MLX, {"quantization": {"group_size": 64, "bits": 4}}),
    ("MLX", MLX, {"quantization": {"bits": 4}, **settings(group_size=64, bits=4)}),
    ("MLX", MLX, {}),
    ("EXL2", EXL2, settings(quant_method="exl2", bits=4.65)),
    ("EXL2", EXL2, {}),
    ("EXL3", EXL3, settings(quant_method="exl3", bits=3.0)),
    ("EXL3", EXL3, {}),
    ("compressed-tensors", LLM_COMPRESSOR, settings(quant_method="compressed-tensors")),
    ("compressed-tensors", LLM_COMPRESSOR, {"compression_config": {"format": "pack-quantized"}}),
    ("compressed-tensors", LLM_COMPRESSOR, {}),
    ("FP8", FP8, settings(quant_method="fp8", weight_block_size=[128, 128])),
    ("FP8", FP8, {}),
    ("bitsandbytes", NF4, settings(quant_method="bitsandbytes", load_in_4bit=True)),
    ("bitsandbytes", NF4, {}),
    ("AQLM", AQLM, settings(quant_method="aqlm")),
    ("AQLM", AQLM, {}),
    ("HQQ", {"W_q": bytes_(64, 64), "scale": f16(128, 1)}, settings(quant_method="hqq")),
    ("HQQ", {"W_q": bytes_(64, 64), "scale": f16(128, 1)}, {}),
    ("QuIP#", {"Qidxs": i32(8, 8), "SU": f16(64)}, {"quip_params": {"codebook": "E8P12"}}),
    ("VPTQ", {"indices": i32(8, 8), "centroids.weight": f16(8, 8)}, settings(quant_method="vptq")),
    ("SpQR", {"dense_weights": i32(8), "row_offsets": i32(8)}, settings(quant_method="spqr")),
    ("BitNet", {"weight": bytes_(32, 64), "weight_scale": f16(1)}, settings(quant_method="bitnet")),
    ("Marlin", {"B": i32(4, 256), "s": f16(2, 128)}, settings(quant_method="gptq", bits=4, format="marlin")),
    ("quantize_config.json", GPTQ, {}),
    ("brand-new", GPTQ, settings(quant_method="brand-new", bits=4)),
]


def assert_refused(path: Path, named: str) -> None:
    """plan, run and serve, convert, and verify refuse it in the same words."""
    messages = []
    for read in (
        lambda: read_shape(path),
        lambda: open_source(path, offline=True),
        lambda: open_source(path, offline=True, quantized=False),
        lambda: verify(path),
    ):
        with pytest.raises(ForeignError) as caught:
            read()
        messages.append(str(caught.value))
    assert len(set(messages)) == 1, set(messages)
    assert named in messages[0] and caught.value.hint


def write(folder: Path, parts: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    tensors = {"model.embed_tokens.weight": f16(256, 64), "model.norm.weight": f16(64)}
    tensors |= {f"{UP}.{name}": tensor for name, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("named", "parts", "config"), CASES)
def test_another_method_is_named(
    tmp_path: Path, named: str, parts: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    assert_refused(write(tmp_path, parts, config), named)


@pytest.mark.parametrize(
    ("named", "file", "text"),
    [
        ("AWQ", "quant_config.json", {"zero_point": True, "w_bit": 4, "version": "GEMM"}),
        ("AWQ", "quantize_config.json", {"zero_point": True, "w_bit": 4, "version": "GEMM"}),
        ("ModelOpt", "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}),
        ("Marlin", "quantize_config.json", {"bits": 4, "group_size": 32, "checkpoint_format": "marlin"}),
    ],
)
def test_a_file_beside_the_config_names_it(tmp_path: Path, named: str, file: str, text: Any) -> None:
    write(tmp_path, AWQ, {})
    (tmp_path / file).write_text(json.dumps(text))
    assert_refused(tmp_path, named)


def test_awq_tensors_in_a_gptq_config(tmp_path: Path) -> None:
    write(tmp_path, AWQ, settings(quant_method="gptq", bits=4, group_size=32))
    for read in (read_shape, open_source):
        with pytest.raises(Exception, match=r"up_proj.qweight.*AWQ's layout"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("model.safetensors", b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "Rename it to model.gguf"),
        ("pytorch_model.bin", b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "Rename it to pytorch_model.gguf"),
        ("pytorch_model.bin", b"tjgg" + bytes(64), "GGML"),
        ("starchat-alpha-ggml-q4_0.bin", b"lmgg" + bytes(64), "GGML"),
        ("model.onnx", b"onnx", "ONNX"),
        ("tf_model.h5", b"hdf5", "TensorFlow"),
        ("flax_model.msgpack", b"flax", "Flax"),
        ("consolidated.00.pth", b"PK", "consolidated.00.pth"),
    ],
)
def test_files_of_other_formats_and_disguises(tmp_path: Path, name: str, data: bytes, named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(data)
    assert_refused(tmp_path, named)


def test_naming_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path, AWQ, settings(quant_method="awq", bits=4))
    code = (
        "import sys; from pathlib import Path; from lowmem.plan.shape import read_shape\n"
        f"try: read_shape(Path({str(tmp_path)!r}))\n"
        "except Exception as error: print(error)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "AWQ" in done.stdout
