"""Linears of one checkpoint that differ: widths, group sizes, symmetry, and those that stay in 16 bits."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.convert.inputs import fit_recipe
from lowmem.convert.math.gptq import column_order, prepare, quantize
from lowmem.convert.recipe import ConvertOptions, LinearSettings, Recipe
from lowmem.convert.stages.context import run_stages
from lowmem.convert.stages.layer import AdvanceStates, layer_stages, quantizing_stages
from lowmem.convert.stages.replay import Replay
from lowmem.convert.stages.sizes import Workload
from safetensors.torch import load_file

from lowmem.checkpoint.dequantize import dequantize
from lowmem.checkpoint.manifest import read_quantization
from lowmem.checkpoint.verify.converted import verify
from lowmem.cli import main
from lowmem.config import QuantConfig
from lowmem.errors import RecipeError
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.loading.loader import LoadOptions, load
from lowmem.models.architecture import inspect
from lowmem.plan.memory import Form, weights_bytes
from lowmem.plan.shape import as_stored, read_shape
from tests.convert.convert_helpers import LayerOfModel, bytes_held, quick_convert
from tests.convert.test_convert import logits
from tests.helpers import save_source, tiny_config, tiny_model

FORM = Form("gptq", "float16")
SETTINGS = {
    "self_attn.q_proj": LinearSettings(3, 64),
    "self_attn.k_proj": LinearSettings(8, sym=False),
    "self_attn.v_proj": LinearSettings(16),
    "self_attn.o_proj": LinearSettings(2, -1),
    "mlp.down_proj": LinearSettings(16),
}


def mixed(config: QuantConfig, *, planar: bool = False) -> Recipe:
    """The llama's first layer by SETTINGS, its second as `config` says; planar: with 6 bits too."""
    more = {"mlp.gate_proj": LinearSettings(6, 32)} if planar else {}
    return Recipe(config, {f"model.layers.0.{name}": one for name, one in (SETTINGS | more).items()})


def test_settings_that_are_the_configs_are_no_exceptions() -> None:
    config = QuantConfig(bits=4, group_size=64)
    recipe = Recipe(config, {"b": LinearSettings(4), "a": LinearSettings(4, 64), "c": LinearSettings(3)})
    assert recipe == Recipe(config, {"c": LinearSettings(3, 64)})
    assert recipe.of("a") == config and recipe.of("c") == QuantConfig(bits=3, group_size=64)
    assert Recipe(config, {"c": LinearSettings(16, 32, False)}) == Recipe(config, {"c": LinearSettings(16)})
    assert recipe.entries()["linears"] == {"c": [3, 64, True]} and "linears" not in Recipe(config).entries()
    assert recipe.layout == "gptq" and Recipe(config, {"c": LinearSettings(5)}).layout == "gptq_p"
    for bad in (LinearSettings(9), LinearSettings(4, 48), LinearSettings(0)):
        with pytest.raises(RecipeError):
            Recipe(config, {"c": bad})


def test_the_config_is_that_of_some_linear() -> None:
    """A width that no linear has would be in the label of the result, and might decide its layout."""
    names = inspect(tiny_config("llama")).linear_names()
    linears = {name: LinearSettings(2, 64) for name in names} | {names[0]: LinearSettings(16)}
    linears |= {name: LinearSettings(8, -1, sym=False) for name in names[1:4]}
    recipe = Recipe(QuantConfig(bits=6, group_size=128, passes=3), linears)
    fitted = recipe.for_linears(names)
    assert fitted.config == QuantConfig(bits=2, group_size=64, passes=3) and len(fitted.linears) == 4
    assert [fitted.of(name) for name in names] == [recipe.of(name) for name in names]
    assert (recipe.layout, fitted.layout) == ("gptq_p", "gptq")
    assert fitted.for_linears(names) is fitted


def test_a_recipe_is_fitted_to_the_model() -> None:
    arch = inspect(tiny_config("llama"))
    q = "model.layers.0.self_attn.q_proj"
    assert fit_recipe(Recipe(QuantConfig(), {q: LinearSettings(3)}), arch, print).of(q) == QuantConfig(
        3, arch.layers[0].linears[0].in_features
    )
    for linears, problem in (
        ({"model.layers.9.mlp.up_proj": LinearSettings(3)}, "no linear model.layers.9.mlp.up_proj"),
        ({q: LinearSettings(3, 96)}, f"96 does not divide .* inputs of {q}"),
        (dict.fromkeys(arch.linear_names(), LinearSettings(16)), "all linears"),
    ):
        with pytest.raises(RecipeError, match=problem):
            fit_recipe(Recipe(QuantConfig(), linears), arch, print)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("planar", [False, True])
def test_the_loaded_result_matches_its_dequantized_integers(
    planar: bool, act_order: bool, tmp_path: Path
) -> None:
    """Every part of lowmem reads a mixed checkpoint alike, and its g_idx is column // group_size."""
    model = tiny_model("llama")
    source = save_source(model, tmp_path / "source")
    config = QuantConfig(bits=4, group_size=32, desc_act=act_order, correction=0)
    recipe = mixed(config, planar=planar)
    quick_convert(source, tmp_path / "out", recipe, rows=4)
    format = read_quantization(tmp_path / "out")
    names = inspect(model.config).linear_names()
    assert {name: format.of(name) for name in names} == {name: recipe.format_of(name) for name in names}
    assert format.default.layout == ("gptq_p" if planar else "gptq")
    loaded = load(tmp_path / "out", LoadOptions(dtype=torch.float32))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    dense = copy.deepcopy(model)
    for name, parameter in dense.named_parameters():
        parameter.data = stored[name].float() if name in stored else parameter.data.half().float()
    quantized = {n: m for n, m in loaded.model.named_modules() if isinstance(m, QuantLinear)}
    assert set(quantized) == {name for name in names if recipe.of(name)}
    for name, packed in quantized.items():
        config = recipe.of(name)
        size = packed.in_features if config.group_size == -1 else config.group_size
        assert torch.equal(stored[f"{name}.g_idx"].long(), torch.arange(packed.in_features) // size)
        assert len(dequantize(packed)[0, :32].unique()) <= 2**config.bits
        change = (dequantize(packed) - model.get_submodule(name).weight).norm()
        assert change / model.get_submodule(name).weight.norm() < (0.7 if config.bits < 4 else 0.2), name
        dense.get_submodule(name).weight.data = dequantize(packed)
    assert torch.allclose(logits(loaded.model), logits(dense), atol=1e-4, rtol=1e-4)
    report = verify(tmp_path / "out")
    assert report.ok and report.linears == len(quantized)
    shape = read_shape(tmp_path / "out")
    assert weights_bytes(shape, FORM) == weights_bytes(
        as_stored(read_shape(source), recipe.format_of("of no linear"), recipe.exceptions()), FORM
    )
    assert shape.bits == as_stored(read_shape(source), format.default, recipe.exceptions()).bits
    assert {one.format for one in shape.linears} == {recipe.format_of(name) for name in names}


def test_the_card_and_the_report_name_every_width(tmp_path: Path) -> None:
    source = save_source(tiny_model("llama"), tmp_path / "source")
    quick_convert(source, tmp_path / "out", mixed(QuantConfig(bits=4, group_size=32)), rows=2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| bits | 2, 3, 4 and 8 |" in card and "mixed-bit GPTQ" in card
    assert "In 16 bits: model.layers.0.mlp.down_proj, model.layers.0.self_attn.v_proj." in card
    assert "| model.layers.0.self_attn.k_proj | 64 → 32 | 8, g32, asymmetric |" in card
    report = json.loads((tmp_path / "out" / "lowmem-report.json").read_text())
    assert report["recipe"]["linears"]["model.layers.0.self_attn.q_proj"] == [3, 64, True]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    counted = ("qweight", "qzeros", "scales")  # g_idx says nothing about weights
    packed = sum(t.nbytes for n, t in tensors.items() if n.endswith(counted))
    weights = sum(one["in_features"] * one["out_features"] for one in report["linears"])
    assert report["bits_per_weight"] == pytest.approx(8 * packed / weights)


def _packed(name: str) -> bool:
    return name.endswith(("qweight", "qzeros", "scales", "g_idx"))


@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize("order", [True, False], ids=["sequential", "at-once"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_stage_leaves_what_it_says(replays: bool, order: bool, steps: int, tmp_path: Path) -> None:
    """The contract of test_stages.py, in a layer with linears of every kind."""
    if replays and not order:
        pytest.skip("outputs are replayed only with true_sequential")
    one = LayerOfModel(tiny_model("llama"))
    recipe = mixed(QuantConfig(bits=4, group_size=32, true_sequential=order, tune_steps=steps))
    replay = Replay(tmp_path, one.hidden.shape[1]) if replays else None
    context = one.context(tmp_path, recipe.config, replay=replay)
    context.recipe = recipe
    before = {name: one.layer.get_submodule(name).weight.clone() for name in ("self_attn.v_proj",)}
    device = torch.device("cpu" if replays or not order else "cuda")  # plans only
    work = Workload(inspect(tiny_config("llama")), recipe, 4, 16, torch.float32, device)
    sizes = work.sizes(one.spec, 2, 2)
    slack = 1024 + sum(linear.out_features for linear in one.spec.linears) * 16
    for stage in [*quantizing_stages(one.spec, recipe, replays=replays), AdvanceStates()]:
        peak = stage.peak(sizes)
        run_stages([stage], context)
        stage.leave(sizes)
        held = bytes_held(context)
        assert held <= sizes.held + slack, stage.name
        assert max(held, sizes.held) <= peak + slack, stage.name
        assert sizes.held <= 1.35 * held + slack, stage.name
    for name, weight in before.items():
        assert torch.equal(one.layer.get_submodule(name).weight, weight)
    assert [report.name for report in context.reports] == [one.name for one in recipe.quantized(context.spec)]
    assert work.packed_bytes(one.spec) == sum(t.nbytes for n, t in context.tensors.items() if _packed(n))


def test_a_layer_in_16_bits_is_copied(tmp_path: Path) -> None:
    model = tiny_model("llama")
    source = save_source(model, tmp_path / "source")
    layer = inspect(model.config).layers[0]
    linears = {f"{layer.name}.{one.name}": LinearSettings(16) for one in layer.linears}
    quick_convert(source, tmp_path / "out", Recipe(QuantConfig(bits=4, group_size=32), linears), rows=2)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in linears:
        assert torch.equal(stored[f"{name}.weight"], model.get_submodule(name).weight.half())
    assert verify(tmp_path / "out").ok and load(tmp_path / "out").format


def hessian(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(4 * n, n, generator=generator, dtype=torch.float64) * torch.rand(n, generator=generator)
    return x.T @ x / len(x)


def test_columns_are_ordered_inside_the_groups_of_every_linear() -> None:
    diagonal = hessian(256).diagonal()
    configs = [QuantConfig(group_size=size) for size in (32, 128, 64)]
    order = column_order(diagonal, *configs)
    assert order is not None and sorted(order.tolist()) == list(range(256))
    for size in (32, 64, 128):
        runs = (order // size).view(-1, size)
        assert bool((runs == runs[:, :1]).all())
        largest = diagonal[order].view(-1, size).amax(1)
        for start in range(0, 256, 128):  # groups are sorted inside the next larger one
            part = largest[start // size : (start + 128) // size]
            assert torch.equal(part, part.sort(descending=True).values)
    assert torch.equal(order, column_order(diagonal, *reversed(configs)))
    with pytest.raises(ValueError, match="do not divide"):
        column_order(hessian(192).diagonal(), QuantConfig(group_size=64), QuantConfig(group_size=96))


@pytest.mark.parametrize("small", [32, 64])
def test_a_smaller_group_beside_a_larger_one_is_rounded_almost_as_well(small: int) -> None:
    """The integers are right for the stored order, and the loss is near that of an order of its own."""
    h = hessian(256)
    weight = torch.randn(256, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = QuantConfig(bits=3, group_size=small)

    def loss(*shared: QuantConfig) -> float:
        prepared = prepare(h.clone(), *shared)
        result = quantize(weight.clone(), prepared, config)
        groups = torch.arange(256) // small
        q = (result.codes.double() - result.zeros.double()[groups]) * result.scales.double()[groups]
        error = weight - q
        found = float(torch.trace(error.T @ h @ error))
        assert found == pytest.approx(result.squared_error, rel=0.05)  # which has the damping
        return found

    alone, beside = loss(config), loss(QuantConfig(bits=4, group_size=128), config)
    assert beside < 1.1 * alone


def test_group_sizes_that_cannot_be_ordered_are_refused() -> None:
    """Of linears that share an input; without act-order any two are fine."""
    config = tiny_config("llama", hidden=192)
    layer = inspect(config).layers[0]
    linears = {f"{layer.name}.self_attn.q_proj": LinearSettings(4, 64)}
    with pytest.raises(RecipeError, match=r"q_proj, .*share an input.*64, 96 do not divide"):
        layer_stages(layer, Recipe(QuantConfig(group_size=96), linears), replays=True)
    layer_stages(layer, Recipe(QuantConfig(group_size=96, desc_act=False), linears), replays=True)


def test_an_interrupted_job_is_resumed_by_the_same_recipe_alone(tmp_path: Path, monkeypatch: Any) -> None:
    from lowmem.convert import pipeline

    source = save_source(tiny_model("llama"), tmp_path / "source")
    recipe = mixed(QuantConfig(bits=4, group_size=32))
    quick_convert(source, tmp_path / "whole", recipe, rows=2)
    monkeypatch.setattr(pipeline, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quick_convert(source, tmp_path / "out", recipe, rows=2)
    monkeypatch.undo()
    other = Recipe(recipe.config, {**recipe.linears, "model.layers.1.mlp.up_proj": LinearSettings(8)})
    with pytest.raises(RecipeError, match="another linears"):
        quick_convert(source, tmp_path / "out", other, rows=2)
    with pytest.raises(RecipeError, match="another linears"):
        quick_convert(source, tmp_path / "out", recipe.config, rows=2)
    assert quick_convert(source, tmp_path / "out", recipe, rows=2).resumed
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_card_says_who_reads_the_planar_layout(tmp_path: Path) -> None:
    source = save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "source")
    for bits, words in ((6, "`gptq_p`, which holds 5, 6 and 7 bits"), (4, "So does transformers")):
        quick_convert(source, tmp_path / str(bits), QuantConfig(bits=bits, group_size=32), rows=2)
        assert words in (tmp_path / str(bits) / "README.md").read_text()


def test_what_a_reader_does_not_load_is_refused(tmp_path: Path, capsys: Any) -> None:
    source = save_source(tiny_model("llama"), tmp_path / "source")
    command = ["convert", str(source), str(tmp_path / "out"), "--rows", "2", "--row-length", "64"]
    for reader, options, problem in (
        ("vllm", ["--bits", "3"], "vLLM loads 8 and 4 bits, not 3"),
        ("vllm", ["--asym"], "vLLM loads symmetric linears only"),
        ("gguf", ["--bits", "6"], "GGUF loads 8, 5 and 4 bits, not 6"),
    ):
        assert main([*command, "--for", reader, *options]) == 2
        error = capsys.readouterr().err
        assert problem in error and f"leave out --for {reader}" in error
    assert list(tmp_path.iterdir()) == [source]


def test_vllm_finds_its_joined_linears_in_dynamic(tmp_path: Path) -> None:
    """It asks for `qkv_proj`, as re.match does, and not for the names of the tensors."""
    source = save_source(tiny_model("llama"), tmp_path / "source")
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkv"]
    names.append("model.layers.1.mlp.down_proj")
    recipe = Recipe(QuantConfig(bits=4, group_size=32), dict.fromkeys(names, LinearSettings(8)))
    options = ConvertOptions(device="cpu", compute_dtype="float32", reader="vllm")
    quick_convert(source, tmp_path / "out", recipe, rows=2, options=options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for name, bits in (
        ("model.layers.0.self_attn.qkv_proj", 8),
        ("model.layers.0.self_attn.o_proj", 4),
        ("model.layers.0.mlp.gate_up_proj", 4),
        ("model.layers.0.mlp.down_proj", 4),
        ("model.layers.1.mlp.down_proj", 8),
    ):
        hit = (own for key, own in config["dynamic"].items() if re.match(key.removeprefix("+:"), name))
        assert next(hit, config)["bits"] == bits
    assert verify(tmp_path / "out").ok
    different = Recipe(recipe.config, {names[0]: LinearSettings(8)})
    with pytest.raises(RecipeError, match="vLLM joins"):
        quick_convert(source, tmp_path / "other", different, rows=2, options=options)
