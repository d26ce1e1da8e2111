"""Targets: recorded on the unquantized stream, and approached by a correction."""

from __future__ import annotations

import pytest
import torch
from lowmem.convert.stages.record import RecordTargets
from lowmem.convert.stages.targets import additions
from transformers import AutoConfig

from lowmem.config import QuantConfig
from tests.convert.convert_helpers import LayerOfModel, quantize_layer, quick_convert
from tests.helpers import save_source, tiny_model

KINDS = {
    "gpt_bigcode_mqa": {"attn.c_proj": "to the layer's input", "mlp.c_proj": "last"},
    "llama": {"self_attn.o_proj": "to the layer's input", "mlp.down_proj": "last"},
    "starcoder2": {"self_attn.o_proj": "to the layer's input", "mlp.c_proj": "last"},
}


def gpt_neox():
    """Attention and MLP both start from the layer's input: a parallel residual."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def gemma2():
    """Norms between a linear and the sum: no linear's own output is added."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2", vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def found_additions(one):
    return additions(one.layer, one.spec, one.call, one.hidden[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_trial_runs_find_what_a_linear_is_added_to(kind):
    found = found_additions(LayerOfModel(tiny_model(kind)))
    assert {name: added for name, added in found.items() if added != "to nothing"} == KINDS[kind]


def test_parallel_and_sandwiched_layers_are_distinguished():
    found = found_additions(LayerOfModel(gpt_neox()))
    assert found["attention.dense"] == "to the layer's input"
    assert found["mlp.dense_4h_to_h"] == "last"
    assert set(found_additions(LayerOfModel(gemma2())).values()) == {"to nothing"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_correction_brings_a_layer_closer_to_its_target(kind, tmp_path):
    outcome = {}
    for correction in (0.0, 1.0):
        folder = tmp_path / str(correction)
        folder.mkdir()
        one = LayerOfModel(tiny_model(kind))
        # Damage that the layer can see in its input: a regression can correct a part of it.
        width = one.hidden.shape[-1]
        mix = torch.randn(width, width, generator=torch.Generator().manual_seed(3))
        worse = one.hidden + 0.05 * one.hidden @ mix / width**0.5
        wanted = torch.cat([one.call.run(one.layer, chunk) for chunk in one.hidden.split(2)])
        config = QuantConfig(bits=8, group_size=32, correction=correction, damp_percent=0.001)
        context = quantize_layer(one.context(folder, config, worse))
        outcome[correction] = float((one.output(context.states) - wanted).square().mean())
        assert not list(folder.glob("target-*"))
    assert outcome[1.0] < 0.5 * outcome[0.0]


def test_targets_are_the_unquantized_layers_own_outputs(tmp_path):
    one = LayerOfModel(tiny_model("gpt_bigcode_mqa"))
    context = quantize_layer(one.context(tmp_path, QuantConfig()), [RecordTargets()])
    targets, layer, hidden = context.targets, one.layer, one.hidden
    seen = {}
    layer.attn.c_proj.register_forward_hook(lambda m, a, o: seen.update(x=a[0], y=o))
    out = torch.cat([one.call.run(layer, part) for part in hidden.split(2)])
    torch.testing.assert_close(context.unquantized.read(0, 4), out)
    torch.testing.assert_close(targets.read("mlp.c_proj", 1, 3), out[1:3])
    torch.testing.assert_close(targets.read("attn.c_proj", 2, 4), seen["y"] + hidden[2:])
    assert {p.name for p in tmp_path.glob("target-*")} == {
        "target-attn.c_attn", "target-attn.c_proj", "target-mlp.c_fc"
    }  # fmt: skip


def test_the_correction_changes_the_result_and_repeats_itself(tmp_path):
    source = save_source(tiny_model("llama"), tmp_path / "source")
    recipes = {
        "none": QuantConfig(bits=4, group_size=32, correction=0),
        "half": QuantConfig(bits=4, group_size=32),
        "again": QuantConfig(bits=4, group_size=32),
        "at once": QuantConfig(bits=4, group_size=32, true_sequential=False),
        "at once, none": QuantConfig(bits=4, group_size=32, true_sequential=False, correction=0),
    }
    files = {}
    for name, config in recipes.items():
        quick_convert(source, tmp_path / name, config)
        files[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert files["half"] == files["again"] != files["none"]
    assert files["at once"] == files["at once, none"]
