"""The contract of a stage: what it holds in memory afterwards is what the memory plan counts."""

from __future__ import annotations

import pytest
import torch
from lowmem.convert.recipe import LinearSettings, Recipe
from lowmem.convert.stages.context import run_stages
from lowmem.convert.stages.layer import AdvanceStates, layer_stages, quantizing_stages
from lowmem.convert.stages.replay import Replay
from lowmem.convert.stages.sizes import Workload

from lowmem.config import QuantConfig
from lowmem.models.architecture import inspect
from tests.convert.convert_helpers import LayerOfModel, bytes_held
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
    one = LayerOfModel(tiny_model("gpt_bigcode_mqa"))
    config = QuantConfig(bits=3, group_size=32)
    context = one.context(tmp_path, config)
    wide = [linear.name for linear in one.spec.linears if linear.name.endswith("c_proj")]
    context.recipe = Recipe(config, {f"{one.spec.name}.{name}": LinearSettings(8) for name in wide})
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
