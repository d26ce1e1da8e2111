"""Tensors with impossible dtypes or shapes: `verify` names them, and loading refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.verify.converted import verify
from lowmem.errors import SourceError
from lowmem.loading.loader import load
from lowmem.plan.shape import read_shape
from tests.fuzz.hostile import edit_json, edit_tensors
from tests.fuzz.hostile_weights import gguf_key
from tests.fuzz.seeds import copy_seed

NORM = "transformer.ln_f.weight"


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("kind", ["source", "bin"])
def test_unusable_weight_dtypes_are_refused(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Integers and 8-bit floats need scales, and a complex number cannot be converted to a real one."""
    folder = copy_seed(kind, tmp_path / "model")
    if kind == "source":
        edit_tensors(folder, lambda tensors: tensors.update({NORM: torch.ones(64).to(dtype)}))
    else:
        (shard,) = (path for path in folder.glob("*.bin") if NORM in torch.load(path))
        torch.save({**torch.load(shard), NORM: torch.ones(64).to(dtype)}, shard)
    kind_of = str(dtype).removeprefix("torch.")
    assert [kind_of in str(problem) and NORM in str(problem) for problem in verify(folder).problems] == [True]
    with pytest.raises(SourceError, match=f"{NORM}' is {kind_of}, not a float of 16 bits or more"):
        load(folder)


@pytest.mark.parametrize("shape", [(), (-1,), (1, 1, -1)])
def test_packed_weights_must_have_two_dimensions(shape: tuple[int, ...], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("qweight"))
        tensors[name] = tensors[name].reshape(shape) if shape else tensors[name][0, 0].clone()

    edit_tensors(copy_seed("packed", tmp_path / "model"), change)
    with pytest.raises(SourceError, match=r"qweight' must have two dimensions; its shape is"):
        read_shape(tmp_path / "model")


def test_verify_reports_a_quantized_config_without_packed_tensors(tmp_path: Path) -> None:
    folder = copy_seed("source", tmp_path / "model")
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    edit_json(folder / "config.json", quantization_config=said)
    assert [str(problem) for problem in verify(folder).problems] == [
        "config.json: declares a quantized model, but no tensor is quantized"
    ]


def test_zero_sizes_in_a_gguf_are_reported_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = copy_seed("gguf", tmp_path / "model")
    gguf_key("llama.vocab_size", "I", 0)(folder)
    with pytest.raises(SourceError, match="token_embd"):
        open_source(str(folder))
    assert not [warning for warning in recwarn if "zero-element" in str(warning.message)]
