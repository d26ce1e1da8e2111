"""`lowmem bench report`: what the pages say is what the records hold, whatever stands in them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lowmem.benchmarks.common.record_file import to_json, write_record
from lowmem.benchmarks.common.records import HumanEvalRecord, LatencyRecord, QualityRecord
from lowmem.benchmarks.report import command as report_command
from lowmem.benchmarks.report.build import make_report
from lowmem.benchmarks.report.document import Report
from lowmem.benchmarks.report.inputs import Records, cleaned, read_records
from lowmem.benchmarks.report.markdown import escaped, to_markdown
from lowmem.benchmarks.report.numbers import clean, duration, percent, significant, size, with_error
from lowmem.benchmarks.report.page import to_html
from lowmem.benchmarks.report.quality_sections import merged_buckets, pooled
from lowmem.benchmarks.report.svg import NARROW, WIDE, fitted, text_width
from markdown_it import MarkdownIt

from lowmem.errors import OutputError, SourceError
from tests.benchmarks.bench_records import (
    FLOOR,
    FORMS,
    HOSTILE,
    KLD,
    MIB,
    a_subject_latency,
    a_text,
    does_not_fit,
    humaneval_record,
    latency_record,
    many_forms,
    quality_record,
)
from tests.benchmarks.test_records import values_of

COMMAND = "lowmem bench report"


@pytest.fixture(scope="module")
def records() -> Records:
    return Records(quality_record(), latency_record(), humaneval_record())


@pytest.fixture(scope="module")
def few() -> Records:
    """The same three with two forms, sooner drawn."""
    latency = latency_record([a_subject_latency(form, (64,)) for form in (FLOOR, FORMS[3])])
    return Records(quality_record((FORMS[3],), ("one",)), latency, humaneval_record((FLOOR, FORMS[3])))


@pytest.fixture(scope="module")
def report(records) -> Report:
    return make_report(records, COMMAND)


class Cells(HTMLParser):
    """Every table of a page by its caption, as rows of texts; and every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._rows: list[list[str]] = []
        self._open: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th", "caption"):
            self._open = []

    def handle_endtag(self, tag):
        if tag == "caption":
            self._rows = self.tables.setdefault("".join(self._open), [])
        if tag in ("td", "th"):
            self._rows[-1].append("".join(self._open))
        if tag in ("td", "th", "caption"):
            self._open = None

    def handle_data(self, data):
        self.text.append(data)
        if self._open is not None:
            self._open.append(data)


@functools.lru_cache(maxsize=8)
def tables_of(page: str) -> dict[str, list[list[str]]]:
    return Cells(page).tables


def rows_of(page: str, caption: str) -> dict[str, dict[str, str]]:
    """Rows of the page's table by the form that they name, each as {heading: cell}."""
    heading, *rows = tables_of(page)[caption]
    named = [dict(zip(heading, row, strict=True)) for row in rows]
    return {row["Version"]: row for row in named}


# --- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0025, "0.00250"),
        (71.34, "71.3"),
        (9.996, "10.0"),
        (1234.5, "1230"),
        (0.00009996, "0.000100"),
        (0.000015, "1.50×10⁻⁵"),
        (3e12, "3.00×10¹²"),
        (-0.5, "-0.500"),
        (math.nan, "–"),
        (math.inf, "∞"),
    ],
)
def test_a_number_has_three_significant_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.0025034, 0.0000412, "0.002503 ± 0.000041"),
        (25.3124, 0.4321, "25.31 ± 0.43"),
        (1234.5, 56.0, "1234 ± 56"),
        (123456.0, 789.0, "123460 ± 790"),
        (1e97, 0.1, "1.00×10⁹⁷"),
        (1.5e-9, 2e-11, "(1.500 ± 0.020)×10⁻⁹"),
        (0.0, 1e-9, "(0.0 ± 1.0)×10⁻⁹"),
        (0.5, 0.0, "0.500"),
        (0.5, math.nan, "0.500"),
    ],
)
def test_a_number_with_an_error_ends_where_its_error_does(value, error, text):
    assert with_error(value, error) == text


@settings(deadline=None)
@given(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12))
def test_what_is_written_of_an_error_is_within_its_last_digit(value, error):
    text = with_error(value, error)
    power = re.fullmatch(r"\((.*) ± (.*)\)×10(.*)", text)
    plain = re.fullmatch(r"(\S+) ± (\S+)", text)
    found = power or plain
    assert found or value > 1e12 * error
    if not found:
        return
    scale = 10.0 ** int(power[3].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))) if power else 1.0
    assert abs(float(found[2]) * scale - error) <= error * 0.0501
    assert abs(float(found[1]) * scale - value) <= error * 0.0501 + 1e-9 * value


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.714, "71 %"), (1.0, "100 %"), (0.9996, "99.96 %"), (0.0, "0 %"), (0.0042, "0.420 %"), (1.3, "130 %")],
)
def test_a_share_is_never_rounded_to_all_or_nothing(share, text):
    assert percent(share) == text


def test_durations_and_sizes():
    spoken = [duration(s) for s in (0.0456, 1.234, 125, 3725)]
    assert spoken == ["45.6 ms", "1.23 s", "2 min 05 s", "1 h 02 min"]
    assert [size(n) for n in (0, 105 * MIB)] == ["–", "105 MiB"]


@settings(deadline=None)
@given(st.text())
@example(HOSTILE)
def test_a_cleaned_text_fits_every_document(text):
    found = clean(text)
    found.encode()
    ElementTree.fromstring(f"<a>{found.replace('&', '&amp;').replace('<', '&lt;')}</a>")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\r\n]", found)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=80), st.integers(20, 300))
def test_a_fitted_text_is_no_wider_than_asked(text, width):
    assert text_width(fitted(text, width)) <= width


# --- figures in the tables are the record's ----------------------------------------------------------------


def test_the_quality_table_says_what_the_record_holds(records, report):
    rows = rows_of(to_html(report), "Quality over all tokens")
    assert list(rows) == ["bfloat16", *(form.label for form in FORMS)]
    for s in records.quality.subjects:
        row = rows[s.subject.label]
        tokens = sum(t.tokens for t in s.texts)
        kld = sum(t.tokens * t.kld.mean for t in s.texts) / tokens
        error = math.sqrt(sum((t.tokens * t.kld.standard_error) ** 2 for t in s.texts)) / tokens
        assert row["KL divergence"] == with_error(kld, error)
        assert row["Bits per weight"] == significant(s.subject.bits_per_weight)
        assert (
            row["Size"] == f"{size(s.subject.weight_bytes)} ({percent(s.subject.weight_bytes / (402 * MIB))})"
        )
        whole = sum(e == 64 for e in s.greedy.equal_tokens)
        assert row["Greedy equal"] == f"{significant(sum(s.greedy.equal_tokens) / 8)} of 64 ({whole}/8)"
    assert rows["4-bit g128"]["× noise floor"] == "25 ×"  # 0.0025 / 0.000102, whatever the text
    assert rows["bfloat16"]["× noise floor"] == "1.0 ×"


def test_each_text_has_its_table(records, report):
    page = to_html(report)
    for s in records.quality.subjects:
        for t in s.texts:
            row = rows_of(page, f"On {t.text}: 12,288 tokens, reference perplexity 25.312")[s.subject.label]
            assert row["KL divergence"] == with_error(t.kld.mean, t.kld.standard_error)
            assert [row[n] for n in ("median", "p90", "p99", "max")] == [
                significant(v) for v in (t.kld.median, t.kld.p90, t.kld.p99, t.kld.max)
            ]
            assert row["Same top token"] == percent(t.same_top1, t.same_top1_standard_error)
            assert row["Perplexity"] == significant(t.ppl, 5)
            assert row["Perplexity ratio"] == with_error(t.ppl_ratio, t.ppl_ratio_standard_error)


def test_pooled_perplexity_is_that_of_all_tokens_together():
    """The ratio of exp(mean nll) over the union of texts, from each text's own perplexities."""
    texts = [a_text("a", 0.01, tokens=1000, ppl=8.0), a_text("b", 0.2, tokens=3000, ppl=30.0)]
    nll = sum(t.tokens * math.log(t.ppl) for t in texts) / 4000
    reference = sum(t.tokens * math.log(t.reference_ppl) for t in texts) / 4000
    assert pooled(texts).ppl_ratio == pytest.approx(math.exp(nll - reference))
    assert pooled([a_text("a", 0.01, tokens=0)]) is None


def test_buckets_are_merged_by_tokens(records, report):
    rows = rows_of(to_html(report), "Mean KL divergence by the reference's largest probability")
    for s in records.quality.subjects:
        parts = [b for t in s.texts for b in t.buckets if (b.low, b.high) == (0.25, 0.5)]
        kld = sum(b.tokens * b.kld for b in parts) / sum(b.tokens for b in parts)
        assert rows[s.subject.label]["0.25–0.5"] == significant(kld)
    assert rows["tokens"]["0.25–0.5"] == f"{3 * (12288 // 7):,}"
    one = a_text("a", 0.1)
    empty = dataclasses.replace(
        one, buckets=(dataclasses.replace(one.buckets[0], tokens=0), *one.buckets[1:])
    )
    assert list(merged_buckets([empty])) == [(b.low, b.high) for b in one.buckets[1:]]


def test_the_decode_table_says_what_the_record_holds(records, report):
    _, *rows = Cells(to_html(report)).tables["Decode"]
    found = {(row[0], row[1]): row for row in rows}
    for s in records.latency.subjects:
        for d in s.decode:
            row = found[s.subject.label, f"{d.context_tokens:,}"]
            low, high = significant(1 / d.tpot.high), significant(1 / d.tpot.low)
            assert row[2] == f"{significant(1 / d.tpot.median)} ({low}–{high})"
            assert row[3:5] == [significant(d.ceiling_tokens_per_second), percent(d.share)]


def test_latencies_and_prefill_say_what_the_record_holds(records, report):
    tables = Cells(to_html(report)).tables
    itl = {(row[0], row[1]): row[2:] for row in tables["Inter-token latency"][1:]}
    prefill = {(row[0], row[1]): row[2:] for row in tables["Prefill"][1:]}
    for s in records.latency.subjects:
        for d in s.decode:
            times = (d.itl_p50, d.itl_p90, d.itl_p99, max(d.itl_seconds))
            assert itl[s.subject.label, f"{d.context_tokens:,}"] == [
                *(significant(1000 * t) for t in times),
                str(len(d.itl_seconds)),
            ]
        for p in s.prefill:
            row = prefill[s.subject.label, f"{p.prompt_tokens:,}"]
            assert row[0].startswith(significant(p.tokens_per_second.median))
            assert row[1:3] == [significant(p.ceiling_tokens_per_second), percent(p.share)]


def test_humaneval_counts_the_outcomes(records, report):
    rows = rows_of(to_html(report), "Problems solved")
    for s in records.humaneval.subjects:
        row = rows[s.subject.label]
        assert row["pass@1"] == percent(s.pass_at_1, s.standard_error)
        counts = [sum(a.outcome == o for a in s.attempts) for o in ("passed", "failed", "timeout")]
        assert [int(row[o]) for o in ("passed", "failed", "timeout")] == counts
        assert sum(counts) == 164


def test_both_pages_have_the_same_tables(report):
    html = Cells(to_html(report)).tables
    markdown = MarkdownIt("commonmark").enable("table").render(to_markdown(report))
    cells = [list(row) for table in html.values() for row in table]
    in_markdown = re.findall(r"<tr>(.*?)</tr>", markdown, flags=re.DOTALL)
    plain = [[_text(c) for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in in_markdown]
    missing = [row for row in cells if row not in plain]
    assert not missing


def _text(markup: str) -> str:
    reader = Cells(markup)
    return "".join(reader.text)


# --- the story ---------------------------------------------------------------------------------------------


def test_the_story_is_of_the_record(report):
    assert report.tiles_of == "4-bit g128, at 4.16 bits per weight"
    assert report.story[0].startswith("4-bit g128 takes 26 % of the memory of bfloat16 (105 MiB of 402 MiB).")
    assert "25 × the noise floor" in report.story[0]
    assert "decodes 231 tokens per second, 71 % of what this machine allows" in report.story[1]
    assert report.story[2] == "bfloat16 decodes 60.4 tokens per second, so 4-bit g128 is 3.8 times as fast."
    assert [tile.figure for tile in report.tiles] == ["26 %", "0.0033", "231", "11.6 %"]


def test_the_story_follows_the_record():
    """Another record, other words: nothing is written down beforehand."""
    forms = (dataclasses.replace(FORMS[3], weight_bytes=201 * MIB, label="ours"),)
    told = make_report(Records(quality_record(forms), latency_record([does_not_fit(FLOOR)])), COMMAND).story
    assert told[0].startswith("ours takes 50 % of the memory of bfloat16 (201 MiB of 402 MiB).")
    assert told[1:] == ("bfloat16 does not fit this machine: needs 28.9 GiB, there are 12.0 GiB.",)


@pytest.mark.parametrize("kept", range(1, 8))
def test_any_of_the_records_make_a_report_that_speaks_of_no_other(few, kept):
    some = Records(*(r if kept >> i & 1 else None for i, r in enumerate(records_of(few))))
    report = make_report(some, COMMAND)
    page, markdown = to_html(report), to_markdown(report)
    words = ("KL divergence", "tokens per second", "HumanEval problems")
    for index, (file, word) in enumerate(
        zip(("quality.json", "latency.json", "humaneval.json"), words, strict=True)
    ):
        for text in (page, markdown):
            assert (file in text) == bool(kept >> index & 1)
            assert (word in text) == bool(kept >> index & 1)


def records_of(records: Records):
    return records.quality, records.latency, records.humaneval


def test_records_of_different_models_are_not_told_as_one():
    other = Records(quality_record(), latency_record(source_digest="00" * 32))
    report = make_report(other, COMMAND)
    assert report.tiles == ()
    assert report.story == ("These records measure different models. Their figures cannot be compared.",)


def test_every_record_says_where_it_comes_from(records, report):
    for text in (" ".join(Cells(to_html(report)).text), to_markdown(report)):
        for record in records_of(records):
            assert record.origin.command in text
        for fact in (
            "2026-11-23T06:40:00+00:00",
            "AMD EPYC 9R14 96-Core Processor",
            "torch 2.15.0",
            "9f" * 32,
        ):
            assert text.count(fact.replace("_", r"\_")) >= 3
    assert to_markdown(report).index("```sh\nlowmem bench quality") < to_markdown(report).index("## ")


def test_what_does_not_fit_is_said_with_its_reason():
    record = latency_record([does_not_fit(FLOOR), a_subject_latency(FORMS[3])])
    page = to_html(make_report(Records(latency=record), COMMAND))
    row = next(r for r in Cells(page).tables["Decode"] if r[0] == "bfloat16")
    assert row[2] == "does not fit" and row[-1] == "needs 28.9 GiB, there are 12.0 GiB"
    decode = page.partition('aria-labelledby="decode-wide-title')[2].partition("</svg>")[0]
    assert ">does not fit</text>" in decode and ">needs 28.9 GiB, there are 12.0 GiB</text>" in decode


# --- drawings ----------------------------------------------------------------------------------------------


def drawings(report: Report) -> list[ElementTree.Element]:
    plots = [s.plot for s in report.sections if s.plot]
    return [ElementTree.fromstring(svg) for plot in plots for svg in (plot.narrow, plot.wide)]


def test_drawings_have_titles_and_ids_of_their_own(report):
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


def test_drawings_show_each_point_where_it_belongs(report):
    """The markers of the quality plot, read back: less divergence is lower, more bits are to the right."""
    wide = next(d for d in drawings(report) if "quality-wide" in d.attrib["aria-labelledby"])
    assert wide.attrib["viewBox"].split()[2] == str(WIDE)
    uses = list(wide.iter("{http://www.w3.org/2000/svg}use"))
    colors = {f"var(--s{i})" for i in range(1, 9)}
    places = [
        (float(u.attrib["x"]), float(u.attrib["y"]))
        for u in uses
        if any(color in u.attrib["style"] for color in colors)
    ]
    assert len(places) == 2 * len(FORMS), "each in the plot, and then in the legend"
    places = places[: len(FORMS)]
    across = sorted(range(5), key=lambda i: places[i][0])
    assert across == sorted(range(5), key=lambda i: FORMS[i].bits_per_weight)
    down = sorted(range(5), key=lambda i: -places[i][1])
    assert down == sorted(range(5), key=lambda i: KLD[FORMS[i].label])


def test_bars_are_as_long_as_their_figures():
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
    for path in paths[:-1]:  # the last is the legend's
        xs = [float(x) for x in re.findall(r"[ML] (\S+) ", path)]
        lengths.append(max(xs) - min(xs))
    speeds = [1 / s.decode[0].tpot.median for s in record.subjects]
    assert lengths == pytest.approx([lengths[0] * speed / speeds[0] for speed in speeds], rel=0.01)


# --- whatever stands in a record ---------------------------------------------------------------------------


def hostile_records() -> Records:
    form = dataclasses.replace(FORMS[3], label=HOSTILE, method="gptq", dtype=HOSTILE, path=HOSTILE)
    latency = latency_record(
        [dataclasses.replace(does_not_fit(form), reason=HOSTILE), a_subject_latency(FORMS[4])],
        warnings=[HOSTILE],
        source=HOSTILE,
    )
    latency = dataclasses.replace(
        latency, origin=dataclasses.replace(latency.origin, command="lowmem\n````\n" + HOSTILE)
    )
    humaneval = humaneval_record((form,))
    attempts = tuple(
        dataclasses.replace(a, outcome=HOSTILE, detail=HOSTILE, completion=HOSTILE, task=HOSTILE)
        for a in humaneval.subjects[0].attempts
    )
    humaneval = dataclasses.replace(
        humaneval, subjects=(dataclasses.replace(humaneval.subjects[0], attempts=attempts),)
    )
    return Records(
        quality_record((form, FORMS[0]), (HOSTILE, "</style><img src=x onerror=alert(1)>")),
        latency,
        humaneval,
    )


@functools.cache
def hostile_report() -> Report:
    """The report on `hostile_records`, drawn once."""
    return make_report(hostile_records(), HOSTILE)


def test_hostile_texts_stay_texts():
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


def test_hostile_texts_stay_texts_in_markdown():
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
    assert any(clean(HOSTILE) in [_text(cell) for cell in row] for row in named)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=30))
@example("1. a")
@example("- a")
@example("a|b")
@example("http://a.b www.a.b a@b.c")
@example("&lt;")
def test_escaped_text_is_shown_as_it_is(text):
    html = MarkdownIt("commonmark").enable("table").render(f"| a |\n|--|\n| {escaped(text)} |\n")
    (cell,) = re.findall(r"<td>(.*?)</td>", html, flags=re.DOTALL)
    assert _text(cell) == text
    paragraph = MarkdownIt("commonmark").render(escaped(text))
    assert re.fullmatch(r"<p>.*</p>\n", paragraph, flags=re.DOTALL)
    assert _text(paragraph).strip("\n") == text


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


def extreme_records() -> Records:
    """30 forms with long names, one that equals the reference, one that is nowhere near it."""
    forms = many_forms(30, "a very long name indeed, " * 8 + "{}")
    quality = quality_record(forms, texts=("one",))
    zero = dataclasses.replace(quality.subjects[2], texts=(a_text("one", 0.0),))
    huge = dataclasses.replace(quality.subjects[3], texts=(a_text("one", 30.0),))
    quality = dataclasses.replace(
        quality, subjects=(*quality.subjects[:2], zero, huge, *quality.subjects[4:])
    )
    return Records(quality, latency_record([a_subject_latency(form, (64,)) for form in forms[:10]]))


@functools.cache
def extreme_report() -> Report:
    """The report on `extreme_records`, drawn once."""
    return make_report(extreme_records(), COMMAND)


def test_extreme_records_make_pages():
    report = extreme_report()
    rows = Cells(to_html(report)).tables["Quality over all tokens"]
    assert len(rows) == 32
    assert rows[3][3] == "0"
    for drawing in drawings(report):
        texts = [e.text for e in drawing.iter("{http://www.w3.org/2000/svg}text")]
        assert max(text_width(text) for text in texts) <= float(drawing.attrib["viewBox"].split()[2])


def test_one_form_makes_a_page():
    quality = quality_record((), texts=("one",))
    report = make_report(Records(quality), COMMAND)
    assert report.story == () and report.tiles == ()
    assert len(Cells(to_html(report)).tables["Quality over all tokens"]) == 2


def test_the_same_records_give_the_same_bytes(tmp_path):
    """Another process, another hash seed, another matplotlib configuration: the same pages."""
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


# --- the command -------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    report_command.add_arguments(parser)
    return report_command.run(parser.parse_args(words))


def test_the_command_writes_both_pages(tmp_path, capsys):
    write_record(quality_record(), tmp_path)
    assert command(str(tmp_path), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == [str(tmp_path / "report.md"), str(tmp_path / "report.html")]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"lowmem bench report {tmp_path}" in page
    assert sorted(f.name for f in tmp_path.iterdir()) == ["quality.json", "report.html", "report.md"]
    assert page == to_html(make_report(read_records(tmp_path), f"lowmem bench report {tmp_path}"))


def test_quiet_says_nothing_and_out_goes_elsewhere(tmp_path, capsys):
    write_record(humaneval_record(), tmp_path)
    assert command(str(tmp_path), "--quiet", "--out", str(tmp_path / "pages")) == 0
    assert capsys.readouterr() == ("", "")
    assert sorted(f.name for f in (tmp_path / "pages").iterdir()) == ["report.html", "report.md"]


def test_without_records_it_says_what_makes_them(tmp_path):
    commands = r"lowmem bench quality MODEL --out .*lowmem bench latency MODEL --out"
    with pytest.raises(SourceError, match=commands) as told:
        command(str(tmp_path))
    assert "\n" not in str(told.value)


def test_a_damaged_record_is_one_line(tmp_path):
    (tmp_path / "quality.json").write_text(json.dumps(to_json(humaneval_record())))
    with pytest.raises(SourceError, match=r"quality\.json cannot be read"):
        command(str(tmp_path))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    write_record(humaneval_record(), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Check the folder"):
        command(str(tmp_path), "--out", str(tmp_path / "file"))


def test_cleaning_keeps_plain_records(records):
    assert cleaned(records.quality) == records.quality
    assert cleaned(records.latency) == records.latency


def test_a_phone_shows_the_narrow_drawing_in_its_own_size(report):
    for drawing in drawings(report):
        width = int(drawing.attrib["viewBox"].split()[2])
        assert width in (NARROW, WIDE)
        for text in drawing.iter("{http://www.w3.org/2000/svg}text"):
            assert float(re.search(r"font-size: ([\d.]+)px", text.attrib["style"])[1]) >= 12
