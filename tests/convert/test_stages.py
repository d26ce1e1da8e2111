"""The contract of a stage: what it holds in memory afterwards is what the memory plan counts."""

from __future__ import annotations

import pytest
import torch
from lowmem.convert.math.gptq import Prepared
from lowmem.convert.recipe import Recipe
from lowmem.convert.stages.context import run_stages
from lowmem.convert.stages.layer import AdvanceStates, layer_stages, quantizing_stages
from lowmem.convert.stages.replay import Replay
from lowmem.convert.stages.sizes import Workload

from lowmem.config import QuantConfig
from lowmem.errors import RecipeError
from lowmem.models.architecture import inspect
from tests.convert.convert_helpers import LayerOfModel
from tests.helpers import tiny_config, tiny_model

CONFIGS = [
    QuantConfig(bits=bits, group_size=32, sym=sym, true_sequential=order, correction=share, tune_steps=steps)
    for bits, sym, order, share, steps in [
        (4, True, True, 0.5, 0),
        (4, True, True, 0.5, 2),
        (8, False, True, 0.5, 2),
        (3, False, True, 0.0, 0),
        (2, True, False, 0.0, 0),
        (4, True, False, 0.0, 2),
    ]
]


def bytes_held(context) -> int:
    """Bytes of everything that a context keeps between two stages."""
    tensors = [p for p in context.layer.parameters() if not p.is_meta]
    tensors += [b for b in context.layer.buffers() if not b.is_meta]
    tensors += context.tensors.values()
    tensors += [hessian.sum for hessian in context.captured.hessians.values()]
    tensors += context.captured.lacking.values()
    tensors += [integers.codes for integers in context.quantized.values()]
    if isinstance(context.prepared, Prepared):
        tensors.append(context.prepared.factor.matrix)
    if context.shared_lack is not None:
        tensors.append(context.shared_lack)
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("family", ["gpt_bigcode_mqa", "llama", "starcoder2"])
@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_stage_leaves_what_it_says(family, config, replays, tmp_path):
    if replays and not config.true_sequential:
        pytest.skip("outputs are replayed only with true_sequential")
    one = LayerOfModel(tiny_model(family))
    replay = Replay(tmp_path, one.hidden.shape[1]) if replays else None
    context = one.context(tmp_path, config, replay=replay)
    device = torch.device("cpu" if replays or not config.true_sequential else "cuda")  # plans only
    work = Workload(inspect(tiny_config(family)), Recipe(config), 4, 16, torch.float32, device)
    assert work.replays == replays
    sizes = work.sizes(one.spec, 2, 2)
    slack = 1024 + sum(linear.out_features for linear in one.spec.linears) * 16  # tuned biases and norms
    for stage in [*quantizing_stages(one.spec, context.recipe, replays=replays), AdvanceStates()]:
        peak = stage.peak(sizes)
        run_stages([stage], context)
        stage.leave(sizes)
        held = bytes_held(context)
        assert held <= sizes.held + slack, stage.name
        assert max(held, sizes.held) <= peak + slack, stage.name
        # It is not an overestimate either; targets may be smaller than the plan must assume.
        assert sizes.held <= 1.35 * held + slack, stage.name


def test_every_stage_of_a_layer_has_a_name_of_its_own():
    layer = inspect(tiny_config("llama")).layers[0]
    names = [stage.name for stage in layer_stages(layer, Recipe(QuantConfig(tune_steps=2)), replays=True)]
    assert len(names) == len(set(names))
    assert names[0] == "read" and names[-2:] == ["write", "next hidden states"]


def test_linears_may_have_recipes_of_their_own(tmp_path):
    """Different widths in one layer: each linear is packed, restored and planned by its own."""

    class Mixed(Recipe):
        def of(self, linear):
            return QuantConfig(bits=8 if linear.endswith("c_proj") else 3, group_size=32)

    one = LayerOfModel(tiny_model("gpt_bigcode_mqa"))
    context = one.context(tmp_path, QuantConfig(bits=4, group_size=32))
    context.recipe = Mixed(context.recipe.config)
    run_stages(quantizing_stages(one.spec, context.recipe, replays=False), context)
    work = Workload(
        inspect(tiny_config("gpt_bigcode_mqa")), context.recipe, 4, 16, torch.float32, torch.device("cpu")
    )
    assert work.packed_bytes(one.spec) == sum(tensor.nbytes for tensor in context.tensors.values())
    for linear in one.spec.linears:
        bits = 8 if linear.name.endswith("c_proj") else 3
        packed = context.tensors[f"{linear.name}.qweight"]
        assert packed.shape == (linear.in_features * bits // 32, linear.out_features)
        assert len(one.layer.get_submodule(linear.name).weight.detach()[0, :32].unique()) <= 2**bits


def test_linears_that_share_an_input_share_the_group_size():
    """They share one factored Hessian, whose columns are ordered by groups."""

    class Mixed(Recipe):
        def of(self, linear):
            return QuantConfig(group_size=64 if linear.endswith("k_proj") else 32)

    layer = inspect(tiny_config("llama")).layers[0]
    with pytest.raises(RecipeError, match="share an input"):
        layer_stages(layer, Mixed(QuantConfig(group_size=32)), replays=True)
