"""Fixtures for tests of the benchmarks: records, and a report on them."""

from __future__ import annotations

import pytest
from lowmem.benchmarks.report.build import make_report
from lowmem.benchmarks.report.document import Report
from lowmem.benchmarks.report.inputs import Records

from tests.benchmarks.bench_records import (
    FLOOR,
    FORMS,
    a_subject_latency,
    humaneval_record,
    latency_record,
    quality_record,
)


@pytest.fixture(scope="module")
def records() -> Records:
    return Records(quality_record(), latency_record(), humaneval_record())


@pytest.fixture(scope="module")
def few() -> Records:
    """The same three records with only two versions, which are faster to draw."""
    latency = latency_record([a_subject_latency(form, (64,)) for form in (FLOOR, FORMS[3])])
    return Records(quality_record((FORMS[3],), ("one",)), latency, humaneval_record((FLOOR, FORMS[3])))


@pytest.fixture(scope="module")
def report(records) -> Report:
    return make_report(records, "lowmem bench report")
