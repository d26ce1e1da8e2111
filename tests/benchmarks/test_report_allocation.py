"""The bits of each linear in records and reports: read from a conversion, drawn at their places, readable."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from lowmem.benchmarks.common.record_file import read_record, write_record
from lowmem.benchmarks.common.records import Allocated, AllocatedLinear, QualityRecord
from lowmem.benchmarks.quality.allocated import read_allocated
from lowmem.benchmarks.report.allocation_sections import allocation_sections
from lowmem.benchmarks.report.build import make_report
from lowmem.benchmarks.report.inputs import Records
from lowmem.benchmarks.report.markdown import to_markdown
from lowmem.benchmarks.report.numbers import significant, with_error
from lowmem.benchmarks.report.page import to_html
from lowmem.benchmarks.report.quality_sections import pooled
from lowmem.benchmarks.report.svg import FINE, NARROW, WIDE, text_width
from lowmem.convert.recipe import Recipe
from lowmem.convert.result.card import CardFacts
from lowmem.convert.stages.context import LinearReport

from lowmem.checkpoint.formats import LinearFormat
from lowmem.config import QuantConfig
from lowmem.plan.fit.allocation import Allocation
from tests.benchmarks.bench_records import FORMS, HOSTILE, quality_record
from tests.benchmarks.report_helpers import COMMAND, text_of

SVG = "{http://www.w3.org/2000/svg}"
STARCODER = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
         "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def allocated(kinds, layers: int, prefix: str = "transformer.h.") -> Allocated:
    """An allocation with widths from 2 to 8 and sensitivities over four powers of ten."""
    chance = random.Random(layers)
    linears = tuple(
        AllocatedLinear(
            f"{prefix}{layer}.{kind}",
            chance.choice((2, 3, 4, 5, 6, 8)),
            chance.choice((128, 64, -1)),
            chance.random() < 0.5,
            10 ** chance.uniform(-6, -3),
            10 ** chance.uniform(-6.9, -3.1),
        )
        for layer in range(layers)
        for kind in kinds
    )
    return Allocated("--bpw 3.5", 0.00123, linears)


def record_with(*found: Allocated | None) -> QualityRecord:
    """Each of FORMS with an allocation, or none."""
    record = quality_record(FORMS[: len(found)], ("one",))
    floor, *subjects = record.subjects
    subjects = [dataclasses.replace(s, allocated=a) for s, a in zip(subjects, found, strict=True)]
    return dataclasses.replace(record, subjects=(floor, *subjects))


# --- from the folder to the record ------------------------------------------------------------------------


def report_of(folder: Path) -> Path:
    """The report of a conversion, by the code that writes it."""
    formats = {
        "transformer.h.0.attn.c_attn": LinearFormat(5, 64),
        "transformer.h.11.attn.c_attn": LinearFormat(2, -1, sym=False),
    }
    costs, sensitivities = dict.fromkeys(formats, 3e-5), dict.fromkeys(formats, 0.0)
    facts = CardFacts(
        base_model="m",
        license_name=None,
        license_files=(),
        recipe={},
        quantization=Recipe(QuantConfig()),
        calibration="c",
        calibration_shape=(1, 1),
        weights_bytes=1,
        bits_per_weight=3.5,
        reports=(LinearReport(*(1,) * len(dataclasses.fields(LinearReport))),),
        made_for="--size 9GiB",
        allocation=Allocation(formats, 0.25, 100, 3.5, costs, sensitivities),
    )
    folder.mkdir(exist_ok=True)
    file = folder / "lowmem-report.json"
    file.write_text(json.dumps({"allocation": facts.as_json()["allocation"]}))
    return file


def test_the_allocation_of_a_conversion_is_read(tmp_path):
    report_of(tmp_path / "m")
    assert read_allocated(tmp_path / "m") == Allocated(
        "--size 9GiB",
        0.25,
        (
            AllocatedLinear("transformer.h.0.attn.c_attn", 5, 64, True, 3e-5, 0.0),
            AllocatedLinear("transformer.h.11.attn.c_attn", 2, -1, False, 3e-5, 0.0),
        ),
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.pop("made_for"),
        lambda found: found.update(made_for="a\nb"),
        lambda found: found.update(predicted_kld="0.1"),
        lambda found: found.update(predicted_kld=math.nan),
        lambda found: found.update(predicted_kld=10**400),
        lambda found: found.update(linears=[]),
        lambda found: found["linears"].update(other=3),
        lambda found: found["linears"]["transformer.h.0.attn.c_attn"].update(bits=True),
        lambda found: found["linears"]["transformer.h.0.attn.c_attn"].pop("sensitivity"),
        lambda found: found["linears"]["transformer.h.0.attn.c_attn"].update(sensitivity=-1),
        lambda found: found["linears"].update({"a\x1b[2J": found["linears"]["transformer.h.0.attn.c_attn"]}),
    ],
)
def test_a_damaged_allocation_is_left_out(tmp_path, damage):
    file = report_of(tmp_path / "m")
    content = json.loads(file.read_text())
    damage(content["allocation"])
    file.write_text(json.dumps(content))
    assert read_allocated(tmp_path / "m") is None


def test_folders_without_an_allocation_have_none(tmp_path):
    assert read_allocated(tmp_path) is None
    (tmp_path / "lowmem-report.json").write_text('{"base_model": "m"}')
    assert read_allocated(tmp_path) is None


def test_records_carry_it_and_old_records_load(tmp_path):
    record = record_with(allocated(STARCODER, 2), None)
    file = write_record(record, tmp_path)
    assert read_record(QualityRecord, tmp_path) == record
    old = json.loads(file.read_text())
    for subject in old["subjects"]:
        del subject["allocated"]
    file.write_text(json.dumps(old))
    assert read_record(QualityRecord, tmp_path) == record_with(None, None)


# --- the report -------------------------------------------------------------------------------------------


def test_the_section_has_the_figures_and_a_text_alternative():
    record = record_with(None, allocated(STARCODER, 3))
    report = make_report(Records(record), COMMAND)
    (section,) = [s for s in report.sections if s.key.startswith("allocation")]
    assert section.heading == "Bits by layer: int8"
    measured = pooled(record.subjects[2].texts)
    text = " ".join(section.text)
    assert "--bpw 3.5" in text and "0.00123" in text and with_error(measured.kld, measured.kld_error) in text
    bits, sensitivities = section.tables
    assert [c.heading for c in bits.columns] == ["Layer", *STARCODER]
    for linear in record.subjects[2].allocated.linears:
        _, _, layer, kind = linear.name.split(".", 3)
        column = 1 + STARCODER.index(kind)
        group = "one group" if linear.group_size == -1 else f"g{linear.group_size}"
        assert bits.rows[int(layer)][column].startswith(f"{linear.bits}, {group}")
        assert ("asymmetric" in bits.rows[int(layer)][column]) != linear.sym
        assert sensitivities.rows[int(layer)][column] == significant(linear.sensitivity)
    drawing = ElementTree.fromstring(section.plot.wide)
    words = drawing.find(f"{SVG}desc").text
    most = max(record.subjects[2].allocated.linears, key=lambda one: one.sensitivity)
    assert "3 decoder layers" in words and significant(most.sensitivity) in words
    assert drawing.find(f"{SVG}title").text == section.heading
    assert "decoder layer" in text_of(section.plot.wide)
    for page in (to_html(report), to_markdown(report)):
        assert section.heading in page


def test_a_report_without_allocations_has_no_such_section():
    assert allocation_sections(record_with(None, None)) == []


def boxes(drawing: ElementTree.Element, color: str) -> list[tuple[float, float, float]]:
    """(left, top, opacity) of the rectangles of a colour that are cells: those with an outline."""
    found = []
    for path in drawing.iter(f"{SVG}path"):
        style = path.attrib.get("style", "")
        if f"fill: var(--{color})" in style and "stroke: var(--line)" in style:
            xs = [float(x) for x in re.findall(r"[ML] (\S+) ", path.attrib["d"])]
            ys = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path.attrib["d"])]
            opacity = re.search(r"fill-opacity: ([\d.]+)", style)
            found.append((min(xs), min(ys), float(opacity[1]) if opacity else 1.0))
    return found


@pytest.mark.parametrize("width", ["narrow", "wide"])
def test_cells_are_coloured_by_bits_and_by_sensitivity(width):
    """A row for each kind from the top, layers from the left; more opaque means more."""
    found = allocated(STARCODER, 6)
    (section,) = allocation_sections(record_with(found))
    drawing = ElementTree.fromstring(getattr(section.plot, width))
    values = {one.name.partition(".h.")[2]: one for one in found.linears}
    order = [values[f"{layer}.{kind}"] for kind in STARCODER for layer in range(6)]
    for color, value in (("s1", lambda one: one.bits), ("s2", lambda one: one.sensitivity)):
        cells = sorted(boxes(drawing, color), key=lambda box: (round(box[1]), box[0]))
        assert len(cells) == 24
        assert len({round(top) for _, top, _ in cells}) == 4
        pairs = sorted(zip(map(value, order), (opacity for *_, opacity in cells), strict=True))
        opacities = [opacity for _, opacity in pairs]
        assert opacities == sorted(opacities) and opacities[0] < opacities[-1]
    # The logarithm of the sensitivity is what opacity grows by.
    first, middle, last = (pairs[i] for i in (0, 12, -1))
    slope = (last[1] - first[1]) / math.log(last[0] / first[0])
    assert middle[1] == pytest.approx(first[1] + slope * math.log(middle[0] / first[0]), abs=1e-3)


@pytest.mark.parametrize(("kinds", "layers"), [(STARCODER, 40), (LLAMA, 80), (("fc",), 2)], ids=str)
def test_large_models_stay_readable(kinds, layers):
    """Every linear's bits are written in 12 pixels or more, apart from one another and inside the figure."""
    found = allocated(kinds, layers, "model.layers.")
    (section,) = allocation_sections(record_with(found))
    for svg, width in ((section.plot.narrow, NARROW), (section.plot.wide, WIDE)):
        drawing = ElementTree.fromstring(svg)
        _, _, wide, high = map(float, drawing.attrib["viewBox"].split())
        assert wide == width
        lines: dict[int, list[tuple[float, str]]] = {}
        written = []
        for text in drawing.iter(f"{SVG}text"):
            assert float(re.search(r"font-size: ([\d.]+)px", text.attrib["style"])[1]) >= FINE
            if "x" in text.attrib and re.fullmatch(r"\d+", text.text or ""):
                x, y = float(text.attrib["x"]), float(text.attrib["y"])
                assert 0 < x < wide and 0 < y < high
                lines.setdefault(round(y), []).append((x, text.text))
                written.append(text.text)
        for line in lines.values():
            line.sort()
            for (x, one), (after, other) in pairwise(line):
                assert after - x >= (text_width(one, FINE) + text_width(other, FINE)) / 2
        assert len(written) >= len(found.linears) + 1
        assert len(boxes(drawing, "s1")) == len(boxes(drawing, "s2")) == len(found.linears)


def test_hostile_and_odd_allocations_are_drawn_or_left_to_the_table():
    """Layers far apart, a name that is markup, linears outside of layers, a sensitivity of 0, very many."""
    one = AllocatedLinear("h.0.fc", 4, 128, True, 0.0, 0.0)
    odd = (one, dataclasses.replace(one, name=f"h.999999.{HOSTILE}", bits=1 << 40, sensitivity=1e29))
    odd += (dataclasses.replace(one, name="lm_head"),)
    many = tuple(dataclasses.replace(one, name=f"h.{i}.fc") for i in range(300))
    outside = (dataclasses.replace(one, name="lm_head"),)
    record = record_with(*(Allocated(HOSTILE, 0.0, linears) for linears in (odd, many, outside)))
    report = make_report(Records(record), HOSTILE)
    drawn, tables = [s for s in report.sections if s.key.startswith("allocation")]
    assert drawn.plot is not None and [len(t.rows) for t in drawn.tables] == [2, 2]
    assert tables.plot is None and [len(t.rows) for t in tables.tables] == [300, 300]
    assert "<script>" not in to_html(report)
    for svg in (drawn.plot.narrow, drawn.plot.wide):
        ElementTree.fromstring(svg)
