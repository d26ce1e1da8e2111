"""The sweep over layers and tokens: its line, its table and its plot, from made-up figures."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from lowmem.benchmarks.common.records import Machine, Origin
from lowmem.benchmarks.experiments.full_size import sweep
from lowmem.benchmarks.experiments.full_size.sweep import LAYERS, PHASES, ROW_LENGTH, ROWS, Point, Sweep
from lowmem.benchmarks.experiments.processes import Usage


def point(layers: int, tokens: int) -> Point:
    usage = Usage(1.0, 1.0, (600 << 20) + tokens * 100, 0, 0.0)
    return Point(layers, tokens, 3 + layers * tokens / 8192, (0.5,) * len(PHASES), 1, 0, usage)


RECORD = Sweep(
    Origin("python", "2026-01-01T00:00:00", Machine("one", (), 2, 1, "cpu", 0), (), "m", "", 0.0),
    tuple(point(n, 8192) for n in LAYERS),
    tuple(point(4, n * ROW_LENGTH) for n in ROWS),
)


def test_the_line_is_that_of_least_squares():
    line = sweep.line_through([1.0, 2.0, 5.0], [5.0, 8.0, 17.0])
    assert (line.offset, line.slope) == pytest.approx((2, 3))
    assert line.farthest == pytest.approx(0, abs=1e-9)
    assert sweep.line_through([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0]).farthest > 0.05


def test_the_table_says_how_far_from_a_line_it_is():
    text = sweep.render(RECORD)
    assert "A layer takes 1.00 s, 1,000 tokens 0.49 s" in text
    assert "0% (layers) and 0% (tokens)" in text
    assert "differs by 0 MiB between 2 and 16 layers" in text
    assert text.count("\n|") == 1 + len(LAYERS) + len(ROWS)


def test_the_plot_is_an_svg_with_every_point():
    pytest.importorskip("matplotlib")
    text = sweep.draw(RECORD)
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and sweep.draw(RECORD) == text
    uses = [element for element in root.iter() if element.tag.endswith("use")]
    assert sum("#3987e5" in (use.get("style") or "") for use in uses) == len(LAYERS) + len(ROWS)


def test_the_committed_record_is_shown(capsys):
    assert sweep.main(["--show"]) == 0
    assert "A layer takes" in capsys.readouterr().out
