"""Versions of a model: where they are found, their order, and the hint if none is found."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.benchmarks.experiments.starchat.replicas import gptq_header_replica, starchat_header_replica
from lowmem.convert.pipeline import convert
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem.checkpoint import cache
from lowmem.checkpoint.manifest import write_manifest
from lowmem.errors import ArchitectureError, InvalidRequestError, LowmemError, RecipeError, SourceError
from lowmem.loading.loader import LoadOptions, load
from lowmem.plan.candidates import convertible, find_candidates
from lowmem.plan.request import ModelRequest, plan_for
from lowmem.plan.shape import read_shape
from tests.helpers import KINDS, TINY_STARCHAT, TOKENIZER_FILES, save_source, tiny_model
from tests.rtn_helpers import layer_linears, write_rtn_checkpoint

SMALL = {"layers": 2, "n_embd": 128, "heads": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOWMEM_VRAM", raising=False)


def labels(model: object, **options: object) -> list[str]:
    return [c.label for c in find_candidates(str(model), **{"cuda": False, **options})]  # type: ignore[arg-type]


def finished(folder: Path) -> None:
    """The cache takes a folder for whole when its manifest is there, which is written last."""
    write_manifest(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_shape_is_the_models(kind: str, format: str, tmp_path: Path) -> None:
    """Against transformers' own config and state, for each kind: nothing is known by name."""
    model = tiny_model(kind, hidden=128, layers=3, positions=64)
    save_source(model, tmp_path, format=format, dtype=torch.float16, duplicate_head=True)
    shape = read_shape(tmp_path)
    config = model.config
    assert (shape.layers, shape.hidden, shape.heads) == (3, 128, config.num_attention_heads)
    assert (shape.vocab, shape.positions) == (4096, 64)
    kv_heads = {"gpt_bigcode_mqa": 1, "gpt_bigcode_mha": 4}.get(kind, 2)
    assert (shape.kv_heads, shape.head_dim) == (kv_heads, 32)
    assert sum(t.numel for t in shape.tensors) == sum(p.numel() for p in model.parameters())
    modules = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    assert shape.linear_sizes == {(m.in_features, m.out_features) for m in modules}
    assert sum(t.linear for t in shape.tensors) == len(modules)


def test_forms_of_a_source_by_dtype(tmp_path: Path) -> None:
    """16 bits run in bfloat16 on a CPU and as they are on a card; 32 bits as they are, and in 16."""
    half = save_source(tiny_model("llama"), tmp_path / "half", dtype=torch.float16)
    full = save_source(tiny_model("llama"), tmp_path / "full", dtype=torch.float32)
    assert labels(half) == ["bfloat16", "int8 bnb", "NF4 bnb"]
    assert labels(half, cuda=True) == ["float16", "int8 bnb", "NF4 bnb"]
    assert labels(full) == ["float32", "bfloat16", "int8 bnb", "NF4 bnb"]
    assert labels(full, dtype="float32") == ["float32", "int8 bnb", "NF4 bnb"]


def test_converted_folders_beside_a_source_and_in_the_cache(tmp_path: Path) -> None:
    """By the report, by the name, and by the cache's origin; not another model, nor one that is damaged."""
    source = starchat_header_replica(tmp_path / "starchat-alpha", **SMALL)
    gptq_header_replica(tmp_path / "starchat-alpha-4bit", 4, 128, **SMALL)
    other = gptq_header_replica(tmp_path / "quantized", 8, 128, **SMALL)
    assert "8-bit g128" not in labels(source), "nothing says that this is the same model"
    (other / "lowmem-report.json").write_text(json.dumps({"base_model": "starchat-alpha"}))
    gptq_header_replica(tmp_path / "starchat-alpha-wide", 3, 128, **{**SMALL, "n_embd": 256})
    damaged = gptq_header_replica(tmp_path / "starchat-alpha-2bit", 2, 128, **SMALL)
    (damaged / "model.safetensors").write_bytes(b"")
    finished(gptq_header_replica(cache.claim(str(source), "3bit-g64"), 3, 64, **SMALL))
    expected = ["bfloat16", "8-bit g128", "int8 bnb", "4-bit g128", "NF4 bnb", "3-bit g64"]
    assert labels(source) == expected
    assert labels(tmp_path / "starchat-alpha-4bit") == ["4-bit g128"], "what is named is what is meant"


def test_measured_quality_is_read_from_the_report(tmp_path: Path) -> None:
    source = starchat_header_replica(tmp_path / "m", **SMALL)
    for bits, kld in ((4, 0.02), (3, 0.01)):
        folder = gptq_header_replica(tmp_path / f"m-{bits}bit", bits, 128, **SMALL)
        (folder / "lowmem-report.json").write_text(json.dumps({"base_model": "m", "kld": kld}))
    assert labels(source) == ["bfloat16", "int8 bnb", "3-bit g128", "NF4 bnb", "4-bit g128"]


def test_a_mixed_version_is_ranked_and_named_by_its_average_bits(tmp_path: Path) -> None:
    """Against the stored bytes; `--bits` never takes it for a uniform one."""
    source = save_source(tiny_model("llama"), tmp_path / "m")
    others = {"q_proj": 6, "gate_proj": 3, "down_proj": 5}
    write_rtn_checkpoint(tiny_model("llama"), tmp_path / "m-mixed", bits=4, others=others)
    write_rtn_checkpoint(tiny_model("llama"), tmp_path / "m-4bit", bits=4)
    tensors = load_file(tmp_path / "m-mixed" / "model.safetensors")
    stored = sum(t.nbytes for n, t in tensors.items() if n.endswith(("qweight", "qzeros", "scales")))
    weights = sum(linear.weight.numel() for linear in layer_linears(tiny_model("llama")).values())
    average = 8 * stored / weights
    (mixed,) = find_candidates(str(tmp_path / "m-mixed"), cuda=False)
    assert mixed.bits == pytest.approx(average, abs=0.005) and 4 < average < 6
    assert mixed.label == f"{mixed.bits:.1f}-bit mixed"
    found = labels(source)
    assert found == ["float32", "bfloat16", "int8 bnb", mixed.label, "4-bit g32", "NF4 bnb"]
    for bits in (3, 4, 5, 6):
        with pytest.raises(SourceError, match=f"no {bits}-bit version here; available: {mixed.label}"):
            plan_for(ModelRequest(tmp_path / "m-mixed", bits=bits, device="cpu"))
    whole = replace(mixed, bits=4.0)
    assert not whole.has_bits(4), "an average that happens to be whole"


def test_a_hub_id_is_found_in_the_cache_and_by_its_name_in_the_list(tmp_path: Path) -> None:
    finished(gptq_header_replica(cache.claim("owner/name", "4bit-g128"), 4, 128, **SMALL))
    assert labels("owner/name") == ["4-bit g128"]
    assert labels("owner--name/4bit-g128") == ["4-bit g128"]
    with pytest.raises(SourceError, match="lowmem convert HuggingFaceH4/starchat-alpha"):
        labels("HuggingFaceH4/starchat-alpha")
    with pytest.raises(SourceError, match="'nowhere' does not exist"):
        labels("nowhere")


def test_a_folder_of_forms(tmp_path: Path) -> None:
    """What `lowmem demo --keep` leaves: 8bit and 4bit side by side."""
    for bits in (8, 4):
        gptq_header_replica(tmp_path / "kept" / f"{bits}bit", bits, 128, **SMALL)
    assert labels(tmp_path / "kept") == ["8-bit g128", "4-bit g128"]
    gptq_header_replica(tmp_path / "kept" / "other", 4, 128, **{**SMALL, "n_embd": 256})
    with pytest.raises(SourceError, match="several models"):
        labels(tmp_path / "kept")


def test_anybodys_gptq(tmp_path: Path) -> None:
    """quantize_config.json beside a plain config.json, as auto-gptq wrote it."""
    write_rtn_checkpoint(tiny_model("llama"), tmp_path, bits=4, group_size=32)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    del quantization["quant_method"]
    (tmp_path / "quantize_config.json").write_text(json.dumps(quantization))
    assert labels(tmp_path) == ["4-bit g32"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bits": 3}, SourceError, "no 3-bit version .* available: bfloat16, .*lowmem convert .* --bits 3"),
        ({"method": "gptq"}, SourceError, "no gptq version .*lowmem convert"),
        ({"context": 1025}, InvalidRequestError, "1024 positions"),
        ({"context": -1}, InvalidRequestError, "--context -1"),
        ({"vram": 1 << 30}, InvalidRequestError, "machine has none"),
        ({"device": "tpu"}, InvalidRequestError, "tpu"),
        ({"device": "cuda:3"}, InvalidRequestError, "is not available"),
    ],
)
def test_a_request_that_cannot_be(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plan_for(ModelRequest(str(TINY_STARCHAT), **options))  # type: ignore[arg-type]


def test_vram_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names a card for `plan`; without a card `run` ignores it."""
    monkeypatch.setenv("LOWMEM_VRAM", "12GiB")
    request = ModelRequest(str(TINY_STARCHAT))
    assert plan_for(request, named_card=True).budget.card == 12 << 30
    assert plan_for(request).budget.card is None
    monkeypatch.setenv("LOWMEM_VRAM", "plenty")
    with pytest.raises(RecipeError, match="LOWMEM_VRAM"):
        plan_for(request)


def test_what_is_asked_for_is_what_runs(tmp_path: Path) -> None:
    shutil.copytree(TINY_STARCHAT, tmp_path / "m")
    plan = plan_for(ModelRequest(str(tmp_path / "m"), bits=4, method="nf4", context=100, ram=2 << 30))
    assert plan.chosen.candidate.label == "NF4 bnb"
    assert (plan.context, plan.budget.host) == (100, 2 << 30)
    assert [o.candidate.bits for o in plan.possible] == []
    assert [o.candidate.bits for o in plan_for(ModelRequest(str(tmp_path / "m"), bits=8)).possible] == [8]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma4_text", {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 64}),
        ("doge", {"num_experts": 4}),
    ],
)
def test_no_conversion_is_offered_that_convert_refuses(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        family, **sizes, **settings, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    auto: Any = AutoModelForCausalLM
    auto.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    found = find_candidates(str(tmp_path), cuda=False)
    assert found and not convertible(str(tmp_path), found, cuda=False)
    with pytest.raises(LowmemError, match=r"second input|does not divide"):
        convert(tmp_path, tmp_path / "out")


def test_what_holds_no_linears_has_no_quantized_versions(tmp_path: Path) -> None:
    """GPT-2's layers hold Conv1D: neither bitsandbytes nor the converter would quantize anything."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=4096)).save_pretrained(tmp_path)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY_STARCHAT / name, tmp_path / name)
    found = find_candidates(str(tmp_path), cuda=False)
    assert {candidate.form.method for candidate in found} == {"dense"}
    assert convertible(str(tmp_path), found, cuda=False) == []
    with pytest.raises(ArchitectureError, match=r"hold no nn\.Linear to quantize"):
        load(tmp_path, LoadOptions(on_the_fly="int8"))
