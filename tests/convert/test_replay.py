"""Finished linears are computed once and then read; the next layer's bytes are asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from lowmem.convert.stages.layer import quantize_layer
from lowmem.convert.stages.replay import Replay
from lowmem.convert.stages.targets import record

from lowmem.checkpoint.source.open import open_source
from lowmem.config import QuantConfig
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.read_ahead import ranges, read_ahead
from tests.convert.convert_helpers import quick_convert
from tests.convert.test_targets import parts
from tests.helpers import save_source, starchat_replica, tiny_model

CPU = torch.device("cpu")
FAMILIES = ["gpt_bigcode_mqa", "llama", "starcoder2"]


def converted_layer(kind: str, folder: Path, *, replays: bool, corrects: bool, tune_steps: int = 0):
    """A layer, what it gave, the states after it, and how many rows each of its linears has computed."""
    folder.mkdir()
    model = tiny_model(kind)
    arch, calls, layers, hidden = parts(model)
    layer, spec, call = layers[0], arch.layers[0], calls[0]
    worse = hidden + 0.05 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    shape = tuple(hidden.shape)
    clean = HiddenStates.create(folder / "clean", shape, hidden.dtype, iter([hidden]), keep=False)
    states = HiddenStates.create(folder / "damaged", shape, hidden.dtype, iter([worse]), keep=False)
    config = QuantConfig(bits=4, group_size=32, correction=0.5 * corrects, tune_steps=tune_steps)
    targets = None
    if config.follows_unquantized:
        targets, _ = record(
            layer, spec, call, clean, folder=folder, next_states=folder / "next", rows=2, device=CPU,
            linears=config.corrects,
        )  # fmt: skip
    rows: Counter[str] = Counter()
    for linear in spec.linears:
        layer.get_submodule(linear.name).register_forward_pre_hook(
            lambda module, args, name=linear.name: rows.update(
                {name: 0 if "forward" in vars(module) else len(args[0])}
            )
        )
    replay = Replay(folder, shape[1]) if replays else None
    result = quantize_layer(
        layer, spec, call, states, config, rows=2, device=CPU, targets=targets, replay=replay
    )  # fmt: skip
    after = []
    for start in range(0, shape[0], 2):
        chunk = states.read(start, start + 2)
        after.append(call.run(layer, chunk) if replay is None else replay.run(layer, call, start, chunk))
    if replay is not None:
        replay.clear()
    if targets is not None:
        targets.clear()
    return result, torch.cat(after), rows, folder, len(hidden)


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
    """Without a correction once, quantized; a linear whose own output is compared, once unquantized too.
    A hook runs before an input is caught, so that pass counts as well."""
    _, _, rows, folder, count = converted_layer(kind, tmp_path / "a", replays=True, corrects=False)
    assert rows and all(value <= 2 * count for value in rows.values()), rows
    assert not list(folder.glob("replay-*"))
    _, _, without, _, _ = converted_layer(kind, tmp_path / "b", replays=False, corrects=False)
    assert max(without.values()) > 2 * count


def test_what_a_killed_run_left_is_not_read(tmp_path):
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


def test_the_files_of_a_conversion_are_gone(tmp_path):
    source = save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "source")
    quick_convert(source, tmp_path / "out", QuantConfig(bits=4, group_size=32))
    assert not [p for p in (tmp_path / "out").iterdir() if "replay" in p.name or "target" in p.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.txt", "out", "source"]


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_the_bytes_that_are_asked_for_are_the_tensors(layout, tmp_path):
    if layout == "bin":
        folder = starchat_replica(tmp_path / "source")
    else:
        folder = save_source(tiny_model("llama"), tmp_path / "source", dtype=torch.float16)
    source = open_source(str(folder))
    names = [name for name, info in source.infos.items() if len(info.shape) == 2][:6]
    found = ranges(source, names)
    assert len(found) == len(names)
    for name, (path, begin, size) in zip(names, found, strict=True):
        data = path.read_bytes()[begin : begin + size]
        wanted = source.read(name).contiguous().view(torch.uint8).numpy().tobytes()
        assert wanted in data
        assert len(data) <= len(wanted) + 1024
    source.release()
    thread = read_ahead(source, names)
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()


def test_a_file_that_has_gone_stops_nothing(tmp_path):
    folder = save_source(tiny_model("llama"), tmp_path / "source")
    source = open_source(str(folder))
    names = list(source.infos)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    thread = read_ahead(source, names)
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()
