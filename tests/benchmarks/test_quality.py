"""`lowmem bench quality` against computations on whole logits; its record, resuming and errors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowmem.benchmarks.common.output import Output
from lowmem.benchmarks.common.progress import Progress
from lowmem.benchmarks.common.record_file import read_record
from lowmem.benchmarks.common.records import QualityRecord
from lowmem.benchmarks.quality import command as quality_command
from lowmem.benchmarks.quality.agreement import equal_tokens, greedy_answers
from lowmem.benchmarks.quality.measure import Settings, measure
from lowmem.benchmarks.quality.texts import read_texts

from lowmem.checkpoint.manifest import write_manifest
from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.verify.converted import verify
from lowmem.errors import InvalidRequestError, SourceError
from lowmem.loading.loader import LoadOptions, load
from lowmem.plan.candidates import find_candidates
from lowmem.streaming.forward import StreamedModel
from tests.helpers import save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

SETTINGS = Settings(texts=("code", "dialogues"), rows=3, row_length=40, greedy=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A bfloat16 source, and 4-bit and 2-bit folders of it with reports and manifests."""
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    model = tiny_model("gpt_bigcode_mqa", hidden=128).to(torch.bfloat16)
    save_source(model, tmp_path / "m" / "model")
    for bits in (4, 2):
        made = tmp_path / "m" / f"model-{bits}bit"
        write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa", hidden=128).to(torch.bfloat16), made, bits=bits)
        (made / "lowmem-report.json").write_text(json.dumps({"base_model": "model"}))
        write_manifest(made)
    return tmp_path / "m"


class Heard(Progress):
    """A Progress that records its notes and titles."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.begun: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)

    def begin(self, title: str) -> None:
        self.begun.append(title)


def run(
    folder: Path,
    *models: str,
    settings: Settings = SETTINGS,
    versions: tuple[str, ...] = (),
    heard: Progress | None = None,
    fresh: bool = False,
) -> QualityRecord:
    from lowmem.benchmarks.common.lineup import LineupRequest, line_up

    lineup = line_up(LineupRequest(tuple(str(folder / name) for name in models), versions=versions))
    output = Output(folder / "out", fresh=fresh)
    return measure(lineup, settings, output, ["bench", "quality"], heard or Progress())


def log_probabilities(model: Any, rows: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits.double().numpy()
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def by_label(record: QualityRecord) -> dict[str, dict[str, Any]]:
    return {s.subject.label: {text.text: text for text in s.texts} for s in record.subjects}


def test_every_version_against_whole_logits(folder):
    """The noise floor, bitsandbytes and GPTQ: KL divergence, perplexity and the rest from plain numpy."""
    from transformers import AutoModelForCausalLM

    record = run(folder, "model")
    assert [s.noise_floor for s in record.subjects] == [True, False, False, False, False]
    found = by_label(record)
    assert set(found) == {"bfloat16", "int8", "4-bit g32", "NF4", "2-bit g32"}
    source = folder / "model"

    def transformers_model(dtype):
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)

    models = {
        "bfloat16": transformers_model(torch.bfloat16),
        "int8": load(source, LoadOptions(dtype=torch.float32, on_the_fly="int8")).model,
        "NF4": load(source, LoadOptions(dtype=torch.float32, on_the_fly="nf4")).model,
        "4-bit g32": load(folder / "model-4bit", LoadOptions(dtype=torch.float32)).model,
        "2-bit g32": load(folder / "model-2bit", LoadOptions(dtype=torch.float32)).model,
    }
    tokenizer = open_source(source).tokenizer()
    texts = read_texts(SETTINGS.texts, (), tokenizer, 4096, rows=3, row_length=40)
    reference = transformers_model(torch.float32)
    for text in texts:
        p = log_probabilities(reference, text.rows)
        rows, places = np.indices((3, 39))
        right = text.rows[:, 1:].numpy()
        for label, model in models.items():
            q, quality = log_probabilities(model, text.rows), found[label][text.name]
            kld = (np.exp(p) * (p - q)).sum(-1)
            loss = -q[rows, places, right]
            # The divergence is only bfloat16 rounding, which varies with the order of additions.
            tolerance = {"rel": 0.05} if label == "bfloat16" else {"rel": 1e-3, "abs": 1e-8}
            assert quality.kld.mean == pytest.approx(kld.mean(), **tolerance), label
            assert quality.ppl == pytest.approx(np.exp(loss.mean()), rel=1e-3)
            assert quality.reference_ppl == pytest.approx(np.exp(-p[rows, places, right].mean()), rel=1e-5)
            same = (p.argmax(-1) == q.argmax(-1)).mean()
            assert quality.same_top1 == pytest.approx(same, abs=0.02 if label == "bfloat16" else 1e-9)
    assert found["bfloat16"]["code"].kld.mean < found["4-bit g32"]["code"].kld.mean / 20


def test_the_unquantized_model_in_the_references_arithmetic_is_the_reference(folder):
    save_source(tiny_model("llama"), folder / "exact")
    record = run(folder, "exact", versions=("float32",))
    quality = by_label(record)["float32"]["code"]
    assert quality.kld.max < 1e-9 and quality.same_top1 == 1 and quality.ppl_ratio == pytest.approx(1)
    assert [s.subject.label for s in record.subjects if s.noise_floor] == ["bfloat16"]


def test_the_reference_may_be_bfloat16(folder):
    record = run(folder, "model", settings=Settings(**{**vars(SETTINGS), "reference_dtype": "bfloat16"}))
    assert by_label(record)["bfloat16"]["code"].kld.mean == 0 and record.reference_dtype == "bfloat16"


def test_the_kernels_of_lowmem_run_are_measured(folder):
    """The model is loaded as by `lowmem run`, with its kernels and dtype."""
    settings = Settings(**{**vars(SETTINGS), "kernels": True, "dtype": "float32"})
    loaded = by_label(run(folder, "model", settings=settings))
    streamed = by_label(run(folder, "model"))
    for label in ("int8", "NF4", "4-bit g32"):
        assert loaded[label]["code"].kld.mean == pytest.approx(streamed[label]["code"].kld.mean, rel=1e-3)
    as_run = run(folder, "model-4bit", settings=Settings(**{**vars(settings), "dtype": None}))
    assert {s.subject.dtype for s in as_run.subjects} == {"bfloat16"}


def test_the_divergence_is_stored_in_the_manifest_and_the_folder_verifies(folder):
    """It is one write. It once changed the report and then its digest in the manifest, so a kill between the
    two left a folder that `lowmem verify` reports as damaged."""
    record = run(folder, "model")
    for bits in (4, 2):
        made = folder / f"model-{bits}bit"
        assert json.loads((made / "lowmem-report.json").read_text()) == {"base_model": "model"}
        measured = json.loads((made / "lowmem-manifest.json").read_text())["measured"]
        assert measured["kld"] == by_label(record)[f"{bits}-bit g32"]["code"].kld.mean
        assert "code, 3 rows of 40 tokens" in measured["kld_of"]
        verify(made).check()
    found = {c.label: c.kld for c in find_candidates(str(folder / "model"), cuda=False)}
    assert found["4-bit g32"] == by_label(record)["4-bit g32"]["code"].kld.mean
    before = (folder / "model-4bit" / "lowmem-manifest.json").stat().st_mtime_ns
    run(folder, "model")
    assert (folder / "model-4bit" / "lowmem-manifest.json").stat().st_mtime_ns == before


def test_folders_are_not_changed_on_request_or_if_damaged(folder):
    run(folder, "model", settings=Settings(**{**vars(SETTINGS), "record": False}))
    assert "measured" not in json.loads((folder / "model-4bit" / "lowmem-manifest.json").read_text())
    (folder / "model-4bit" / "lowmem-report.json").write_text('{"base_model": "model", "changed": 1}')
    heard = Heard()
    run(folder, "model", heard=heard)
    assert "measured" not in json.loads((folder / "model-4bit" / "lowmem-manifest.json").read_text())
    assert any("lowmem verify" in line for line in heard.notes)


def test_an_interrupted_measurement_resumes(folder):
    class Interrupted(Heard):
        def begin(self, title: str) -> None:
            super().begin(title)
            if title == "4-bit g32":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, "model", heard=Interrupted())
    there = read_record(QualityRecord, folder / "out")
    assert there is not None and [s.subject.label for s in there.subjects] == ["bfloat16", "int8"]
    heard = Heard()
    record = run(folder, "model", heard=heard)
    assert [b for b in heard.begun if "reference" not in b] == ["4-bit g32", "NF4", "2-bit g32"]
    assert record.subjects[1] == there.subjects[1] and len(record.subjects) == 5
    assert read_record(QualityRecord, folder / "out") == record
    # A new version alone is added to the record. With other tokens or --fresh, everything is measured again.
    heard = Heard()
    assert len(run(folder, "model", versions=("int8",), heard=heard).subjects) == 5 and len(heard.begun) == 1
    heard = Heard()
    run(folder, "model", versions=("int8",), heard=heard, settings=Settings(**{**vars(SETTINGS), "rows": 2}))
    assert heard.begun[1:] == ["bfloat16", "int8"]
    heard = Heard()
    run(folder, "model", versions=("int8",), heard=heard, fresh=True)
    assert heard.begun[1:] == ["bfloat16", "int8"]


def test_a_reconverted_folder_is_measured_again(folder):
    run(folder, "model")
    made = folder / "model-4bit"
    for file in made.iterdir():
        file.unlink()
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa", hidden=128, seed=7).to(torch.bfloat16), made, bits=4)
    (made / "lowmem-report.json").write_text(json.dumps({"base_model": "model"}))
    heard = Heard()
    record = run(folder, "model", heard=heard)
    assert heard.begun[1:] == ["4-bit g32"]
    assert by_label(record)["4-bit g32"]["code"].kld.mean > 1


def test_equal_tokens_of_greedy_answers(folder):
    """Compare with greedy answers that the reference generates here."""
    source = StreamedModel(open_source(folder / "model"), torch.float32)
    reference = load(folder / "model", LoadOptions(dtype=torch.float32))
    prompts = [[5, 6, 7], [100, 200], [9, 8, 7, 6, 5, 4]]
    own = greedy_answers(reference, prompts, 12)
    assert equal_tokens(source, prompts, own, folder / "w") == tuple(map(len, own))
    other = greedy_answers(load(folder / "model-4bit", LoadOptions(dtype=torch.float32)), prompts, 12)
    expected = []
    for ours, theirs in zip(own, other, strict=True):
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        expected.append(same.index(False) if False in same else len(theirs))
    assert any(count < 12 for count in expected)
    assert equal_tokens(source, prompts, other, folder / "w") == tuple(expected)
    assert not (folder / "w").exists()


def test_greedy_answers_or_the_reason_are_in_the_record(folder, monkeypatch):
    settings = Settings(**{**vars(SETTINGS), "greedy": True, "texts": ("code",)})
    record = run(folder, "model", settings=settings, versions=("4-bit",))
    for subject in record.subjects:
        assert subject.greedy is not None and len(subject.greedy.equal_tokens) == 8
        assert max(subject.greedy.answer_tokens) <= subject.greedy.limit == 64
    monkeypatch.setattr("lowmem.plan.device.host_memory_available", lambda: 0)
    monkeypatch.setattr("lowmem.plan.device.host_memory_private", lambda: 1 << 20)
    heard = Heard()
    record = run(folder, "model", settings=settings, versions=("4-bit",), heard=heard, fresh=True)
    assert all(subject.greedy is None for subject in record.subjects)
    assert any("does not fit" in line for line in heard.notes)


def command(capsys, *words: str) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    quality_command.add_arguments(parser)
    code = quality_command.run(parser.parse_args(list(words)))
    out, err = capsys.readouterr()
    return code, out, err


SMALL = ("--texts", "code", "--rows", "2", "--row-length", "32", "--no-greedy")


def test_the_command_prints_a_table_or_the_record(folder, capsys):
    words = [str(folder / "model"), "--versions", "4-bit,nf4", *SMALL, "--out", str(folder / "here")]
    code, out, err = command(capsys, *words)
    assert code == 0 and "4-bit g32" in out and "NF4" in out and "the noise floor" in out
    assert "measuring 4-bit g32" in err
    code, out, err = command(capsys, *words, "--json", "--quiet")
    assert json.loads(out) == json.loads((folder / "here" / "quality.json").read_text()) and not err
    assert json.loads(out)["origin"]["source_digest"]


def test_no_cache_leaves_nothing_behind(folder, capsys, tmp_path):
    words = ["--versions", "nf4", *SMALL, "--no-cache", "--out", str(folder / "here")]
    command(capsys, str(folder / "model"), *words)
    assert not (tmp_path / "cache").exists()


def test_usage_errors(folder, capsys, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    save_source(tiny_model("llama", layers=3), tmp_path / "other")
    model, out = str(folder / "model"), ["--out", str(tmp_path / "out")]
    for words, kind, says in (
        ([str(tmp_path / "none")], SourceError, "does not exist"),
        ([model, "--text", str(empty), "--row-length", "40"], InvalidRequestError, "empty"),
        ([model, "--texts", "poems", "--row-length", "40"], InvalidRequestError, "no built-in text"),
        ([model, "--row-length", "9999999"], InvalidRequestError, "positions"),
        (
            [str(folder / "model-4bit"), "--reference", str(tmp_path / "other")],
            SourceError,
            "was not converted from",
        ),
    ):
        with pytest.raises(kind, match=says):
            command(capsys, *words, *out)
    assert not (tmp_path / "out").exists()
