"""Finished linears are computed once and then read from files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from lowmem.convert.stages.layer import AdvanceStates
from lowmem.convert.stages.replay import Replay

from lowmem.config import QuantConfig
from tests.convert.convert_helpers import LayerOfModel, quantize_layer, quick_convert
from tests.helpers import save_source, tiny_model

FAMILIES = ["gpt_bigcode_mqa", "llama", "starcoder2"]


def converted_layer(kind: str, folder: Path, *, replays: bool, corrects: bool, tune_steps: int = 0):
    """The context of a quantized layer, the next hidden states, and the rows that each linear computed."""
    folder.mkdir()
    one = LayerOfModel(tiny_model(kind))
    worse = one.hidden + 0.05 * torch.randn(one.hidden.shape, generator=torch.Generator().manual_seed(2))
    config = QuantConfig(bits=4, group_size=32, correction=0.5 * corrects, tune_steps=tune_steps)
    rows: Counter[str] = Counter()
    for linear in one.spec.linears:
        one.layer.get_submodule(linear.name).register_forward_pre_hook(
            lambda module, args, name=linear.name: rows.update(
                {name: 0 if "forward" in vars(module) else len(args[0])}
            )
        )
    replay = Replay(folder, one.hidden.shape[1]) if replays else None
    context = quantize_layer(one.context(folder, config, worse, replay=replay))
    quantize_layer(context, [AdvanceStates()])
    return context, context.states.read(0, len(worse)), rows


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("tune_steps", [0, 3])
def test_replayed_linears_change_no_bit(kind, corrects, tune_steps, tmp_path):
    plain = converted_layer(kind, tmp_path / "a", replays=False, corrects=corrects, tune_steps=tune_steps)
    replayed = converted_layer(kind, tmp_path / "b", replays=True, corrects=corrects, tune_steps=tune_steps)
    assert plain[0].tensors.keys() == replayed[0].tensors.keys()
    assert all(torch.equal(value, replayed[0].tensors[name]) for name, value in plain[0].tensors.items())
    assert plain[0].reports == replayed[0].reports
    assert torch.equal(plain[1], replayed[1])


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_linear_computes_a_row_twice(kind, tmp_path):
    """Without a correction each computes a row once, quantized. Its hook also fires in the pass that captures
    its input."""
    context, after, rows = converted_layer(kind, tmp_path / "a", replays=True, corrects=False)
    assert rows and all(value <= 2 * len(after) for value in rows.values()), rows
    assert not list(context.files.folder.glob("replay-*"))
    _, _, without = converted_layer(kind, tmp_path / "b", replays=False, corrects=False)
    assert max(without.values()) > 2 * len(after)


def test_files_of_a_killed_run_are_not_read(tmp_path):
    (tmp_path / "replay-output-a").write_bytes(b"half a file")
    (tmp_path / "replay-input-a").write_bytes(b"half a file")
    replay = Replay(tmp_path, 8)
    linear = torch.nn.Linear(4, 3)
    x = torch.randn(6, 8, 4)
    for chunk in x.split(2):
        replay.keep_input("a", chunk)
    replay.compute([("a", linear)], 6, 2)
    layer = torch.nn.Module()
    layer.a = linear

    class Call:
        def run(self, module, hidden):
            return module.a(hidden)

    found = torch.cat([replay.run(layer, Call(), start, x[start : start + 2] * 0) for start in (0, 2, 4)])
    torch.testing.assert_close(found, linear(x), atol=0, rtol=0)
    replay.clear()
    assert not list(tmp_path.iterdir())


def test_a_conversion_leaves_no_replay_files(tmp_path):
    source = save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "source")
    quick_convert(source, tmp_path / "out", QuantConfig(bits=4, group_size=32))
    assert not [p for p in (tmp_path / "out").iterdir() if "replay" in p.name or "target" in p.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.txt", "out", "source"]
