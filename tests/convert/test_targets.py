"""What linears should put out: found on the unquantized stream, and corrected towards."""

from __future__ import annotations

import pytest
import torch
from lowmem.convert.stages.layer import quantize_layer
from lowmem.convert.stages.targets import additions, record
from transformers import AutoConfig

from lowmem.config import QuantConfig
from lowmem.models.architecture import decoder_layers, inspect
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import catch_calls, embed
from tests.convert.convert_helpers import quick_convert
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
    """Norms between a linear and the sum: no linear's own output is added to anything."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2", vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def parts(model):
    tokens = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(1))
    arch = inspect(model.config)
    calls = catch_calls(model, arch, tokens[:2])
    hidden = torch.cat([embed(model, part) for part in tokens.split(2)])
    return arch, calls, decoder_layers(model, model.config)[1], hidden


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_linear_is_added_to_is_found_by_trying(kind):
    arch, calls, layers, hidden = parts(tiny_model(kind))
    found = additions(layers[0], arch.layers[0], calls[0], hidden[:2])
    assert {name: added for name, added in found.items() if added != "to nothing"} == KINDS[kind]


def test_parallel_and_sandwiched_layers_are_told_apart():
    arch, calls, layers, hidden = parts(gpt_neox())
    found = additions(layers[0], arch.layers[0], calls[0], hidden[:2])
    assert found["attention.dense"] == "to the layer's input"
    assert found["mlp.dense_4h_to_h"] == "last"
    arch, calls, layers, hidden = parts(gemma2())
    assert set(additions(layers[0], arch.layers[0], calls[0], hidden[:2]).values()) == {"to nothing"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrected_layer_comes_closer_to_what_it_should_put_out(tmp_path, kind):
    outcome = {}
    for correction in (0.0, 1.0):
        folder = tmp_path / str(correction)
        folder.mkdir()
        model = tiny_model(kind)
        arch, calls, layers, hidden = parts(model)
        # Damage that the layer can see in its input: a regression can make up for a part of it.
        generator = torch.Generator().manual_seed(3)
        mix = torch.randn(hidden.shape[-1], hidden.shape[-1], generator=generator)
        worse = hidden + 0.05 * hidden @ mix / hidden.shape[-1] ** 0.5
        shape = tuple(hidden.shape)
        clean = HiddenStates.create(folder / "clean", shape, hidden.dtype, iter([hidden]), keep=False)
        damaged = HiddenStates.create(folder / "damaged", shape, hidden.dtype, iter([worse]), keep=False)
        targets, after = record(
            layers[0], arch.layers[0], calls[0], clean,
            folder=folder, next_states=folder / "next", rows=2, device=torch.device("cpu"),
        )  # fmt: skip
        config = QuantConfig(bits=8, group_size=32, correction=correction, damp_percent=0.001)
        quantize_layer(
            layers[0], arch.layers[0], calls[0], damaged, config, rows=2, device=torch.device("cpu"),
            targets=targets if correction else None,
        )  # fmt: skip
        put_out = torch.cat([calls[0].run(layers[0], chunk) for chunk in damaged.chunks(2)])
        outcome[correction] = float((put_out - after.read(0, 4)).square().mean())
        targets.clear()
        assert not list(folder.glob("target-*"))
    assert outcome[1.0] < 0.5 * outcome[0.0]


def test_targets_are_the_unquantized_layers_own_outputs(tmp_path):
    model = tiny_model("gpt_bigcode_mqa")
    arch, calls, layers, hidden = parts(model)
    clean = HiddenStates.create(tmp_path / "c", tuple(hidden.shape), hidden.dtype, iter([hidden]), keep=False)
    targets, after = record(
        layers[0], arch.layers[0], calls[0], clean,
        folder=tmp_path, next_states=tmp_path / "next", rows=2, device=torch.device("cpu"),
    )  # fmt: skip
    layer = layers[0]
    seen = {}
    layer.attn.c_proj.register_forward_hook(lambda m, a, o: seen.update(x=a[0], y=o))
    out = torch.cat([calls[0].run(layer, part) for part in hidden.split(2)])
    torch.testing.assert_close(after.read(0, 4), out)
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
