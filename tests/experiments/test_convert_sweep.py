"""The sweep over layers and tokens: its line, its table and its drawing, from made-up figures."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from lowmem.benchmarks.experiments.full_size import conversion_sweep as sweep


def run(layers: int, tokens: int) -> dict:
    return {
        "layers": layers,
        "tokens": tokens,
        "seconds": 3 + layers * tokens / 8192,
        "phases": dict.fromkeys(sweep.PHASES, 0.5),
        "peak_bytes": (600 << 20) + tokens * 100,
    }


DATA = {
    "command": "python -m lowmem.benchmarks.experiments.full_size.conversion_sweep",
    "origin": {"date": "2026-01-01T00:00:00", "machine": {"cpu": "one", "cores": 2}},
    "dimensions": "small",
    "by_layers": [run(n, 8192) for n in sweep.LAYERS],
    "by_tokens": [run(4, n * sweep.ROW_LENGTH) for n in sweep.ROWS],
}


def test_the_line_is_that_of_least_squares():
    line = sweep.line_through([(x, 2 + 3 * x) for x in (1.0, 2.0, 5.0)])
    assert line["offset"] == pytest.approx(2)
    assert line["slope"] == pytest.approx(3)
    assert line["farthest"] == pytest.approx(0, abs=1e-9)
    bent = sweep.line_through([(x, x * x) for x in (1.0, 2.0, 3.0, 4.0)])
    assert bent["farthest"] > 0.05


def test_the_table_says_how_far_from_a_line_it_is():
    text = sweep.render(DATA)
    assert "A layer takes 1.00 s, 1,000 tokens 0.49 s" in text
    assert "0% (layers) and 0% (tokens)" in text
    assert "differs by 0 MiB between 2 and 16 layers" in text
    assert text.count("\n|") == 1 + len(sweep.LAYERS) + len(sweep.ROWS)


def test_the_drawing_is_an_svg_with_colours_of_its_own():
    text = sweep.draw(DATA)
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    style = next(e.text for e in root.iter() if e.tag.endswith("style"))
    used = {part.split(")")[0] for part in text.split("var(")[1:]}
    assert used and all(f"{name}:" in style for name in used)
    assert "prefers-color-scheme:dark" in style
    assert sweep.draw(DATA) == text
