"""The report's plots: readable, accessible, and true to the records."""

from __future__ import annotations

import re
import sys

import pytest
from lowmem.benchmarks.report.build import make_report
from lowmem.benchmarks.report.inputs import Records
from lowmem.benchmarks.report.page import to_html
from lowmem.benchmarks.report.svg import NARROW, WIDE

from lowmem.errors import InvalidRequestError
from tests.benchmarks.bench_records import FORMS, KLD, a_subject_latency, latency_record, quality_record
from tests.benchmarks.report_helpers import COMMAND, Cells, drawings


def test_drawings_have_unique_titles_and_ids(report):
    page = Cells(to_html(report))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', to_html(report))
    assert {a or b for a, b in references} <= set(ids)
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(svgs) == 14
    for attributes in svgs:
        assert attributes["role"] == "img"
        assert set(attributes["aria-labelledby"].split()) <= set(ids)


def test_drawings_take_their_colours_from_the_page(report):
    css = to_html(report).partition("<style>")[2].partition("</style>")[0]
    light, dark = css.partition("prefers-color-scheme: dark")[::2]
    for svg in (
        s for section in report.sections if section.plot for s in (section.plot.narrow, section.plot.wide)
    ):
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
        for variable in set(re.findall(r"var\((--\w+)\)", svg)):
            assert f"{variable}:" in light and f"{variable}:" in dark


def test_drawings_show_each_point_at_its_place(report):
    """Read back the markers of the quality plot: lower means less divergence, right means more bits."""
    wide = next(d for d in drawings(report) if "quality-wide" in d.attrib["aria-labelledby"])
    assert wide.attrib["viewBox"].split()[2] == str(WIDE)
    uses = list(wide.iter("{http://www.w3.org/2000/svg}use"))
    colors = {f"var(--s{i})" for i in range(1, 9)}
    places = [
        (float(u.attrib["x"]), float(u.attrib["y"]))
        for u in uses
        if any(color in u.attrib["style"] for color in colors)
    ]
    assert len(places) == 2 * len(FORMS), "each version once in the plot and once in the legend"
    places = places[: len(FORMS)]
    across = sorted(range(5), key=lambda i: places[i][0])
    assert across == sorted(range(5), key=lambda i: FORMS[i].bits_per_weight)
    down = sorted(range(5), key=lambda i: -places[i][1])
    assert down == sorted(range(5), key=lambda i: KLD[FORMS[i].label])


def test_bar_lengths_equal_their_figures():
    record = latency_record([a_subject_latency(form, contexts=(64,)) for form in FORMS])
    wide = next(
        d
        for d in drawings(make_report(Records(latency=record), COMMAND))
        if "decode-wide" in d.attrib["aria-labelledby"]
    )
    paths = [
        p.attrib["d"]
        for p in wide.iter("{http://www.w3.org/2000/svg}path")
        if "fill: var(--s1)" in p.attrib.get("style", "")
    ]
    lengths = []
    for path in paths[:-1]:  # the last one belongs to the legend
        xs = [float(x) for x in re.findall(r"[ML] (\S+) ", path)]
        lengths.append(max(xs) - min(xs))
    speeds = [1 / s.decode[0].tpot.median for s in record.subjects]
    assert lengths == pytest.approx([lengths[0] * speed / speeds[0] for speed in speeds], rel=0.01)


def test_a_phone_shows_the_narrow_drawing_unscaled(report):
    for drawing in drawings(report):
        width = int(drawing.attrib["viewBox"].split()[2])
        assert width in (NARROW, WIDE)
        for text in drawing.iter("{http://www.w3.org/2000/svg}text"):
            assert float(re.search(r"font-size: ([\d.]+)px", text.attrib["style"])[1]) >= 12


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'lowmem\[bench\]'"):
        make_report(Records(quality_record(FORMS[:1], ("one",))), COMMAND)
