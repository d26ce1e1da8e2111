"""A loaded checkpoint has the logits of the model that was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowmem.checkpoint.headers.safetensors import read_header
from lowmem.checkpoint.source.mapped import MappedFiles
from lowmem.errors import SourceError
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.loading import placing
from lowmem.loading.loader import LoadOptions, default_dtype, load
from lowmem.models.architecture import build_model
from tests.helpers import TINY_STARCHAT, save_source, starchat_replica, tiny_model
from tests.rtn_helpers import layer_linears, write_rtn_checkpoint

KINDS = ["gpt_bigcode_mqa", "gpt_bigcode_mha", "llama", "starcoder2"]
IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits  # type: ignore[no-any-return]


def assert_same_logits(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-4) -> None:
    assert got.dtype is expected.dtype and bool(expected.isfinite().all())
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < tolerance * expected.abs().max()


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (8, {"shards": 3}),
    (3, {"group_size": -1}),
    (4, {"layout": "gptq_v2"}),
    (5, {}),
    (6, {"act_order_seed": 3}),
    (3, {"layout": "gptq_p"}),
    (4, {"act_order_seed": 5}),
]


@pytest.mark.parametrize(
    ("kind", "bits", "options"),
    [
        *((kind, bits, {}) for kind in KINDS for bits in (4, 2)),
        *((kind, *layout) for kind in ("gpt_bigcode_mqa", "llama") for layout in LAYOUTS),
    ],
    ids=str,
)
def test_quantized_logits(kind: str, bits: int, options: dict[str, Any], tmp_path: Path) -> None:
    """The loaded model equals the writer's own dequantized weights."""
    model = write_rtn_checkpoint(tiny_model(kind), tmp_path, bits=bits, **options)
    loaded = load(tmp_path, LoadOptions(dtype=torch.float32))
    packed = {name for name, module in loaded.model.named_modules() if isinstance(module, QuantLinear)}
    assert packed == set(layer_linears(model))
    assert loaded.format is not None and loaded.format.default.bits == bits
    assert_same_logits(logits(loaded.model), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*KINDS, "qwen2"])
def test_dense_logits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A 16-bit or 32-bit source has bit for bit the logits that transformers loads."""
    from transformers import AutoModelForCausalLM

    save_source(tiny_model(kind, dtype=dtype), tmp_path, shards=2)
    loaded = load(tmp_path)
    assert loaded.dtype is dtype and loaded.format is None
    assert torch.equal(
        logits(loaded.model), logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Causal masks and rotary frequencies are in no file; a wrong one shows only at long contexts."""
    from transformers import AutoModelForCausalLM

    save_source(tiny_model(kind), tmp_path, dtype=torch.bfloat16)
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).named_buffers())
    got = dict(load(tmp_path).model.named_buffers())
    assert got.keys() == expected.keys()
    for name, buffer in expected.items():
        if buffer.dtype is torch.bool and buffer.shape[0] == buffer.shape[1]:
            assert got[name].numel() == 0  # nothing reads this mask: see the logits' tests
            continue
        assert got[name].dtype is buffer.dtype and torch.equal(got[name], buffer), name


def test_a_buffer_that_no_initialisation_computes_is_made_with_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such a buffer cannot be computed on meta; then the whole model is built with real buffers."""
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    config = tiny_model("llama").config
    right = dict(build_model(config, torch.float32, buffers=True).named_buffers())
    assert right and not any(buffer.is_meta or bool(buffer.isnan().any()) for buffer in right.values())
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", lambda *_: None)
    got = dict(build_model(config, torch.float32, buffers=True).named_buffers())
    assert got.keys() == right.keys() and all(torch.equal(got[name], right[name]) for name in right)


def test_tied_head_is_one_tensor(tmp_path: Path) -> None:
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path)
    loaded = load(tmp_path, LoadOptions(dtype=torch.float32))
    embedding = loaded.model.get_input_embeddings().weight
    assert loaded.model.lm_head.weight is embedding
    stored = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    mask = loaded.model.transformer.bias.nbytes
    assert loaded.weight_bytes == stored + mask


def test_untied_head_is_its_own(tmp_path: Path) -> None:
    model = write_rtn_checkpoint(tiny_model("llama", tied=False), tmp_path)
    loaded = load(tmp_path, LoadOptions(dtype=torch.float32))
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
    assert loaded.model.lm_head.weight is not loaded.model.get_input_embeddings().weight


def test_starchats_own_layout(tmp_path: Path) -> None:
    """Float16 pickle shards, a duplicated head, 49156 tokens, a generation config that knows only token 0."""
    loaded = load(starchat_replica(tmp_path, n_positions=256))
    assert loaded.dtype is torch.bfloat16  # float16 on a CPU
    assert loaded.dialogue is not None and loaded.dialogue.end_id == 49155
    assert loaded.stop_ids == (49155, 0)
    assert loaded.model.generation_config.eos_token_id == [49155, 0]
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight


def test_stop_ids_of_the_generation_config_count(tmp_path: Path) -> None:
    save_source(tiny_model("llama"), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0, "x", None]}))
    assert load(tmp_path).stop_ids == (4095, 0, 7)


def test_real_model(tmp_path: Path) -> None:
    """tiny-starchat as it ships: bfloat16, and logits that predict its own language."""
    if not (TINY_STARCHAT / "model.safetensors").is_file():
        pytest.skip("tiny-starchat is not in place")
    loaded = load(TINY_STARCHAT)
    assert loaded.dtype is torch.bfloat16 and loaded.load_seconds > 0
    ids = torch.tensor(
        [loaded.tokenizer('def main():\n    return 0\n\n\nif __name__ == "__main__":\n').input_ids]
    )
    with torch.inference_mode():
        scores = loaded.model(ids).logits[0, :-1].float()
    loss = nn.functional.cross_entropy(scores, ids[0, 1:])
    assert loss < 4  # 8.3 is chance


def test_default_dtype() -> None:
    class Config:
        dtype: Any = torch.float16

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert default_dtype(Config, cpu) is torch.bfloat16 and default_dtype(Config, cuda) is torch.float16
    Config.dtype = None
    assert default_dtype(Config, cpu) is torch.float32
    Config.dtype = torch.float64
    assert default_dtype(Config, cpu) is torch.float32


def test_packed_tensors_keep_their_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_CPU_KERNEL", "reference")  # torch's operators would repack them
    write_rtn_checkpoint(tiny_model("llama"), tmp_path)
    loaded = load(tmp_path, LoadOptions(dtype=torch.bfloat16))
    linear = loaded.model.model.layers[0].mlp.up_proj
    assert linear.scales.dtype is torch.float16 and linear.qweight.dtype is torch.int32
    assert loaded.model.model.norm.weight.dtype is torch.bfloat16
    assert logits(loaded.model).dtype is torch.bfloat16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_rtn_checkpoint(tiny_model("llama"), folder, bits=4)
    return folder


def change(tensors: dict[str, torch.Tensor], how: str) -> None:
    layer = "model.layers.0.mlp.up_proj"
    if how == "a dense tensor is missing":
        del tensors["model.norm.weight"]
    elif how == "a packed tensor is missing":
        del tensors[f"{layer}.scales"]
    elif how == "a dense shape":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    elif how == "a packed shape":
        tensors[f"{layer}.qweight"] = tensors[f"{layer}.qweight"][:-1].clone()
    elif how == "an unknown linear":
        tensors["model.layers.7.mlp.up_proj.qweight"] = tensors[f"{layer}.qweight"].clone()
    elif how == "words of another dtype":
        tensors[f"{layer}.qweight"] = tensors[f"{layer}.qweight"].to(torch.int64)
    elif how == "scales that are integers":
        tensors[f"{layer}.scales"] = tensors[f"{layer}.scales"].to(torch.int32)
    elif how == "a negative group":
        tensors[f"{layer}.g_idx"][3] = -1
    elif how == "a group too many":
        tensors[f"{layer}.g_idx"][3] = 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a dense tensor is missing", "model.norm.weight"),
        ("a packed tensor is missing", "up_proj.scales"),
        ("a dense shape", "norm.weight.*shape"),
        ("a packed shape", "up_proj.qweight.*shape"),
        ("an unknown linear", "layers.7.mlp.up_proj"),
        ("words of another dtype", "up_proj.qweight.*int64"),
        ("scales that are integers", "up_proj.scales.*int32"),
        ("a negative group", "up_proj.g_idx.*-1"),
        ("a group too many", "up_proj.g_idx.*groups 0 to 2"),
    ],
)
def test_damage_is_refused_by_name(checkpoint: Path, tmp_path: Path, how: str, message: str) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, how)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=message):
        load(tmp_path)


def test_other_ways_to_be_wrong(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        load(tmp_path / "nowhere")
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64  # not what the tensors are
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"scales.*4 groups of 32 inputs.*group_size 64"):
        load(folder)
    config["quantization_config"]["quant_method"] = "awq"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="quantized in AWQ"):
        load(folder)
    (folder / "model.safetensors").unlink()
    config["quantization_config"]["quant_method"] = "gptq"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="holds no weights"):
        load(folder)


def test_tensors_come_one_at_a_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second copy: when a tensor is read, all earlier ones are in the model or dropped."""
    import weakref

    from lowmem.checkpoint.source import safetensors

    seen: list[tuple[int, weakref.ref[torch.Tensor]]] = []
    real = safetensors.read_tensor
    loose: list[int] = []

    def watched(path: Path, name: str, stored: Any, rows: Any = None) -> torch.Tensor:
        # The file's bytes that live outside of the model: float32 tensors are cast to bfloat16 below.
        loose.append(sum(size for size, ref in seen if ref() is not None and ref().dtype is torch.float32))  # type: ignore[union-attr]
        tensor = real(path, name, stored, rows)
        seen.append((tensor.nbytes, weakref.ref(tensor)))
        return tensor

    monkeypatch.setattr(safetensors, "read_tensor", watched)
    with monkeypatch.context() as patched:  # a file system without memory maps
        patched.setattr(MappedFiles, "tensor", lambda *_: None)
        read = logits(load(checkpoint, LoadOptions(dtype=torch.bfloat16)).model)
    assert len(seen) >= 7 and max(loose) == 0
    # With maps nothing is read: what is cast is cast from the map.
    seen.clear()
    assert torch.equal(logits(load(checkpoint, LoadOptions(dtype=torch.bfloat16)).model), read) and not seen


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_a_map_is_cast_to_the_last_bit(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    """Over several slices, whose pages are dropped; the file and the map are unchanged."""
    values = torch.cat((torch.randn(5 << 20) * 10, torch.tensor([0.0, -0.0, 65504.0, 6e-8, torch.inf])))
    tensor = values.to(stored)
    save_file({"t": tensor}, tmp_path / "t.safetensors")
    header = read_header(tmp_path / "t.safetensors")
    mapped = MappedFiles().tensor(header, "t")
    assert mapped is not None
    cast = placing._cast(mapped, wanted)
    assert cast.dtype is wanted and torch.equal(cast, tensor.to(wanted))
    assert torch.equal(mapped, tensor) and cast.data_ptr() != mapped.data_ptr()
