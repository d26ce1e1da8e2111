"""Text that users bring: the same content gives the same rows in every layout, and bad files one line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.convert.calibration import CalibrationSpec, load_rows
from lowmem.convert.documents import read_documents
from lowmem.convert.reading import layouts
from lowmem.convert.reading.collect import collect, tolerated
from lowmem.convert.reading.layouts import document_of_row
from lowmem.convert.reading.tables import CONTAINERS, Row

from lowmem.errors import CalibrationError
from lowmem.models.dialogue import Dialogue, Message

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "lowmem" / "data" / "tiny-starchat"
PAIRS = [(f"How do I sort list {i}, é?", f'Use `sorted(x{i})`.\r\n\tIt is "stable" | ✓') for i in range(40)]
ASKED = [(Message("user", question), Message("assistant", answer)) for question, answer in PAIRS]


def jsonl(rows) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def table(columns: list[str], rows, delimiter: str) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([columns, *rows])
    return out.getvalue()


def openai(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sharegpt(question: str, answer: str, names=("human", "gpt")) -> dict[str, object]:
    return {
        "id": "x",
        "conversations": [{"from": names[0], "value": question}, {"from": names[1], "value": answer}],
    }


def parts(question: str, answer: str) -> dict[str, object]:
    content = [{"type": "text", "text": question[:5]}, {"type": "text", "text": question[5:]}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def pair(names: str):
    question, answer = names.split()
    return lambda q, a: {question: q, answer: a}


def tree(number: int, question: str, answer: str) -> dict[str, object]:
    root = {"message_id": f"q{number}", "text": question, "role": "prompter", "lang": "en", "rank": None}
    reply = {"message_id": f"a{number}", "text": answer, "role": "assistant", "lang": "en", "rank": 0}
    return {
        "message_tree_id": f"q{number}",
        "tree_state": "ready_for_export",
        "prompt": {**root, "replies": [{**reply, "replies": []}]},
    }


def flat(number: int, question: str, answer: str) -> list[dict[str, object]]:
    root = {"message_id": f"q{number}", "parent_id": None, "text": question, "role": "prompter"}
    return [
        root,
        {"message_id": f"a{number}", "parent_id": f"q{number}", "text": answer, "role": "assistant"},
    ]


def split(rows: list[dict[str, str]]) -> dict[str, object]:
    return {"columns": [*rows[0]], "index": [*range(len(rows))], "data": [[*row.values()] for row in rows]}


ALPACA = [{"instruction": q, "input": "", "output": a} for q, a in PAIRS]
MESSAGES = [openai(*p) for p in PAIRS]
LAYOUTS: dict[str, tuple[str, str | bytes]] = {
    "OpenAI, lines": ("a.jsonl", jsonl(MESSAGES)),
    "capitals": ("A.JSONL", jsonl(MESSAGES)),
    "ndjson": ("a.ndjson", jsonl(MESSAGES)),
    "lines named .json": ("a.json", jsonl(MESSAGES)),
    "lines named .txt": ("a.txt", jsonl(MESSAGES)),
    "no suffix": ("a", json.dumps(MESSAGES)),
    "Windows": ("a.jsonl", jsonl(MESSAGES).replace("\n", "\r\n")),
    "array": ("a.json", json.dumps(MESSAGES)),
    "indented array": ("a.JSON", json.dumps(MESSAGES, indent=2)),
    "array named .jsonl": ("a.jsonl", json.dumps(MESSAGES, indent=1)),
    "lists of messages": ("a.json", json.dumps([row["messages"] for row in MESSAGES])),
    "parts": ("a.json", json.dumps([parts(*p) for p in PAIRS])),
    "ShareGPT": ("a.json", json.dumps([sharegpt(*p) for p in PAIRS])),
    "ShareGPT of others": ("a.json", json.dumps([sharegpt(*p, ("user", "chatgpt")) for p in PAIRS])),
    "Alpaca": ("a.json", json.dumps(ALPACA)),
    "Dolly": ("a.jsonl", jsonl({"instruction": q, "context": "", "response": a} for q, a in PAIRS)),
    "trees": ("a.jsonl", jsonl(tree(i, *p) for i, p in enumerate(PAIRS))),
    "messages of trees": ("a.jsonl", jsonl(row for i, p in enumerate(PAIRS) for row in flat(i, *p))),
    "in data": ("a.json", json.dumps({"version": 1, "data": ALPACA})),
    "datasets-server": (
        "a.json",
        json.dumps(
            {
                "features": [],
                "rows": [{"row_idx": i, "row": r, "truncated_cells": []} for i, r in enumerate(ALPACA)],
            }
        ),
    ),
    "pandas, columns": (
        "a.json",
        json.dumps({key: {str(i): row[key] for i, row in enumerate(ALPACA)} for key in ALPACA[0]}),
    ),
    "columns": ("a.json", json.dumps({key: [row[key] for row in ALPACA] for key in ALPACA[0]})),
    "pandas, index": ("a.json", json.dumps({str(i): row for i, row in enumerate(ALPACA)})),
    "pandas, split": ("a.json", json.dumps(split(ALPACA))),
    "csv": ("a.csv", table(["instruction", "input", "output"], [(q, "", a) for q, a in PAIRS], ",")),
    "csv of others": ("a.csv", table(["Question ", "Answer"], PAIRS, ";")),
    "tsv": ("a.TSV", table(["prompt", "completion"], PAIRS, "\t")),
    "csv of dialogues": ("a.csv", table(["messages"], [[json.dumps(r["messages"])] for r in MESSAGES], ",")),
    "byte order mark": ("a.json", json.dumps(MESSAGES).encode("utf-8-sig")),
    "UTF-16": ("a.json", json.dumps(MESSAGES, ensure_ascii=False).encode("utf-16")),
    "UTF-16 without mark": ("a.json", json.dumps(MESSAGES).encode("utf-16-be")),
    "UTF-32": ("a.jsonl", jsonl(MESSAGES).encode("utf-32")),
    "gzip": ("a.jsonl.gz", gzip.compress(jsonl(MESSAGES).encode())),
    "bzip2": ("a.json.BZ2", bz2.compress(json.dumps(MESSAGES).encode())),
    "xz": ("a.csv.xz", lzma.compress(table(["user", "assistant"], PAIRS, ",").encode())),
    "mixed": ("a.json", json.dumps([*MESSAGES[:9], *ALPACA[9:20], *(sharegpt(*p) for p in PAIRS[20:])])),
} | {
    names: ("a.json", json.dumps([pair(names)(*p) for p in PAIRS]))
    for names in (
        "prompt response",
        "prompt completion",
        "question answer",
        "query response",
        "problem solution",
        "input output",
        "inputs targets",
        "instruction output",
    )
}


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_as_what_it_is(layout, tmp_path):
    found = read_documents(str(write(tmp_path, *LAYOUTS[layout])))
    assert found.documents == ASKED
    assert "40 dialogues from " in found.label or layout == "mixed"
    assert found.notes and not any("skipped" in note for note in found.notes)


def test_every_layout_gives_the_same_token_rows(tmp_path):
    """The rows are all that the converter sees of the text, and part of the recipe by their digest."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    dialogue = Dialogue.detect(tokenizer)
    digests = set()
    for number, layout in enumerate(
        ("OpenAI, lines", "Alpaca", "ShareGPT", "csv", "messages of trees", "UTF-16")
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write(folder, *LAYOUTS[layout])
        rows = load_rows(CalibrationSpec(str(path), rows=6, row_length=64), tokenizer, dialogue, 4096)
        assert "6 of them dialogues in StarChat's template" in rows.description
        assert (rows.tokens[:, 0] == dialogue.system_id).all()
        digests.add(rows.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "feather", "nested parquet", "zstd", "folder"])
def test_tables_of_pyarrow(kind, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet

    data = pyarrow.Table.from_pylist(MESSAGES if "nested" in kind else ALPACA)
    path = tmp_path / "train-00000.bin"
    if kind == "arrow stream":
        path = tmp_path / "data.arrow"
        with ipc.new_stream(path, data.schema) as out:
            out.write_table(data)
    elif kind == "feather":
        path = tmp_path / "data.feather"
        feather.write_feather(data, path)
    elif kind == "zstd":
        path = tmp_path / "a.jsonl.zst"
        with pyarrow.output_stream(path, compression="zstd") as out:
            out.write(jsonl(MESSAGES).encode())
    elif kind == "folder":
        (tmp_path / "data").mkdir()
        parquet.write_table(data.slice(0, 25), tmp_path / "data" / "train-00000-of-00002.parquet")
        parquet.write_table(data.slice(25), tmp_path / "data" / "train-00001-of-00002.parquet")
        parquet.write_table(data.slice(5), tmp_path / "data" / "test-00000-of-00001.parquet")
        write(tmp_path, "README.md", "# A data set\n")
        path = tmp_path
    else:
        parquet.write_table(data, path)
    assert read_documents(str(path)).documents == ASKED


def test_of_a_large_table_the_first_rows_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"Content": [f"text {i}" for i in range(21_000)], "id": [0] * 21_000}), path
    )
    found = read_documents(str(path))
    assert len(found.documents) == 20_000 and found.documents[-1] == "text 19999"
    assert any("the first 20,000 of 21,000 rows are read" in note for note in found.notes)


def test_without_pyarrow_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, raw in (("a.parquet", b"PAR1" + b"x" * 20), ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"x" * 20)):
        with pytest.raises(CalibrationError, match="needs the package pyarrow") as caught:
            read_documents(str(write(tmp_path, name, raw)))
        assert "pip install 'lowmem[datasets]'" in caught.value.hint


# --- texts ------------------------------------------------------------------------------------------------

CODE = [f"def f{i}(x):\n    return x + {i}\n" for i in range(8)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", jsonl({"text": text, "meta": {}} for text in CODE)),
        ("a.json", json.dumps([{"content": text, "path": "a.py"} for text in CODE])),
        ("a.json", json.dumps({"code": CODE})),
        ("a.json", json.dumps(CODE)),
        ("a.jsonl", jsonl(CODE)),
        ("a.csv", table(["id", "text"], enumerate(CODE), ",")),
    ],
)
def test_texts(name, data, tmp_path):
    found = read_documents(str(write(tmp_path, name, data)))
    assert found.documents == CODE and "8 texts from" in found.label


def test_a_folder_of_source_files(tmp_path):
    for number, text in enumerate(CODE):
        (tmp_path / f"pkg{number % 2}").mkdir(exist_ok=True)
        write(tmp_path, f"pkg{number % 2}/m{number}.py", text.replace("\n", "\r\n") if number == 3 else text)
    (tmp_path / ".git").mkdir()
    for name in ("package.json", "data.parquet", "picture.png", "notes.md", ".git/config.py", "rows.jsonl"):
        write(tmp_path, name, "# Notes\n" if name == "notes.md" else "{}")
    (tmp_path / "link.py").symlink_to("/etc/passwd")
    found = read_documents(str(tmp_path))
    assert found.documents == ["# Notes\n", *CODE[::2], *CODE[1::2]]
    assert "4 other files left out" in found.label


def test_line_ends_of_windows_are_those_of_unix(tmp_path):
    assert read_documents(str(write(tmp_path, "a.txt", "a\r\nb\n"))).documents == ["a\nb\n"]


def test_code_that_looks_like_json_is_code(tmp_path):
    text = '[{"a": 1}]\n'
    assert read_documents(str(write(tmp_path, "a.py", text))).documents == [text]
    markdown = "[link](x) and {braces}\n"
    assert read_documents(str(write(tmp_path, "a.md", markdown))).documents == [markdown]


# --- dialogues of agents, and other messages --------------------------------------------------------------

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def test_tool_turns_are_written_out_as_the_server_does():
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "name": "add", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ]
    }
    document, field = document_of_row(row)
    assert field == "`messages`"
    assert document == (
        Message("system", "Be brief."),
        Message("user", "1 + 1?"),
        Message("assistant", 'Call add with {"a": 1}'),
        Message("user", "Result of add:\n2"),
        Message("assistant", "Two."),
    )


@pytest.mark.parametrize(
    ("row", "system"),
    [
        ({"system": "S", "instruction": "q", "output": "a"}, "S"),
        ({"system_prompt": "S", "question": "q", "response": "a"}, "S"),
        ({"system": "S", **sharegpt("q", "a")}, "S"),
        ({"system": "", **openai("q", "a")}, None),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            None,
        ),
        ({"prompt": "q", "chosen": openai("q", "a")["messages"], "rejected": []}, None),
        (openai("q", "a")["messages"], None),
        ({"conversations": json.dumps(sharegpt("q", "a")["conversations"])}, None),
    ],
)
def test_other_forms_of_a_dialogue(row, system):
    turns = (Message("user", "q"), Message("assistant", "a"))
    assert document_of_row(row)[0] == ((Message("system", system), *turns) if system else turns)


def test_earlier_turns_of_a_row():
    row = {"instruction": "q2", "input": "", "output": "a2", "history": [["q1", "a1"]]}
    assert [turn.content for turn in document_of_row(row)[0]] == ["q1", "a1", "q2", "a2"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"role": "user", "content": "one message of a row"}, "one message, not a dialogue"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "'image_url'",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "content of message 1 is not text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "no name"),
        ({"conversations": "[{'from': 'human'"}, "not a list of messages"),
        ({"question": "q", "context": {"a": 1}, "answer": "a"}, "`context` is not text"),
        ({"instruction": "q", "output": "a", "history": "x"}, "`history`"),
        (["a", "list", "of words"], "a list, but not of messages"),
    ],
)
def test_rows_that_are_refused(row, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        document_of_row(row)


# --- bad rows and bad files -------------------------------------------------------------------------------


def test_one_bad_row_among_thousands_is_skipped_and_said(tmp_path):
    lines = jsonl({"text": f"text {i}"} for i in range(3000)).splitlines()
    lines[1234] = '{"text": "cut o'
    lines[2000] = '{"text": "\udcff"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    found = read_documents(str(path))
    assert len(found.documents) == 2998
    assert "2 of 3,000 rows skipped" in found.label
    assert any("line 1235: not JSON (Unterminated string" in note for note in found.notes)


def test_too_many_bad_rows_are_refused_by_the_first(tmp_path):
    lines = jsonl({"text": f"text {i}"} for i in range(1000)).splitlines()
    lines[500:511] = ["{"] * 11
    with pytest.raises(CalibrationError, match=r"a.jsonl, line 501: not JSON .*\(11 of 1,000 rows"):
        read_documents(str(write(tmp_path, "a.jsonl", "\n".join(lines))))


def test_a_csv_row_of_another_width_is_skipped(tmp_path):
    rows = [["id", "text"], *([str(i), f"text {i}"] for i in range(50)), ["7", "a", "b"]]
    path = write(tmp_path, "a.csv", "\n".join(map(",".join, rows)))
    assert "1 of 51 rows skipped" in read_documents(str(path)).label


@given(good=st.integers(0, 400), bad=st.integers(0, 12))
def test_the_count_of_bad_rows_is_right(good, bad):
    rows = [*(Row("g", {"text": "t"}) for _ in range(good)), *(Row(f"b{i}", 3) for i in range(bad))]
    if bad > tolerated(good + bad):
        with pytest.raises(CalibrationError, match="b0"):
            collect(rows, "x")
    else:
        found = collect(rows, "x")
        assert (len(found.documents), found.rows, found.skipped) == (good, good + bad, bad)


def test_what_is_tolerated():
    assert [tolerated(n) for n in (0, 9, 10, 30, 300, 400, 100_000)] == [0, 0, 1, 3, 3, 4, 1000]


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.pkl", pickle.dumps(Trap()), "Python pickle"),
        ("a.txt", pickle.dumps([Trap()]), "Python pickle"),
        ("a.jsonl", pickle.dumps(["x"], protocol=0), "Python pickle"),
        ("a.pt", b"PK\3\4" + bytes(30), "a PyTorch file"),
        ("a.xlsx", b"PK\3\4" + bytes(30), "a zip archive or a document"),
        ("a.pdf", b"%PDF-1.7\n", "a PDF"),
        ("a.gguf", b"GGUF\3\0\0\0", "a GGUF file"),
        ("a.txt", b"text\0\1\2 and bytes", "a binary file"),
        ("a.txt", b"text" * 2000 + b"\0", "a binary file"),
        ("a.txt", "déjà vu\n".encode("latin-1"), r"not UTF-8 text \(line 1\)"),
        ("a.jsonl", "\n".join(['{"text": "é"}'] * 5).encode("latin-1"), "line 1: not valid UTF-8 text"),
        ("a.json", b"", "holds no text"),
        ("a.json", b"[]", "holds no text"),
        ("a.json", b'[{"text": "a"}, {"text": ', "line 1 is not JSON"),
        ("a.json", b'{"name": "x", "scripts": {}}', "an object with name, scripts"),
        ("a.json", b"3", "a number"),
        ("a.json", b"Some prose.", "is not JSON"),
        ("a.csv", b"a,b\n1,2\n", "columns a, b in its first line"),
        ("a.csv", b'text\n"never ends\n', "is not CSV"),
        ("a.csv", b"", "holds no text"),
        ("a.jsonl.gz", b"\x1f\x8b\x08damaged", "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:40], "cannot be unpacked"),
        ("a.parquet", b"no table", "is not a Parquet file"),
        ("a.parquet", b"PAR1 damaged PAR1", "cannot be read"),
    ],
)
def test_files_that_are_refused(name, raw, words, tmp_path):
    with pytest.raises(CalibrationError, match=words) as caught:
        read_documents(str(write(tmp_path, name, raw)))
    assert caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["no/such.json", "no/such.CSV", "data/code.py", "./x", "~nobody/x", "x" * 5000]
)
def test_a_missing_file_is_not_looked_for_on_the_hub(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"does not exist|neither a file"):
        read_documents(source)


def test_a_file_that_never_ends_is_refused():
    with pytest.raises(CalibrationError, match="larger than 256 MiB"):
        read_documents("/dev/zero")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    *sorted(layouts.FIELDS),
                    *CONTAINERS,
                    "role",
                    "from",
                    "value",
                    "row",
                    "row_idx",
                    "columns",
                    "tool_calls",
                    "function_call",
                    "message_id",
                    "parent_id",
                    "replies",
                    "type",
                    "rank",
                ]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@settings(max_examples=300)
@given(value=json_values, name=st.sampled_from(["a.json", "a.jsonl", "a.txt", "a"]), lines=st.booleans())
def test_any_json_is_read_or_refused(value, name, lines, tmp_path_factory):
    text = jsonl(value) if lines and isinstance(value, list) else json.dumps(value)
    path = write(tmp_path_factory.getbasetemp(), "any-" + name, text)
    try:
        found = read_documents(str(path))
    except CalibrationError as error:
        assert error.hint
        return
    for document in found.documents:
        assert (
            document.strip() if isinstance(document, str) else all(isinstance(m, Message) for m in document)
        )


@settings(max_examples=300)
@given(
    raw=st.binary(max_size=60),
    name=st.sampled_from(["a.json", "a.jsonl", "a.csv", "a.txt", "a.gz", "a.arrow"]),
    head=st.sampled_from(
        [b"", b"\xff\xfe", b"text,content\n", b'{"text": ', b"\x1f\x8b", b"\xff\xff\xff\xff"]
    ),
)
def test_any_bytes_are_read_or_refused(raw, name, head, tmp_path_factory):
    path = write(tmp_path_factory.getbasetemp(), "any-" + name, head + raw)
    try:
        assert read_documents(str(path)).documents
    except CalibrationError as error:
        assert error.hint


def test_the_documents_name_every_field_and_role():
    page = (ROOT / "docs" / "convert.md").read_text("utf-8")
    named = set(re.findall(r"`([a-z_]+)`", page))
    assert layouts.FIELDS | set(layouts.ROLES) <= named, (layouts.FIELDS | set(layouts.ROLES)) - named
