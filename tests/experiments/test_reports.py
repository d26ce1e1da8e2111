"""The committed reports: which code their figures are of, and the series that makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from lowmem.benchmarks.common.record_file import read_record
from lowmem.benchmarks.common.records import LatencyRecord, QualityRecord
from lowmem.benchmarks.experiments import reports
from lowmem.benchmarks.experiments.common import RESULTS
from lowmem.benchmarks.experiments.reports import MODELS, Model


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_committed_page_is_of_the_code_that_it_stands_beside(model: Model) -> None:
    assert reports.check(RESULTS / model.name) == []


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_width_is_in_the_records(model: Model) -> None:
    for kind in (QualityRecord, LatencyRecord):
        record = read_record(kind, RESULTS / model.name)
        assert record is not None
        labels = [entry.subject.label for entry in record.subjects]
        for bits, _ in model.widths:
            assert any(label.startswith(f"{bits}-bit") for label in labels)


def test_the_series_converts_measures_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command in the model's own folder; what is converted already is not converted again."""
    said: list[str] = []

    def lowmem(folder: Path, *words: str) -> None:
        said.append(" ".join(words))
        if words[0] == "convert":
            (folder / words[2]).mkdir()
        if words[1] == "report":
            (folder / reports.FOLDER).mkdir(exist_ok=True)
            (folder / reports.FOLDER / "report.md").write_text("a page")

    monkeypatch.setattr(reports, "lowmem", lowmem)
    monkeypatch.setattr(reports, "RESULTS", tmp_path / "results")
    for _ in range(2):
        assert reports.main(["tiny-starchat", "--work", str(tmp_path / "work")]) == 0
    assert [line.split()[0] for line in said] == ["convert"] * 4 + ["bench"] * 6
    assert said[1] == "convert tiny-starchat tiny-starchat-4bit --bits 4 --group-size 128"
    assert (tmp_path / "results" / "tiny-starchat" / "report.md").read_text() == "a page"
    assert (tmp_path / "work" / "tiny-starchat" / "tiny-starchat" / "config.json").is_file()
