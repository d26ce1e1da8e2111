"""Scales, biases and norms tuned to a layer's output; the integers stay."""

from __future__ import annotations

import copy

import pytest
import torch
from lowmem.convert.math.gptq import prepare, quantize
from lowmem.convert.stages import tuning
from lowmem.convert.stages.layer import quantize_layer
from lowmem.convert.stages.targets import record

from lowmem.config import QuantConfig
from lowmem.models.architecture import decoder_layers, inspect
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import catch_calls, embed
from tests.convert.convert_helpers import quick_convert
from tests.helpers import save_source, tiny_model

KINDS = ("gpt_bigcode_mqa", "llama", "starcoder2")


def lively(kind):
    """A tiny model whose biases and norms are not 0 and 1."""
    model = tiny_model(kind, layers=1)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.2 * noise * (1.0 if "norm" in name or "ln_" in name else 0.3)
    return model


def setting(kind, folder, rows=12):
    model = lively(kind)
    tokens = torch.randint(0, 4000, (rows, 24), generator=torch.Generator().manual_seed(1))
    arch = inspect(model.config)
    call = catch_calls(model, arch, tokens[:2])[0]
    hidden = torch.cat([embed(model, part) for part in tokens.split(2)])
    layer = decoder_layers(model, model.config)[1][0]
    return layer, arch.layers[0], call, hidden, folder


def stream(folder, name, states):
    return HiddenStates.create(folder / name, tuple(states.shape), states.dtype, iter([states]), keep=False)


def quantized(kind, folder, **options):
    """One layer through the converter: (layer, spec, call, inputs, wanted, result)."""
    layer, spec, call, hidden, folder = setting(kind, folder)
    states = stream(folder, "in", hidden)
    targets, wanted = record(
        layer, spec, call, stream(folder, "clean", hidden),
        folder=folder, next_states=folder / "next", rows=2, device=torch.device("cpu"),
    )  # fmt: skip
    result = quantize_layer(
        layer, spec, call, states, QuantConfig(bits=3, group_size=32, **options),
        rows=2, device=torch.device("cpu"), targets=targets, stored_dtype=lambda _: torch.float16,
    )  # fmt: skip
    return layer, spec, call, states, wanted, result


def distance(layer, call, states, wanted):
    out = torch.cat([call.run(layer, chunk) for chunk in states.chunks(2)])
    return float((out - wanted.read(0, wanted.shape[0])).square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_layer_puts_out_more_of_what_it_should(kind, tmp_path):
    found = {}
    for steps in (0, 60):
        folder = tmp_path / str(steps)
        folder.mkdir()
        layer, spec, call, states, wanted, result = quantized(kind, folder, tune_steps=steps)
        found[steps] = distance(layer, call, states, wanted), result.tensors
    (before, plain), (after, tuned) = found[0], found[60]
    assert after < 0.97 * before
    for name in plain:
        same = torch.equal(plain[name], tuned[name])
        assert same == (not name.endswith(".scales")), name  # the integers are the same ones
    others = set(tuned) - set(plain)
    biases = {f"{linear.name}.bias" for linear in spec.linears if linear.bias}
    assert biases < others and all(tuned[name].dtype == torch.float16 for name in others)
    assert any("norm" in name or "ln_" in name for name in others)


def test_what_is_put_into_the_layer_is_what_is_stored(tmp_path):
    layer, _spec, _call, _states, _wanted, result = quantized("gpt_bigcode_mqa", tmp_path, tune_steps=8)
    for name, value in result.tensors.items():
        if name.endswith((".bias", ".weight")):
            assert torch.equal(layer.get_parameter(name).half(), value)


def rounded(layer, spec, call, states, config):
    """Every linear quantized by itself, from its own inputs."""
    seen, found = {}, {}
    handles = [
        layer.get_submodule(s.name).register_forward_hook(
            lambda m, args, out, name=s.name: seen.setdefault(name, []).append((args[0], out))
        )
        for s in spec.linears
    ]
    for chunk in states.chunks(2):
        call.run(layer, chunk)
    for handle in handles:
        handle.remove()
    sizes = {}
    for s in spec.linears:
        x = torch.cat([a.reshape(-1, a.shape[-1]) for a, _ in seen[s.name]])
        weight = layer.get_submodule(s.name).weight.detach().T.contiguous().clone()
        found[s.name] = quantize(weight, prepare(x.T @ x / len(x), config), config)
        sizes[s.name] = float(torch.cat([b.reshape(-1) for _, b in seen[s.name]]).square().mean().sqrt())
    return found, sizes


def test_what_does_not_help_is_not_kept_and_the_layer_is_left_alone(tmp_path, monkeypatch):
    layer, spec, call, hidden, folder = setting("llama", tmp_path)
    states = stream(folder, "in", hidden)
    wanted = stream(folder, "out", torch.cat([call.run(layer, c) for c in states.chunks(2)]))
    config = QuantConfig(bits=4, group_size=32)
    before = copy.deepcopy(layer.state_dict())

    def tune():
        found, sizes = rounded(layer, spec, call, states, config)
        return tuning.tune_layer(
            layer, spec, call, states, wanted, found, sizes,
            steps=12, rows=2, device=torch.device("cpu"), stored_dtype=lambda _: torch.bfloat16,
        )  # fmt: skip

    good = tune()
    assert good.error_after < good.error_before and good.scales and good.others
    assert all(value.dtype == torch.bfloat16 for value in good.others.values())
    monkeypatch.setattr(tuning, "RATE", 3.0)
    bad = tune()
    assert not bad.scales and not bad.others and bad.error_after == bad.error_before == good.error_before
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all("forward" not in vars(layer.get_submodule(s.name)) for s in spec.linears)


def test_the_size_of_the_loss_changes_nothing(tmp_path, monkeypatch):
    """A group's scale in a wide layer has next to no slope, and is tuned like any other."""
    layer, spec, call, hidden, folder = setting("gpt_bigcode_mqa", tmp_path)
    states = stream(folder, "in", hidden)
    wanted = stream(folder, "out", torch.cat([call.run(layer, c) for c in states.chunks(2)]))
    found = []
    for louder in (2.0**16, 2.0**-12):
        monkeypatch.setattr(tuning, "LOUDER", louder)
        integers, sizes = rounded(layer, spec, call, states, QuantConfig(bits=3, group_size=32))
        tuned = tuning.tune_layer(
            layer, spec, call, states, wanted, integers, sizes,
            steps=6, rows=2, device=torch.device("cpu"), stored_dtype=lambda _: torch.float32,
        )  # fmt: skip
        assert tuned.scales
        found.append(tuned)
    for name, scales in found[0].scales.items():
        torch.testing.assert_close(scales.float(), found[1].scales[name].float(), rtol=2e-3, atol=1e-6)
    # Not every bias: a key's has no slope at all, since softmax does not see it.
    assert found[0].error_after == pytest.approx(found[1].error_after, rel=1e-3)


def test_the_gradient_is_that_of_the_plain_product():
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-8, 8, (64, 10), generator=generator, dtype=torch.int8)
    scale = torch.rand(4, 10, generator=generator).add_(0.1).requires_grad_()
    x = torch.randn(3, 5, 64, generator=generator).requires_grad_()
    weight = z.float() * scale.repeat_interleave(16, 0)
    other = torch.randn(3, 5, 10, generator=generator)
    expected = torch.autograd.grad((x @ weight).mul(other).sum(), (x, scale))
    found = torch.autograd.grad(tuning._Product.apply(x, scale, z).mul(other).sum(), (x, scale))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_the_same_recipe_gives_the_same_bytes(tmp_path):
    source = save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "source")
    files = {}
    for name, steps in (("none", 0), ("some", 6), ("again", 6)):
        quick_convert(source, tmp_path / name, QuantConfig(bits=4, group_size=32, tune_steps=steps))
        files[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert files["some"] == files["again"] != files["none"]
