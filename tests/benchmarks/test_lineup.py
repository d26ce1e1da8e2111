"""Which versions are measured, and against which reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from lowmem.benchmarks.common.lineup import Lineup, LineupRequest, line_up

from lowmem.errors import InvalidRequestError, SourceError
from tests.helpers import save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint


@pytest.fixture
def models(tmp_path: Path, monkeypatch) -> Path:
    """A source with two 4-bit conversions and one 8-bit conversion, and an empty cache."""
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    save_source(tiny_model("llama"), tmp_path / "m" / "model")
    for name, bits in (("one", 4), ("two", 4), ("three", 8)):
        folder = tmp_path / "m" / name
        write_rtn_checkpoint(tiny_model("llama"), folder, bits=bits)
        (folder / "lowmem-report.json").write_text(json.dumps({"base_model": "model"}))
    return tmp_path / "m"


def lined_up(*models: str, versions=(), reference: str | None = None) -> Lineup:
    return line_up(LineupRequest(models, reference, tuple(versions)))


def labels(lineup) -> list[str]:
    return [entrant.subject.label for entrant in lineup.entrants]


def test_an_unquantized_model_adds_all_its_versions(models):
    lineup = lined_up(str(models / "model"))
    assert lineup.source == str(models / "model")
    assert labels(lineup) == [
        "float32", "bfloat16", "8-bit g32", "int8", "4-bit g32 (one)", "4-bit g32 (two)", "NF4"
    ]  # fmt: skip


def test_a_folder_adds_itself_and_its_report_names_the_reference(models):
    lineup = lined_up(str(models / "two"), str(models / "three"))
    assert lineup.source == str(models / "model")
    assert labels(lineup) == ["8-bit g32", "4-bit g32"]


def test_sizes_equal_those_of_the_files(models):
    lineup = lined_up(str(models / "model"), str(models / "one"), versions=["bfloat16", "4-bit", "int8"])
    found = {entrant.subject.label: entrant.subject for entrant in lineup.entrants}
    assert found["bfloat16"].bits_per_weight == 16
    model = tiny_model("llama")
    linears = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]
    count = sum(p.numel() for p in linears)
    from safetensors import safe_open

    with safe_open(models / "one" / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.endswith(("qweight", "qzeros", "scales", "g_idx"))]  # noqa: SIM118
        packed = sum(file.get_tensor(n).nbytes for n in names)
    assert found["4-bit g32 (one)"].bits_per_weight == pytest.approx(8 * packed / count)
    assert found["int8"].bits_per_weight == pytest.approx(8 + 32 * sum(p.shape[0] for p in linears) / count)


def test_a_version_given_twice_is_measured_once(models):
    assert labels(lined_up(str(models / "model"), str(models / "three"), versions=["8-bit"])) == ["8-bit g32"]


def test_the_source_of_a_folder_must_be_known(models):
    shutil.move(models / "model", models.parent / "elsewhere")
    with pytest.raises(SourceError, match="--reference SOURCE"):
        lined_up(str(models / "one"))
    lineup = lined_up(str(models / "one"), reference=str(models.parent / "elsewhere"))
    assert lineup.source == str(models.parent / "elsewhere") and labels(lineup) == ["4-bit g32"]


def test_two_models_and_quantized_references_are_refused(models):
    save_source(tiny_model("llama", layers=3), models.parent / "other")
    with pytest.raises(InvalidRequestError, match="both unquantized"):
        lined_up(str(models / "model"), str(models.parent / "other"))
    with pytest.raises(SourceError, match="2 decoder layers, not 3"):
        lined_up(str(models / "one"), reference=str(models.parent / "other"))
    with pytest.raises(SourceError, match="is quantized"):
        lined_up(str(models / "one"), reference=str(models / "two"))
    with pytest.raises(SourceError, match="does not exist"):
        lined_up(str(models / "none"))


def test_unknown_or_missing_versions_are_refused(models):
    with pytest.raises(InvalidRequestError, match="--versions int9"):
        lined_up(str(models / "model"), versions=["int9"])
    with pytest.raises(InvalidRequestError, match="Available are float32"):
        lined_up(str(models / "model"), versions=["3-bit"])


def test_records_use_relative_paths_where_possible(tmp_path, monkeypatch):
    source = save_source(tiny_model("llama"), tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    for model in ("model", str(source)):
        assert {entrant.subject.path for entrant in lined_up(model).entrants} == {"model"}
    monkeypatch.chdir(source)
    assert lined_up(str(source)).entrants[0].subject.path == "."
