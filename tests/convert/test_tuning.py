"""Tuning moves integers, scales, biases and norms towards a layer's output."""

from __future__ import annotations

import copy

import pytest
import torch
from lowmem.convert.math.gptq import prepare, quantize
from lowmem.convert.stages import tuning
from lowmem.convert.stages.integers import start_of
from lowmem.convert.stages.quantize import packed
from lowmem.convert.stages.record import RecordTargets

from lowmem.checkpoint.packing import unpack_rows
from lowmem.config import QuantConfig
from tests.convert.convert_helpers import LayerOfModel, quantize_layer, quick_convert
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


def lively_layer(kind, rows=12):
    return LayerOfModel(lively(kind), rows, row_length=64)


def quantized(kind, folder, rows=12, **options):
    """One layer through the converter, tuned towards its own outputs: (layer, wanted, context)."""
    one = lively_layer(kind, rows)
    wanted = torch.cat([one.call.run(one.layer, chunk) for chunk in one.hidden.split(2)])
    context = quantize_layer(one.context(folder, QuantConfig(bits=3, group_size=32, **options)))
    return one, wanted, context


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_brings_a_layer_closer_to_its_target(kind, tmp_path):
    found = {}
    for steps in (0, 60):
        folder = tmp_path / str(steps)
        folder.mkdir()
        one, wanted, context = quantized(kind, folder, rows=24, tune_steps=steps)  # fewer are learnt by heart
        error = float((one.output(context.states) - wanted).square().sum())
        found[steps] = error, context.tensors
    (before, plain), (after, tuned) = found[0], found[60]
    assert after < 0.97 * before
    for name in plain:
        same = torch.equal(plain[name], tuned[name])
        assert same == (not name.endswith((".scales", ".qweight"))), name
        if name.endswith(".qweight"):
            changed = (unpack_rows(plain[name], 3) != unpack_rows(tuned[name], 3)).double().mean()
            assert 0 < changed < 0.2, name  # they started at GPTQ's
    others = set(tuned) - set(plain)
    biases = {f"{linear.name}.bias" for linear in one.spec.linears if linear.bias}
    assert biases < others and all(tuned[name].dtype == torch.float16 for name in others)
    assert any("norm" in name or "ln_" in name for name in others)


def test_the_layer_holds_the_stored_values(tmp_path):
    one, _wanted, context = quantized("gpt_bigcode_mqa", tmp_path, tune_steps=8)
    for name, value in context.tensors.items():
        if name.endswith((".bias", ".weight")):
            assert torch.equal(one.layer.get_parameter(name).half(), value)


def round_alone(one, config, context):
    """Quantize every linear by itself, from its own inputs, and leave what tuning needs in the context."""
    seen = {}
    handles = [
        one.layer.get_submodule(s.name).register_forward_hook(
            lambda m, args, out, name=s.name: seen.setdefault(name, []).append((args[0], out))
        )
        for s in one.spec.linears
    ]
    for chunk in one.hidden.split(2):
        one.call.run(one.layer, chunk)
    for handle in handles:
        handle.remove()
    for s in one.spec.linears:
        x = torch.cat([a.reshape(-1, a.shape[-1]) for a, _ in seen[s.name]])
        weight = one.layer.get_submodule(s.name).weight.detach().T.contiguous().clone()
        prepared = prepare(x.T @ x / len(x), config)
        result = quantize(weight, prepared, config)
        context.tensors.update(packed(s.name, result, context.format(s)))
        context.starts[s.name] = start_of(weight, result.scales, prepared.order)
        outputs = torch.cat([b.reshape(-1) for _, b in seen[s.name]])
        context.output_rms[s.name] = float(outputs.square().mean().sqrt())


def tuned_from_rounded(one, folder, config, dtype):
    """Tune towards the unquantized layer's own output, from linears that were quantized one by one."""
    context = one.context(folder, config, stored_dtype=lambda _: dtype)
    round_alone(one, config, context)
    quantize_layer(context, [RecordTargets()])
    return tuning.tune(context)


def test_a_result_that_does_not_help_is_discarded(tmp_path, monkeypatch):
    one = lively_layer("llama")
    config = QuantConfig(bits=4, group_size=32, correction=0, tune_steps=12)
    before = copy.deepcopy(one.layer.state_dict())
    good = tuned_from_rounded(one, tmp_path, config, torch.bfloat16)
    assert good.error_after < good.error_before and good.scales and good.words and good.others
    assert all(value.dtype == torch.bfloat16 for value in good.others.values())
    monkeypatch.setattr(tuning, "RATE", 3.0)
    bad = tuned_from_rounded(one, tmp_path, config, torch.bfloat16)
    assert not bad.scales and not bad.words and not bad.others
    assert bad.error_after == bad.error_before == good.error_before
    assert all(torch.equal(value, before[name]) for name, value in one.layer.state_dict().items())
    assert all("forward" not in vars(one.layer.get_submodule(s.name)) for s in one.spec.linears)


def test_the_scale_of_the_loss_changes_nothing(tmp_path, monkeypatch):
    """A group's scale in a wide layer has a tiny gradient, and is tuned like any other."""
    one = lively_layer("gpt_bigcode_mqa")
    config = QuantConfig(bits=3, group_size=32, correction=0, tune_steps=6)
    found = []
    for scale in (2.0**16, 2.0**-12):
        monkeypatch.setattr(tuning, "LOSS_SCALE", scale)
        tuned = tuned_from_rounded(one, tmp_path, config, torch.float32)
        assert tuned.scales
        found.append(tuned)
    for name, scales in found[0].scales.items():
        torch.testing.assert_close(scales.float(), found[1].scales[name].float(), rtol=2e-3, atol=1e-6)
    # Not every bias: a key's has no gradient at all, since softmax does not depend on it.
    assert found[0].error_after == pytest.approx(found[1].error_after, rel=1e-3)


def test_the_same_recipe_gives_the_same_bytes(tmp_path):
    source = save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "source")
    files = {}
    for name, steps in (("none", 0), ("some", 6), ("again", 6)):
        quick_convert(source, tmp_path / name, QuantConfig(bits=3, group_size=32, tune_steps=steps))
        files[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert files["some"] == files["again"] != files["none"]
