"""Checkpoints under the names of transformers' models: renamed, merged, or the text part of more.

Every tiny model is saved by transformers, which writes the names that its makers publish; its logits are the
oracle.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers import AutoModelForImageTextToText as AutoVision
from transformers import AutoModelForMultimodalLM as AutoAudio
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from lowmem.checkpoint.source.fitted import fitted
from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.verify.converted import verify
from lowmem.config import QuantConfig
from lowmem.errors import ArchitectureError, LowmemError, SourceError
from lowmem.loading.loader import LoadOptions, load
from lowmem.models.layer_state import STATEFUL
from lowmem.plan.candidates import convertible, find_candidates
from lowmem.plan.shape import check_convertible, read_shape
from tests.convert.convert_helpers import quick_convert
from tests.helpers import TINY_STARCHAT, TOKENIZER_FILES, save_source, tiny_model

TOKENS = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
HEADS: dict[str, Any] = {**LLAMA, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8},
    **{"v_head_dim": 16, "num_key_value_heads": 4},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "mixtral": {**LLAMA, **LOCAL},
    "phimoe": {**LLAMA, **LOCAL},
    "minimax_m2": {**HEADS, **LOCAL, "rotary_dim": 8},
    "gpt_oss": {**HEADS, **LOCAL},
    "granitemoe": {**LLAMA, **LOCAL},
    "granitemoeshared": {**LLAMA, **LOCAL, "shared_intermediate_size": 32},
    "olmoe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**HEADS, **EXPERTS},
    "hunyuan_v1_moe": {**HEADS, "num_experts": 4, "moe_topk": 2},
    "ernie4_5_moe": {
        **{**LLAMA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
        **{"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    },
    "exaone_moe": {**HEADS, **EXPERTS},
    "hy_v3": {**HEADS, **EXPERTS},
    "afmoe": {**HEADS, **EXPERTS, "num_dense_layers": 1},
    "cohere2_moe": {**LLAMA, **EXPERTS},
    "laguna": {**LLAMA, **EXPERTS},
    "mellum": {**LLAMA, **EXPERTS},
    "flint": {**LLAMA, **EXPERTS},
    "kolibri1": {**LLAMA, **EXPERTS},
    "beam": {**LLAMA, **EXPERTS},
    "dots1": {**LLAMA, **ROUTED},
    "glm4_moe": {**HEADS, **ROUTED},
    "solar_open": {**HEADS, **ROUTED},
    "mimo_v2_flash": {**LLAMA, **ROUTED},
    "deepseek_v2": {**LLAMA, **ROUTED, **LATENT, "head_dim": 8},
    "deepseek_v3": {**LLAMA, **ROUTED, **LATENT},
    "glm4_moe_lite": {**LLAMA, **ROUTED, **LATENT},
    "axk1": {**LLAMA, **ROUTED, **LATENT},
}
NOT_TRIED = {
    "hrm_text": "its layers are two lists that run in turn",
    "longcat_flash": "two attentions in a layer, with a cache of its own",
    "lfm2_moe": "short convolutions",
    "lfm3": "short convolutions",
    "minimax": "linear attention",
    "minimax_m3_vl_text": "indexed attention",
    "bailing_hybrid": "linear attention",
    "deepseek_v32": "indexed attention",
    "glm_moe_dsa": "indexed attention",
    "hy_v4": "indexed attention",
    "inkling2_text": "convolutions",
    "inkling_text": "convolutions",
    "dots3_note": "indexed attention",
    "dots3_note_text": "indexed attention",
    "axk2": "indexed attention",
    "aria_text": "the text part of aria, which is tried below",
    "gemma3n_text": "the text part of gemma3n; its names are the model's own",
    "fuyu": "a wrapper: its text model is persimmon",
    "emu3": "a wrapper of an image tokenizer",
    "mllama": "its text layers look at the image",
}
"""Mapped causal models without a case here, and why; lowmem refuses most of them by other reasons."""

VISION = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
QWEN_EYES = {
    **{"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48},
    **{"fullatt_block_indexes": [0], "deepstack_visual_indexes": [0]},
}
EARS = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}


def mrope(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **more}
    return {**HEADS, "rope_parameters": rope}


SIGLIP, CLIP = ({**VISION, "model_type": f"{kind}_vision_model"} for kind in ("siglip", "clip"))
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": HEADS, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
    "qwen2_vl": {
        "text_config": mrope(),
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {"text_config": mrope(), "vision_config": QWEN_EYES},
    "qwen3_vl": {"text_config": mrope(mrope_interleaved=True), "vision_config": QWEN_EYES},
    "qwen3_vl_moe": {
        "text_config": {**mrope(mrope_interleaved=True), **EXPERTS},
        "vision_config": QWEN_EYES,
    },
    "mistral3": {
        "text_config": {**HEADS, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral"},
    },
    "llava": {"text_config": {**LLAMA, "model_type": "llama"}, "vision_config": CLIP},
    "llava_next": {"text_config": {**LLAMA, "model_type": "llama"}, "vision_config": CLIP},
    "llava_onevision": {"text_config": {**LLAMA, "model_type": "qwen2"}, "vision_config": SIGLIP},
    "paligemma": {
        "text_config": {**HEADS, "model_type": "gemma"},
        "vision_config": SIGLIP,
        "projection_dim": 64,
    },
    "idefics3": {"text_config": {**LLAMA, "model_type": "llama"}, "vision_config": VISION},
    "smolvlm": {"text_config": {**LLAMA, "model_type": "llama"}, "vision_config": VISION},
    "qwen2_audio": {"text_config": {**LLAMA, "model_type": "qwen2"}, "audio_config": EARS},
}
IDS = torch.arange(5, 21)[None]


def randomize(model: Any) -> Any:
    """Weights under which every tensor shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
    for tensor in [*model.parameters(), *biases]:
        if tensor.dim() < 2:
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
        else:
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5)
    return model


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY_STARCHAT / name, folder / name)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def from_pretrained(folder: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def saved_family(family: str, folder: Path) -> Path:
    auto: Any = AutoModelForCausalLM
    config = CONFIG_MAPPING[family](**FAMILIES[family])
    return save(randomize(auto.from_config(config, dtype=torch.float32)), folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_names_run_as_in_transformers(family: str, tmp_path: Path) -> None:
    folder = saved_family(family, tmp_path)
    model = load(folder, LoadOptions(dtype=torch.float32)).model
    assert torch.equal(logits(model), logits(from_pretrained(folder)))
    shape, problems = read_shape(folder), verify(folder).problems
    buffers = sum(t.numel() for name, t in model.state_dict().items() if "correction_bias" in name)
    own = sum(parameter.numel() for parameter in model.parameters())
    assert problems == ()
    assert sum(tensor.numel for tensor in shape.tensors) - own in (0, buffers)
    if shape.experts:
        with pytest.raises(ArchitectureError, match="mixture of experts"):
            check_convertible(str(folder))
        with pytest.raises(ArchitectureError, match="mixture of experts"):
            quick_convert(folder, tmp_path / "out")
        candidates = find_candidates(str(folder), cuda=False)
        assert {c.form.method for c in candidates} == {"dense"}
        assert convertible(str(folder), candidates, cuda=False) == []


def test_every_mapped_model_is_tried_or_has_a_reason() -> None:
    """A family that a later transformers maps shows up here."""
    mapped = set()
    for config_class, models in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        kind = config_class.model_type
        for model in models if isinstance(models, tuple) else (models,):
            if get_checkpoint_conversion_mapping(model.__name__) or get_checkpoint_conversion_mapping(kind):
                mapped.add(kind)
    wrappers = {kind for kind in mapped if kind in WRAPPERS or kind.startswith(("gemma4", "got_"))}
    assert mapped - wrappers <= FAMILIES.keys() | NOT_TRIED.keys() | STATEFUL
    assert not NOT_TRIED.keys() & FAMILIES.keys()


@pytest.mark.parametrize("kind", WRAPPERS)
def test_text_model_inside_a_wrapper(kind: str, tmp_path: Path) -> None:
    auto: Any = AutoAudio if "audio_config" in WRAPPERS[kind] else AutoVision
    whole = randomize(auto.from_config(CONFIG_MAPPING[kind](**WRAPPERS[kind]), dtype=torch.float32)).eval()
    folder = save(whole, tmp_path)
    notes: list[str] = []
    model = load(folder, LoadOptions(dtype=torch.float32), notify=notes.append).model
    assert type(model).__name__.endswith("ForCausalLM")
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-5, atol=1e-4)
    assert [note for note in notes if f"only the text model of this {kind} checkpoint" in note]
    shape, report = read_shape(folder), verify(folder)
    assert shape.layers == 2 and report.problems == ()
    assert sum(t.numel for t in shape.tensors) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "mistral3"])
def test_a_wrapper_is_converted_to_a_text_model(kind: str, tmp_path: Path) -> None:
    auto: Any = AutoVision
    whole = randomize(auto.from_config(CONFIG_MAPPING[kind](**WRAPPERS[kind]), dtype=torch.float32)).eval()
    folder, out = save(whole, tmp_path / "source"), tmp_path / "out"
    quick_convert(folder, out, QuantConfig(bits=8, group_size=32, tune_steps=0), rows=2)
    config = json.loads((out / "config.json").read_text())
    assert "vision_config" not in config and "text_config" not in config
    assert CONFIG_MAPPING[config["model_type"]](**{**config, "quantization_config": None}).hidden_size == 64
    assert config["architectures"][0].endswith("ForCausalLM") and verify(out).problems == ()
    loaded = load(out, LoadOptions(dtype=torch.float32))
    expected = logits(whole)
    assert (logits(loaded.model) - expected).abs().max() < 0.1 * expected.abs().max()
    assert read_shape(out).signature == read_shape(folder).signature


def with_head(folder: Path, format: str, change: Any) -> Path:
    """A source whose config ties the head, with the stored tensors that `change` makes."""
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    save_source(model, folder, format=format, duplicate_head=True)
    if format == "bin":
        file = folder / "pytorch_model.bin"
        torch.save(change(torch.load(file, weights_only=True)), file)
    else:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def another_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).contiguous()}


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_another_head_than_the_config_says(format: str, tmp_path: Path) -> None:
    folder, out = with_head(tmp_path / "source", format, another_head), tmp_path / "out"
    expected = logits(from_pretrained(folder))
    notes: list[str] = []
    model = load(folder, LoadOptions(dtype=torch.float32), notify=notes.append).model
    assert torch.equal(logits(model), expected)
    assert "ties the head" in " ".join(notes) and "ties the head" in " ".join(verify(folder).notes)
    quick_convert(folder, out, QuantConfig(bits=8, group_size=32, tune_steps=0), rows=2)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    got = logits(load(out, LoadOptions(dtype=torch.float32)).model)
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
    assert verify(out).problems == ()
    if format == "safetensors":
        assert any(tensor.name == "lm_head.weight" for tensor in read_shape(folder).tensors)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_copy_of_the_embedding_stays_tied(format: str, tmp_path: Path) -> None:
    folder = with_head(tmp_path, format, lambda tensors: tensors)
    source = open_source(folder)
    assert fitted(source) is source and not source.untied
    assert not any(tensor.name == "lm_head.weight" for tensor in read_shape(folder).tensors)


def test_a_shared_storage_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}

    source = open_source(with_head(tmp_path, "bin", tied))
    monkeypatch.setattr(type(source), "_read", None)
    assert source.same_values("model.embed_tokens.weight", "lm_head.weight")


def test_the_head_alone_is_the_embedding_too(tmp_path: Path) -> None:
    """transformers ties both ways."""

    def only_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = another_head(tensors)
        del tensors["model.embed_tokens.weight"]
        return tensors

    folder = with_head(tmp_path, "safetensors", only_head)
    model = load(folder, LoadOptions(dtype=torch.float32)).model
    assert torch.equal(logits(model), logits(from_pretrained(folder)))


def test_experts_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = saved_family("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.experts\.gate_up_proj.* do not fit together"):
        load(folder, LoadOptions(dtype=torch.float32))


def test_quantized_experts_are_refused_by_their_reason(tmp_path: Path) -> None:
    folder = saved_family("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    linear = "model.layers.0.mlp.experts.0.gate_proj"
    outputs, inputs = tensors.pop(f"{linear}.weight").shape
    tensors |= {
        f"{linear}.qweight": torch.zeros(inputs // 8, outputs, dtype=torch.int32),
        f"{linear}.qzeros": torch.zeros(inputs // 32, outputs // 8, dtype=torch.int32),
        f"{linear}.scales": torch.ones(inputs // 32, outputs, dtype=torch.float16),
        f"{linear}.g_idx": (torch.arange(inputs) // 32).int(),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="quantized tensors that its model merges"):
        load(folder, LoadOptions(dtype=torch.float32))


def test_a_quantized_text_model_inside_a_wrapper(tmp_path: Path) -> None:
    """As other tools quantize vision models: linears keep the wrapper's names."""
    auto: Any = AutoVision
    whole = randomize(auto.from_config(CONFIG_MAPPING["gemma3"](**WRAPPERS["gemma3"]), dtype=torch.float32))
    folder, out = save(whole, tmp_path / "source"), tmp_path / "out"
    quick_convert(folder, out, QuantConfig(bits=8, group_size=32, tune_steps=0), rows=2)
    expected = logits(load(out, LoadOptions(dtype=torch.float32)).model)
    text = {f"language_model.{name}": t for name, t in load_file(out / "model.safetensors").items()}
    vision = {n: t for n, t in load_file(folder / "model.safetensors").items() if "vision_tower" in n}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = json.loads((out / "config.json").read_text())["quantization_config"]
    save_file(text | vision, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(folder, LoadOptions(dtype=torch.float32)).model), expected)
    assert verify(folder).problems == () and read_shape(folder).linear_sizes == read_shape(out).linear_sizes


def test_a_damaged_wrapper_ends_in_one_line(tmp_path: Path) -> None:
    auto: Any = AutoVision
    folder = save(auto.from_config(CONFIG_MAPPING["qwen2_5_vl"](**WRAPPERS["qwen2_5_vl"])), tmp_path)
    whole = json.loads((folder / "config.json").read_text())
    for key, value in {"hidden_size": "many", "rope_parameters": 7, "num_attention_heads": None}.items():
        config = {**whole, "text_config": {**whole["text_config"], key: value}}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(LowmemError):
            load(folder, LoadOptions(dtype=torch.float32))
