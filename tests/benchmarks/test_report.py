"""`lowmem bench report`: the pages show the figures of the records, and the command works."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re

import pytest
from lowmem.benchmarks.common.record_file import to_json, write_record
from lowmem.benchmarks.report import command as report_command
from lowmem.benchmarks.report.build import make_report
from lowmem.benchmarks.report.inputs import Records, cleaned, read_records
from lowmem.benchmarks.report.markdown import to_markdown
from lowmem.benchmarks.report.numbers import percent, significant, size, with_error
from lowmem.benchmarks.report.page import to_html
from lowmem.benchmarks.report.quality_sections import merged_buckets, pooled
from markdown_it import MarkdownIt

from lowmem.errors import OutputError, SourceError
from tests.benchmarks.bench_records import (
    FLOOR,
    FORMS,
    MIB,
    a_subject_latency,
    a_text,
    does_not_fit,
    humaneval_record,
    latency_record,
    quality_record,
)
from tests.benchmarks.report_helpers import COMMAND, Cells, rows_of, text_of

# --- tables show the figures of the record -----------------------------------------------------------------


def test_the_quality_table_shows_the_record(records, report):
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
    assert rows["4-bit g128"]["× noise floor"] == "25 ×"  # 0.0025 / 0.000102 on every text
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


def test_pooled_perplexity_covers_all_tokens():
    """The ratio of exp(mean nll) over all texts, computed from the perplexity of each text."""
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


def test_the_decode_table_shows_the_record(records, report):
    _, *rows = Cells(to_html(report)).tables["Decode"]
    found = {(row[0], row[1]): row for row in rows}
    for s in records.latency.subjects:
        for d in s.decode:
            row = found[s.subject.label, f"{d.context_tokens:,}"]
            low, high = significant(1 / d.tpot.high), significant(1 / d.tpot.low)
            assert row[2] == f"{significant(1 / d.tpot.median)} ({low}–{high})"
            assert row[3:5] == [significant(d.ceiling_tokens_per_second), percent(d.share)]


def test_latency_and_prefill_tables_show_the_record(records, report):
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
    plain = [[text_of(c) for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in in_markdown]
    missing = [row for row in cells if row not in plain]
    assert not missing


# --- summary -----------------------------------------------------------------------------------------------


def test_the_summary_shows_the_record(report):
    assert report.tiles_of == "4-bit g128, at 4.16 bits per weight"
    assert report.story[0].startswith("4-bit g128 takes 26 % of the memory of bfloat16 (105 MiB of 402 MiB).")
    assert "25 × the noise floor" in report.story[0]
    assert "decodes 231 tokens per second, 71 % of what this machine allows" in report.story[1]
    assert report.story[2] == "bfloat16 decodes 60.4 tokens per second, so 4-bit g128 is 3.8 times as fast."
    assert [tile.figure for tile in report.tiles] == ["26 %", "0.0033", "231", "11.6 %"]


def test_the_summary_follows_the_record():
    """The summary is derived from the record; no text is fixed in advance."""
    forms = (dataclasses.replace(FORMS[3], weight_bytes=201 * MIB, label="ours"),)
    story = make_report(Records(quality_record(forms), latency_record([does_not_fit(FLOOR)])), COMMAND).story
    assert story[0].startswith("ours takes 50 % of the memory of bfloat16 (201 MiB of 402 MiB).")
    assert story[1:] == ("bfloat16 does not fit this machine: needs 28.9 GiB, there are 12.0 GiB.",)


@pytest.mark.parametrize("kept", range(1, 8))
def test_a_report_on_some_records_mentions_no_others(few, kept):
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


def test_records_of_different_models_have_no_common_summary():
    other = Records(quality_record(), latency_record(source_digest="00" * 32))
    report = make_report(other, COMMAND)
    assert report.tiles == ()
    assert report.story == ("These records measure different models. Their figures cannot be compared.",)


def test_every_record_shows_its_origin(records, report):
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


def test_versions_that_do_not_fit_show_the_reason():
    record = latency_record([does_not_fit(FLOOR), a_subject_latency(FORMS[3])])
    page = to_html(make_report(Records(latency=record), COMMAND))
    row = next(r for r in Cells(page).tables["Decode"] if r[0] == "bfloat16")
    assert row[2] == "does not fit" and row[-1] == "needs 28.9 GiB, there are 12.0 GiB"
    decode = page.partition('aria-labelledby="decode-wide-title')[2].partition("</svg>")[0]
    assert ">does not fit</text>" in decode and ">needs 28.9 GiB, there are 12.0 GiB</text>" in decode


# --- the command -------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    report_command.add_arguments(parser)
    return report_command.run(parser.parse_args(words))


def test_the_command_writes_both_pages(tmp_path, capsys):
    write_record(quality_record(), tmp_path)
    assert command(str(tmp_path), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == [str(tmp_path / "report.md"), str(tmp_path / "report.html")]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"lowmem bench report {tmp_path}" in page
    assert sorted(f.name for f in tmp_path.iterdir()) == ["quality.json", "report.html", "report.md"]
    assert page == to_html(make_report(read_records(tmp_path), f"lowmem bench report {tmp_path}"))


def test_quiet_and_out(tmp_path, capsys):
    write_record(humaneval_record(), tmp_path)
    assert command(str(tmp_path), "--quiet", "--out", str(tmp_path / "pages")) == 0
    assert capsys.readouterr() == ("", "")
    assert sorted(f.name for f in (tmp_path / "pages").iterdir()) == ["report.html", "report.md"]


def test_without_records_the_error_names_the_commands(tmp_path):
    commands = r"lowmem bench quality MODEL --out .*lowmem bench latency MODEL --out"
    with pytest.raises(SourceError, match=commands) as caught:
        command(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_damaged_record_gives_one_line(tmp_path):
    (tmp_path / "quality.json").write_text(json.dumps(to_json(humaneval_record())))
    with pytest.raises(SourceError, match=r"quality\.json cannot be read"):
        command(str(tmp_path))


def test_an_unwritable_folder_gives_one_line(tmp_path):
    write_record(humaneval_record(), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Check the folder"):
        command(str(tmp_path), "--out", str(tmp_path / "file"))


def test_cleaning_leaves_plain_records_unchanged(records):
    assert cleaned(records.quality) == records.quality
    assert cleaned(records.latency) == records.latency
