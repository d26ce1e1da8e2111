"""Models with other state than keys and values are refused by plan, convert and run in the same words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lowmem.errors import ArchitectureError
from lowmem.models import layer_state
from lowmem.models.architecture import build_model, inspect
from lowmem.models.layer_state import ENCODERS, STATEFUL, check_layer_state
from lowmem.plan.shape import read_shape
from tests.commands.command_lines import in_one_process

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _stateful_modules() -> set[str]:
    """Folders of transformers with a model class that says `_is_stateful = True`."""
    root = Path(transformers.__file__).parent / "models"
    flag = re.compile(r"^    _is_stateful = True", re.MULTILINE)
    return {f.parent.name for f in root.glob("*/modeling_*.py") if flag.search(f.read_text())}


def test_the_table_names_every_stateful_model_of_transformers() -> None:
    modules = _stateful_modules()
    known = {name for name in CONFIG_MAPPING_NAMES if model_type_to_module_name(name) in modules}
    assert known & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= STATEFUL
    assert {model_type_to_module_name(name) for name in STATEFUL} <= modules


MODELS: dict[str, dict[str, Any]] = {
    "lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
    "minimax": {**SIZES, "layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": SIZES,
    "bamba": {**SIZES, "mamba_n_heads": 8, "mamba_d_head": 8},
    "falcon_h1": SIZES,
    "qwen3_next": SIZES,
    "jamba": SIZES,
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
    "rwkv": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("kind", MODELS)
def test_plan_and_build_refuse_in_the_same_words(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **MODELS[kind])
    config.save_pretrained(tmp_path)
    save_file({"model.layers.0.a.weight": torch.zeros(32, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ArchitectureError, match=f"layers of '{kind}' keep other state") as planned:
        read_shape(tmp_path)
    with pytest.raises(ArchitectureError) as built:
        inspect(config)
    assert str(built.value) == str(planned.value)


@pytest.mark.parametrize("kind", ["bamba", "jamba", "mamba", "rwkv"])
def test_a_model_that_the_table_lacks_is_recognised_by_its_class(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_state, "STATEFUL", frozenset())
    config = AutoConfig.for_model(kind, **MODELS[kind])
    with pytest.raises(ArchitectureError, match="keep other state"):
        build_model(config, torch.float32, buffers=False)


def test_an_encoder_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="encoder and a decoder"):
        check_layer_state({"model_type": "t5", "is_encoder_decoder": True})


ENCODER = {**SIZES, "pad_token_id": 0, "max_position_embeddings": 64}


@pytest.mark.parametrize("kind", sorted(ENCODERS & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
def test_encoders_are_refused_unless_they_are_decoders(kind: str) -> None:
    with pytest.raises(ArchitectureError, match=f"{kind!r} is an encoder"):
        check_layer_state({"model_type": kind})
    check_layer_state({"model_type": kind, "is_decoder": True})


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "megatron-bert", "roformer", "xlm"])
def test_a_token_of_an_encoder_depends_on_later_ones(kind: str) -> None:
    auto: Any = AutoModelForCausalLM
    config = AutoConfig.for_model(kind, **ENCODER)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        first, second = (model(torch.tensor([[5, 6, last]])).logits[0, 0] for last in (7, 8))
    assert not torch.equal(first, second)


def test_an_older_config_does_not_list_its_layers() -> None:
    with pytest.raises(ArchitectureError, match="layers of 'lfm2' keep other state"):
        check_layer_state({"model_type": "lfm2", "full_attn_idxs": [2, 5]})
    with pytest.raises(ArchitectureError, match="layers of 'falcon-h1' keep other state"):
        check_layer_state({"model_type": "falcon-h1"})  # as a GGUF names it


def test_a_hybrid_family_without_state_is_accepted(tmp_path: Path) -> None:
    settings = {**SIZES, "layer_types": ["attention"] * 2, "num_local_experts": 0, "mamba_n_heads": 8}
    config = AutoConfig.for_model("granitemoehybrid", **settings, shared_intermediate_size=48)
    check_layer_state({"model_type": "granitemoehybrid", "layer_types": ["attention"] * 2})
    assert len(inspect(config).layers) == 2


def test_commands_refuse_before_the_work(tmp_path: Path) -> None:
    model = tmp_path / "model"
    AutoConfig.for_model("lfm2", **MODELS["lfm2"]).save_pretrained(model)
    save_file({"model.layers.0.a.weight": torch.zeros(32, 32)}, model / "model.safetensors")
    commands = [["plan", "model"], ["run", "model", "-p", "hi"], ["serve", "model"], ["convert", "model"]]
    for done in in_one_process(commands, tmp_path):
        assert done.returncode == 2
        assert "layers of 'lfm2' keep other state than keys and values (conv)" in done.stderr
        assert "Traceback" not in done.stderr
