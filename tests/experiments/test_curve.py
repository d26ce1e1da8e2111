"""`curve`: stored bits, interpolation and bounds against hand computation; its evaluation on small models."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from lowmem.benchmarks.common.record_file import from_json, to_json, write
from lowmem.benchmarks.common.records import Machine, Origin
from lowmem.benchmarks.experiments.curve import __main__ as command
from lowmem.benchmarks.experiments.curve.__main__ import check_iterations, earlier_of, joined
from lowmem.benchmarks.experiments.curve.arithmetic import bound, interpolate, lead, missed, ratio
from lowmem.benchmarks.experiments.curve.evaluate import Evaluator
from lowmem.benchmarks.experiments.curve.linears import (
    Linear,
    average_bits,
    gptq_bits,
    kinds_of,
    of_grid,
    read_dense,
    read_gguf,
    read_gptq,
    read_tuned,
)
from lowmem.benchmarks.experiments.curve.plot import draw
from lowmem.benchmarks.experiments.curve.record import (
    AUTOSCHEME,
    K_QUANT,
    MIXED,
    UNIFORM,
    CurveRecord,
    Divergence,
    Point,
    Version,
    all_versions,
)
from lowmem.benchmarks.experiments.curve.run import Curve
from lowmem.benchmarks.experiments.curve.table import render
from lowmem.benchmarks.experiments.peers.run import Run
from lowmem.benchmarks.experiments.workers.autoscheme_worker import grid_values
from lowmem.benchmarks.experiments.workers.interpreters import Peers
from lowmem.benchmarks.quality.texts import Text
from safetensors.torch import save_file

from lowmem.checkpoint.source.open import open_source
from lowmem.errors import SourceError
from lowmem.export.export import export
from lowmem.models.architecture import inspect
from tests.helpers import save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint


def point(family: str, bits: float, kld: float, label: str = "") -> Point:
    texts = (Divergence("code", 100, kld, 0.0), Divergence("dialogues", 100, 2 * kld, 0.0))
    return Point(label or f"{family} {bits}", family, bits, bits, (("4-bit g128", 3),), texts)


UNIFORM_POINTS = (point(UNIFORM, 2, 0.04), point(UNIFORM, 3, 0.01), point(UNIFORM, 4, 0.0025))
RECORD = CurveRecord(
    Origin("python", "2026-01-01T00:00:00", Machine("one", (), 2, 1, "cpu", 0), (), "m", "", 0.0),
    "128 rows",
    200,
    (("auto-round", "1"),),
    (),
    (
        *UNIFORM_POINTS,
        point(MIXED, 2.5, 0.012),
        point(MIXED, 3.5, 0.0045),
        point(K_QUANT, 3.0, 0.01, "Q3_K"),
        point(AUTOSCHEME, 3.5, 0.004),
        dataclasses.replace(point(AUTOSCHEME, 9, 1.0, "broken"), texts=(), failure="out of memory"),
    ),
)


# --- records that are renewed in part -----------------------------------------------------------------------


def test_a_partial_run_keeps_the_other_versions_of_the_record(tmp_path):
    """And says of which run they are, however often that is repeated."""
    write(RECORD, tmp_path / "curve.json")
    origin = dataclasses.replace(RECORD.origin, command="again", date="2026-02-02T00:00:00")
    earlier = earlier_of(tmp_path / "curve.json", origin, "128 rows")
    again = dataclasses.replace(RECORD, origin=origin, points=(point(MIXED, 2.5, 0.01),), peer_versions=())
    found = joined(joined(again, earlier), earlier)
    assert found.of(MIXED)[0].kld("code") == 0.01
    assert {p.label for p in found.points} == {p.label for p in RECORD.points}
    assert (found.origin, found.kept, found.peer_versions) == (origin, RECORD.origin, RECORD.peer_versions)
    assert "kept from an earlier run: `python`, 2026-01-01" in render(found)
    assert "kept" not in render(RECORD)


@pytest.mark.parametrize(("digest", "rows"), [("other", "128 rows"), ("", "64 rows")])
def test_versions_of_other_weights_or_rows_are_not_kept(tmp_path, digest, rows):
    write(RECORD, tmp_path / "curve.json")
    origin = dataclasses.replace(RECORD.origin, source_digest=digest)
    with pytest.raises(SourceError, match="Measure without --keep"):
        earlier_of(tmp_path / "curve.json", origin, rows)


def test_autoround_tunes_measured_and_kept_versions_alike():
    """A record has one number of iterations for all of them."""
    versions = all_versions(("AutoRound",))
    longer = RECORD.autoround_iterations + 1
    check_iterations(versions, RECORD.autoround_iterations, RECORD)
    check_iterations([one for one in versions if one.family != AUTOSCHEME], longer, RECORD)
    with pytest.raises(SourceError, match=f"Give --iterations {RECORD.autoround_iterations}"):
        check_iterations(versions, longer, RECORD)


# --- stored bits --------------------------------------------------------------------------------------------


def test_bits_are_integers_scales_and_zero_points():
    assert gptq_bits(2, 128) == 2.140625
    assert gptq_bits(3, 128) == 3.1484375
    assert gptq_bits(4, 32) == 4.625
    # 100 weights at 2 bits and 300 at 4, both in groups of 128: a quarter and three quarters.
    found = [of_grid("a", 100, 2, 128), of_grid("b", 300, 4, 128), of_grid("c", 0, 4, 128)]
    assert average_bits(found) == pytest.approx(0.25 * 2.140625 + 0.75 * 4.15625)
    assert kinds_of(found) == [("4-bit g128", 2), ("2-bit g128", 1)]


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "gpt_bigcode_mha", "llama"])
def test_linears_of_a_gptq_folder_and_of_its_gguf_are_the_rounded_weights(tmp_path, kind):
    """Both readers give an independent writer's weights, under the model's names and in its order of rows."""
    model = tiny_model(kind)
    written = write_rtn_checkpoint(model, tmp_path / "four", bits=4, group_size=32, sym=True)
    names = list(inspect(model.config).linear_names())
    packed = {
        linear.name: (linear, weight)
        for linear, weight in read_gptq(open_source(str(tmp_path / "four")), names)
    }
    assert list(packed) == names
    for name in names:
        torch.testing.assert_close(
            packed[name][1], written.get_submodule(name).weight.detach(), rtol=0, atol=0
        )
    assert average_bits(linear for linear, _ in packed.values()) == 4.625
    export(str(tmp_path / "four"), tmp_path / "four.gguf")
    for linear, weight in read_gguf(tmp_path / "four.gguf", names, model.config):
        torch.testing.assert_close(weight, packed[linear.name][1], rtol=0, atol=0)
        assert (linear.kind, linear.bits / linear.weights) == ("Q4_0", 4.5)


def test_autoscheme_s_weights_are_read_with_their_widths(tmp_path):
    save_file({"a.weight": torch.ones(2, 256), "b.weight": torch.ones(2, 128)}, tmp_path / "x.safetensors")
    found = list(read_dense(tmp_path / "x.safetensors", ["a", "b"], {"a": (2, 128), "b": (8, 128)}))
    assert [linear for linear, _ in found] == [of_grid("a", 512, 2, 128), of_grid("b", 256, 8, 128)]


def test_the_grid_of_rounded_bfloat16_weights_is_found_again():
    """The integers behind weights that AutoRound rounded, and returns in the dtype of the model."""
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 4, 6):
        integers = torch.randint(0, 2**bits, (6, 4, 32), generator=generator).float()
        scale = (torch.rand(6, 4, 1, generator=generator) / 100 + 0.01).half().float()
        values = (integers - 2 ** (bits - 1)) * scale
        returned = values.reshape(6, 128).bfloat16()
        found, far = grid_values(returned, scale.reshape(6, 4), 2 ** (bits - 1), 32)
        torch.testing.assert_close(found, values.reshape(6, 128), rtol=0, atol=0)
        assert far == 0
        tensor_zero, _ = grid_values(returned, scale.reshape(6, 4), torch.full((6, 4), 2.0 ** (bits - 1)), 32)
        torch.testing.assert_close(tensor_zero, found, rtol=0, atol=0)
    _, far = grid_values(torch.full((1, 32), 0.5), torch.ones(1, 1), 0, 32)
    assert far == 32


# --- evaluation ---------------------------------------------------------------------------------------------


def evaluator_of(source: Path) -> Evaluator:
    evaluator = Evaluator(str(source))
    rows = torch.randint(1, 4096, (5, 12), generator=torch.Generator().manual_seed(1))
    evaluator.__dict__["texts"] = (Text("words", rows, ""),)
    return evaluator


def test_the_divergence_is_that_of_the_model_with_the_version_s_weights(tmp_path):
    model = tiny_model("gpt_bigcode_mqa")
    evaluator = evaluator_of(save_source(model, tmp_path / "source"))
    rows = evaluator.texts[0].rows
    with torch.inference_mode():
        before = torch.log_softmax(model(rows).logits.double(), -1)
        write_rtn_checkpoint(model, tmp_path / "three", bits=3, group_size=32)  # rounds the model, too
        after = torch.log_softmax(model(rows).logits.double(), -1)
    expected = (before.exp() * (before - after)).sum(-1).mean()
    three = open_source(str(tmp_path / "three"))
    stored, found = evaluator.divergences(read_gptq(three, evaluator.names))
    assert found[0].kld == pytest.approx(float(expected), rel=1e-3)
    assert (found[0].text, found[0].tokens) == ("words", 60)
    assert average_bits(stored) == 3 + 19 / 32
    fresh = tiny_model("gpt_bigcode_mqa")
    exact = [(Linear(n, "float32", 1, 32), fresh.get_submodule(n).weight) for n in evaluator.names]
    assert evaluator.divergences(exact)[1][0].kld == pytest.approx(0, abs=1e-9)
    name = "transformer.h.0.ln_1.weight"
    tuned = {name: 1.5 * fresh.get_parameter(name).detach()}
    assert evaluator.divergences(exact, tuned)[1][0].kld > 1e-6
    assert evaluator.divergences(exact)[1][0].kld == pytest.approx(0, abs=1e-9)
    names = [*evaluator.small, "transformer.h.0.none"]
    stored_norms = read_tuned(three, names)
    assert set(stored_norms) == set(evaluator.small)
    assert torch.equal(stored_norms[name], model.get_parameter(name).detach())
    with pytest.raises(ValueError, match="1 linears for the"):
        evaluator.divergences(exact[:1])
    with pytest.raises(ValueError, match="shape"):
        evaluator.divergences([(exact[0][0], torch.ones(1, 1))])


def test_finished_steps_are_kept_and_failures_are_not(tmp_path, monkeypatch):
    model = tiny_model("gpt_bigcode_mqa")
    source = save_source(model, tmp_path / "source")
    work = tmp_path / "work"
    work.mkdir()
    curve = Curve(Run(str(source), work, Peers(), 200, None, 1), evaluator_of(source))
    commands: list[list[str]] = []

    def process(_self: Run, words: list[str], _log: str) -> None:
        commands.append(words)
        write_rtn_checkpoint(model, Path(words[5]), bits=4, group_size=32)

    monkeypatch.setattr(Run, "process", process)
    version = Version("mixed-3.5", MIXED, "", 3.5)
    first = curve.measure(version)
    assert commands[0][-3:] == [str(work / "mixed-3.5"), "--bpw", "3.5"]
    assert (first.bits, first.widths[0][0], first.failure) == (4.625, "4-bit g32", "")
    assert curve.measure(version) == first
    assert len(commands) == 1
    (work / "uniform-2.conversion.json").write_text("{}")  # its folder is missing
    failed = curve.measure(Version("uniform-2", UNIFORM, "", 2))
    assert failed.failure and not failed.texts
    assert curve.run.kept("uniform-2.point") is None


# --- arithmetic ---------------------------------------------------------------------------------------------


def test_interpolation_is_linear_in_the_logarithm():
    points = [(4.0, 0.0025), (2.0, 0.04), (3.0, 0.01)]
    assert interpolate(points, 2.5) == pytest.approx(0.02)
    assert interpolate(points, 3.25) == pytest.approx(0.01 / math.sqrt(2))
    assert interpolate(points, 4.0) == pytest.approx(0.0025)
    assert interpolate(points, 1.9) is None
    assert interpolate(points, 4.1) is None


def test_ratios_and_bounds():
    low, high = RECORD.of(MIXED)
    assert ratio(RECORD, low, "code") == pytest.approx(0.012 / 0.02)
    assert ratio(RECORD, high, "dialogues") == pytest.approx(0.0045 / 0.005)
    assert (bound(3.25), bound(3.26)) == (0.70, 0.80)
    # Ours at 3 bits is halfway between 0.012 and 0.0045 in the logarithm, not the uniform 3-bit version.
    (k_quant,) = RECORD.of(K_QUANT)
    assert lead(RECORD, k_quant, "code") == pytest.approx(math.sqrt(0.012 * 0.0045) / 0.01)
    (autoscheme,) = RECORD.of(AUTOSCHEME)
    assert lead(RECORD, autoscheme, "code") == pytest.approx(0.0045 / 0.004)
    # Outside of the mixed versions, our line continues to the uniform ones.
    beyond = point(K_QUANT, 3.75, 0.004)
    assert lead(RECORD, beyond, "code") == pytest.approx(math.sqrt(0.0045 * 0.0025) / 0.004)
    assert lead(RECORD, point(K_QUANT, 1.5, 0.1), "code") is None
    assert list(missed(RECORD)) == [
        "3.50 bits on code: ratio 0.90, bound 0.80",
        "AutoScheme 3.5 (3.50 bits) on code: ours is 1.12 of it",
        "3.50 bits on dialogues: ratio 0.90, bound 0.80",
        "AutoScheme 3.5 (3.50 bits) on dialogues: ours is 1.12 of it",
    ]


def test_the_tables_and_the_plot_show_every_version():
    text = render(RECORD)
    assert "| 2.50 | 0.01200 | 0.02000 | 0.60 | 0.02400 | 0.04000 | 0.60 |" in text
    assert "| Q3_K | 3.00 | 0.01000 | 0.02000 | 0.73 / 0.73 |" in text
    assert "failed: out of memory" in text
    assert text.count("Missed: ") == 4
    image = draw(RECORD)
    root = ElementTree.fromstring(image)
    assert root.tag.endswith("svg")
    assert "lowmem, mixed widths" in image
    assert draw(RECORD) == image


# --- the command --------------------------------------------------------------------------------------------


def test_versions_have_names_of_their_own():
    for peers in (frozenset[str](), frozenset({"llama.cpp", "AutoRound"})):
        versions = all_versions(peers)
        assert len({v.key for v in versions}) == len({v.label for v in versions}) == len(versions)
    assert {v.family for v in all_versions(frozenset())} == {MIXED, UNIFORM}


def test_a_record_survives_its_file(tmp_path, capsys):
    assert from_json(CurveRecord, json.loads(json.dumps(to_json(RECORD)))) == RECORD
    file = tmp_path / "curve.json"
    file.write_text(json.dumps(to_json(RECORD)))
    assert command.main(["--show", "--out", str(file)]) == 0
    assert capsys.readouterr().out == render(RECORD) + "\n"
    file.write_text("{}")
    assert command.main(["--show", "--out", str(file)]) == 2
    assert command.main(["--draw", "--out", str(file)]) == 2


def test_the_committed_measurement_keeps_the_bounds():
    """What the documents say: mixed widths beat uniform ones by the bound, and every peer, on all texts."""
    record = command.CURVE.read()
    assert len(record.of(MIXED)) >= 4
    assert not [point for point in record.points if point.failure]
    assert list(missed(record)) == []
    assert command.IMAGE.is_file()
