"""Reports on hostile and extreme records."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lowmem.benchmarks.common.record_file import write_record
from lowmem.benchmarks.common.records import HumanEvalRecord, LatencyRecord, QualityRecord
from lowmem.benchmarks.report.build import make_report
from lowmem.benchmarks.report.inputs import Records
from lowmem.benchmarks.report.markdown import escaped, to_markdown
from lowmem.benchmarks.report.numbers import clean
from lowmem.benchmarks.report.page import to_html
from lowmem.benchmarks.report.svg import text_width
from markdown_it import MarkdownIt

from tests.benchmarks.bench_records import (
    FORMS,
    HOSTILE,
    a_subject_latency,
    latency_record,
    quality_record,
)
from tests.benchmarks.report_helpers import COMMAND, Cells, drawings, extreme_report, hostile_report, text_of
from tests.benchmarks.test_records import values_of

# --- hostile texts in records ------------------------------------------------------------------------------


def test_hostile_texts_stay_plain_text_in_html():
    report = hostile_report()
    page = Cells(to_html(report))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "b"}
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    links = [
        v for _, attributes in page.tags for n, v in attributes.items() if n in ("href", "src", "xlink:href")
    ]
    assert all(link.startswith(("#", "data:image/svg+xml,%3Csvg")) for link in links)
    assert clean(HOSTILE) in page.tables["Quality over all tokens"][2]


def test_hostile_texts_stay_plain_text_in_markdown():
    report = hostile_report()
    markdown = to_markdown(report)
    html = MarkdownIt("commonmark").enable("table").enable("strikethrough").render(markdown)
    read = Cells(html)
    allowed = {"h1", "h2", "h3", "p", "pre", "code", "strong", "ul", "li", "blockquote", "a"}
    allowed |= {"table", "thead", "tbody", "tr", "th", "td"}
    assert {tag for tag, _ in read.tags} <= allowed
    assert [a["href"] for tag, a in read.tags if tag == "a"] == ["report.html"]
    named = [
        re.findall(r"<td[^>]*>(.*?)</td>", row)
        for row in re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL)
    ]
    assert any(clean(HOSTILE) in [text_of(cell) for cell in row] for row in named)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=30))
@example("1. a")
@example("- a")
@example("a|b")
@example("http://a.b www.a.b a@b.c")
@example("&lt;")
def test_escaped_text_is_shown_literally(text):
    html = MarkdownIt("commonmark").enable("table").render(f"| a |\n|--|\n| {escaped(text)} |\n")
    (cell,) = re.findall(r"<td>(.*?)</td>", html, flags=re.DOTALL)
    assert text_of(cell) == text
    paragraph = MarkdownIt("commonmark").render(escaped(text))
    assert re.fullmatch(r"<p>.*</p>\n", paragraph, flags=re.DOTALL)
    assert text_of(paragraph).strip("\n") == text


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.builds(
        Records,
        values_of(QualityRecord),
        st.none() | values_of(LatencyRecord),
        st.none() | values_of(HumanEvalRecord),
    )
)
def test_any_record_makes_pages(records):
    report = make_report(records, COMMAND)
    to_html(report).encode()
    to_markdown(report).encode()


def test_extreme_records_make_pages():
    report = extreme_report()
    rows = Cells(to_html(report)).tables["Quality over all tokens"]
    assert len(rows) == 32
    assert rows[3][3] == "0"
    for drawing in drawings(report):
        texts = [e.text for e in drawing.iter("{http://www.w3.org/2000/svg}text")]
        assert max(text_width(text) for text in texts) <= float(drawing.attrib["viewBox"].split()[2])


def test_one_version_makes_a_page():
    quality = quality_record((), texts=("one",))
    report = make_report(Records(quality), COMMAND)
    assert report.story == () and report.tiles == ()
    assert len(Cells(to_html(report)).tables["Quality over all tokens"]) == 2


def test_the_same_records_give_the_same_bytes(tmp_path):
    """Pages do not depend on the process, the hash seed or the configuration of matplotlib."""
    write_record(quality_record(FORMS[:2]), tmp_path)
    write_record(latency_record([a_subject_latency(FORMS[0])]), tmp_path)
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.grid: True\nsvg.fonttype: path\n")
    code = (
        "import sys; from pathlib import Path; from lowmem.benchmarks.report.build import *\n"
        "from lowmem.benchmarks.report.inputs import *; from lowmem.benchmarks.report.page import to_html\n"
        "from lowmem.benchmarks.report.markdown import to_markdown\n"
        f"report = make_report(read_records(Path({str(tmp_path)!r})), 'c')\n"
        "sys.stdout.write(to_html(report) + to_markdown(report))"
    )
    made = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": str(Path(__file__).parent.parent.parent),
                "PYTHONIOENCODING": "utf-8",
            }
            | extra,
            cwd=tmp_path,
            capture_output=True,
            check=True,
        ).stdout
        for seed, extra in (("1", {}), ("2", {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}))
    ]
    assert made[0] == made[1]
    assert b"<svg" in made[0]
