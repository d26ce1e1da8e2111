"""Whether records were measured with the current code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from lowmem.benchmarks.common import currency
from lowmem.benchmarks.common.currency import is_current, made_with, outdated, recipe_version
from lowmem.benchmarks.common.record_file import from_json, read_record, to_json, write_record
from lowmem.benchmarks.common.records import LatencyRecord, MadeWith

from tests.benchmarks.bench_records import FLOOR, FORMS, a_subject_latency, latency_record

KERNEL = "lowmem AVX2"
NOW = MadeWith(KERNEL, currency.KERNELS, currency.RECIPE_VERSION)


def record_of(*made: MadeWith | None) -> LatencyRecord:
    subjects = [
        replace(subject, made_with=one) for subject, one in zip((FORMS[3], FLOOR), made, strict=False)
    ]
    return latency_record([a_subject_latency(subject, (64,)) for subject in subjects])


def test_a_record_of_the_current_code_is_current(tmp_path):
    record = record_of(NOW, MadeWith("torch", 0, 0))
    assert is_current(record) and outdated(record) == ()
    write_record(record, tmp_path)
    assert read_record(LatencyRecord, tmp_path) == record


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (None, "does not say"),
        (replace(NOW, recipe=currency.RECIPE_VERSION - 1), "converted by recipe"),
        (replace(NOW, kernel_contract=currency.KERNELS - 1), "ran kernels"),
    ],
)
def test_a_record_of_other_kernels_or_another_recipe_is_outdated(made, says):
    (line,) = outdated(record_of(made))
    assert line.startswith("4-bit g128: ") and says in line


def test_a_record_without_these_fields_is_readable_and_of_unknown_code():
    data = to_json(record_of(NOW))
    del data["subjects"][0]["subject"]["made_with"]
    record = from_json(LatencyRecord, json.loads(json.dumps(data)))
    assert record.subjects[0].subject.made_with is None and not is_current(record)


def test_the_code_recorded_for_a_folder(tmp_path: Path):
    assert made_with(tmp_path) == MadeWith("", 0, 0)
    report = tmp_path / "lowmem-report.json"
    report.write_text(json.dumps({"recipe": {"recipe version": 7}}))
    assert made_with(tmp_path, KERNEL) == MadeWith(KERNEL, currency.KERNELS, 7)
    assert made_with(tmp_path, "reference").kernel_contract == 0
    for damage in ("[", "[]", '{"recipe": 3}', '{"recipe": {"recipe version": "x"}}'):
        report.write_text(damage)
        assert recipe_version(tmp_path) == 0


def test_a_page_names_recipe_and_kernel():
    from lowmem.benchmarks.report.build import make_report
    from lowmem.benchmarks.report.inputs import Records
    from lowmem.benchmarks.report.markdown import to_markdown

    page = to_markdown(make_report(Records(latency=record_of(NOW)), "lowmem bench report"))
    assert f"recipe {NOW.recipe}; {KERNEL}, contract {currency.KERNELS}" in page
