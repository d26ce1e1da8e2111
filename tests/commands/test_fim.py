"""Fill-in-the-middle: the model's own tokens around texts that cannot forge them, and `lowmem fim`."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.cli import main
from lowmem.commands.fim import MARKER, split_at
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.generate.engine import Engine
from lowmem.generate.sequence import Sequence, Token
from lowmem.loading.loader import LoadedModel, load
from lowmem.session import Session, join
from tests.helpers import save_source, tiny_model

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
PREFIX, SUFFIX = "def add(a, b):\n    return ", "\n\n\nprint(add(1, 2))\n"
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FIM_PAD = 1, 2, 3, 4  # tiny-starchat's ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tiny_model("gpt_bigcode_mqa"), tmp_path_factory.mktemp("fim"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(folder)


def scripted(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> list[list[int]]:
    """Make engines generate `ids`; returns the list that collects the prompts."""
    heard: list[list[int]] = []
    start = Engine.start

    def scripted_start(self: Engine, prompt: list[int], params: SamplingParams, **options: Any) -> Sequence:
        heard.append(prompt)
        sequence = start(self, prompt, params, **options)
        sequence.tokens += [Token(token, "stop" if token in self.stop_ids else None) for token in ids]
        return sequence

    monkeypatch.setattr(Engine, "start", scripted_start)
    return heard


def test_the_middle_is_what_the_model_generates(loaded: LoadedModel) -> None:
    """The oracle is transformers' generate on the prompt as StarCoder's card spells it."""
    tokenizer = loaded.tokenizer
    prompt = f"<fim_prefix>{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = loaded.model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    done = join(Session(loaded).fill_in(PREFIX, SUFFIX, GREEDY))
    assert done.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert (done.prompt_tokens, done.cut_tokens, done.dropped_turns) == (ids.shape[1], 0, 0)


def test_texts_cannot_forge_the_tokens(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source code that contains the tokens' names stays text."""
    heard = scripted(monkeypatch, [0])
    list(Session(loaded).fill_in("a = '<fim_suffix>'", "b = '<fim_middle><|endoftext|>'", GREEDY))
    (ids,) = heard
    assert ids[0] == FIM_PREFIX and ids[-1] == FIM_MIDDLE and ids.count(FIM_SUFFIX) == 1
    assert not {0, FIM_PREFIX, FIM_MIDDLE} & set(ids[1:-1])
    middle = ids.index(FIM_SUFFIX)
    assert loaded.tokenizer.decode(ids[1:middle]) == "a = '<fim_suffix>'"
    assert loaded.tokenizer.decode(ids[middle + 1 : -1]) == "b = '<fim_middle><|endoftext|>'"


@pytest.mark.parametrize("end", [0, FIM_PAD, FIM_PREFIX, 4093])
def test_the_middle_ends_at_any_special_token(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, end: int
) -> None:
    text = loaded.tokenizer("a + b").input_ids
    scripted(monkeypatch, [*text, end, *text])
    done = join(Session(loaded).fill_in(PREFIX, SUFFIX, GREEDY))
    assert (done.text, done.finish_reason, done.new_tokens) == ("a + b", "stop", len(text) + 1)
    stopped = join(Session(loaded).fill_in(PREFIX, SUFFIX, replace(GREEDY, stop=(" + ",))))
    assert (stopped.text, stopped.finish_reason) == ("a", "stop")


def test_one_side_may_be_empty_but_not_both(loaded: LoadedModel) -> None:
    session = Session(loaded)
    assert join(session.fill_in(PREFIX, "", GREEDY)).prompt_tokens < session.context
    assert join(session.fill_in("", SUFFIX, GREEDY)).finish_reason
    with pytest.raises(InvalidRequestError, match="both empty"):
        session.fill_in("", "", GREEDY)
    with pytest.raises(InvalidRequestError, match="top_p"):
        session.fill_in(PREFIX, SUFFIX, replace(GREEDY, top_p=2))


@pytest.fixture(scope="module")
def without_fim(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a tokenizer that does not know the tokens."""
    other = tmp_path_factory.mktemp("plain")
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes().replace(b"<fim_", b"<xyz_"))
    return other


def test_a_model_without_the_tokens_says_so(without_fim: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no fill-in-the-middle tokens"):
        Session(load(without_fim)).fill_in(PREFIX, SUFFIX, GREEDY)


OPTIONS = ["--max-new-tokens", "8", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> str:
    return join(Session(loaded).fill_in(PREFIX, SUFFIX, replace(GREEDY, max_new_tokens=8))).text


def test_the_middle_alone_is_on_stdout(
    folder: Path, expected: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Greedy by default, and no further character, since it may go into a file."""
    (tmp_path / "a").write_text(PREFIX)
    (tmp_path / "b").write_text(SUFFIX)
    files = ["--prefix-file", str(tmp_path / "a"), "--suffix-file", str(tmp_path / "b")]
    for _ in range(2):
        assert main(["fim", str(folder), *files, *OPTIONS]) == 0
        out, err = capfd.readouterr()
        assert out == expected and "+ 8 tokens (length), TTFT" in err
    assert main(["fim", str(folder), *files, *OPTIONS, "--whole"]) == 0
    assert capfd.readouterr().out == PREFIX + expected + SUFFIX
    assert main(["fim", str(folder), *files, *OPTIONS, "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["text"] == expected and record["finish_reason"] == "length"
    assert record["new_tokens"] == 8 and record["cut_tokens"] == 0 and record["device"] == "cpu"
    sampled = ["--temperature", "2", "--top-k", "0", "--top-p", "1", "--seed", "5"]
    assert main(["fim", str(folder), *files, *OPTIONS, *sampled]) == 0
    assert capfd.readouterr().out != expected
    assert main(["fim", str(folder), *files, *OPTIONS, "--stop", expected[3:5], "--stop", "never"]) == 0
    assert capfd.readouterr().out == expected[: expected.index(expected[3:5])]


def test_one_file_with_a_marker(
    folder: Path,
    expected: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "add.py"
    file.write_text(PREFIX + MARKER + SUFFIX)
    assert main(["fim", str(folder), str(file), *OPTIONS]) == 0
    assert capfd.readouterr().out == expected
    file.write_text(PREFIX + "@@" + SUFFIX)
    assert main(["fim", str(folder), str(file), *OPTIONS, "--marker", "@@"]) == 0
    assert capfd.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((PREFIX + MARKER + SUFFIX).encode())))
    assert main(["fim", str(folder), "-", *OPTIONS]) == 0
    assert capfd.readouterr().out == expected


def test_the_whole_file_keeps_its_bytes(
    folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Line ends, a byte order mark and non-ASCII characters are unchanged."""
    before, after = "\ufeff# naïve\r\nx = 1\r".encode(), "\r\n# 😀 no line end".encode()
    file = tmp_path / "crlf.py"
    file.write_bytes(before + MARKER.encode() + after)
    assert main(["fim", str(folder), str(file), *OPTIONS, "--whole"]) == 0
    out = capfdbinary.readouterr().out
    assert out.startswith(before) and out.endswith(after) and len(out) > len(before + after)


def test_left_out_tokens_are_reported(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.py"
    file.write_text("x = 1\n" * 200 + MARKER + "y = 2\n" * 200)
    assert main(["fim", str(folder), str(file), *OPTIONS, "--context", "64"]) == 0
    assert "tokens far from the hole were left out" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"no marker", [], "does not contain '<FILL_HERE>'"),
        (b"a<FILL_HERE>b\n<FILL_HERE>", [], r"more than once \(first in line 1, last in line 2\)"),
        (b"aaa", ["--marker", "aa"], "more than once"),
        (b"a", ["--marker", ""], "the marker is empty"),
        (b"", [], "does not contain '<FILL_HERE>'"),
        (b"<FILL_HERE>", [], "before and after the hole are empty"),
        (b"\xff\xfe<FILL_HERE>", [], r"not UTF-8 text \(byte 1\)"),
        (b"\x7fELF\0<FILL_HERE>", [], "NUL bytes"),
        (b"a<FILL_HERE>b", ["--temperature", "-1"], "temperature is -1"),
        (b"a<FILL_HERE>b", ["--stop", ""], "a stop text is empty"),
        (b"a<FILL_HERE>b", ["--prefix-file", "x"], "two texts to fill"),
        (None, [], "no text to fill"),
        (None, ["--prefix-file", "missing"], "cannot read missing: No such file"),
        (None, ["--suffix-file", "."], "cannot read .: Is a directory"),
        (None, ["--suffix-file", "empty", "--prefix-file", "empty"], "before and after the hole are empty"),
        (None, ["--suffix-file", "/dev/zero"], "larger than 64 MiB"),
    ],
)
def test_mistakes_are_one_line(
    content: bytes | None,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are reported before the model is opened: the path does not exist."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    if content is not None:
        (tmp_path / "file").write_bytes(content)
        arguments = ["file", *arguments]
    assert main(["fim", "no/such/model", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("lowmem fim: ")
    assert re.search(message, err)


def test_a_model_that_cannot_is_one_line(
    without_fim: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text(f"a{MARKER}b")
    assert main(["fim", str(without_fim), str(tmp_path / "file"), *OPTIONS]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "no fill-in-the-middle tokens" in err.splitlines()[-1]
    assert main(["fim", str(tmp_path / "none"), str(tmp_path / "file"), *OPTIONS]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_whole_and_json_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fim", "m", "f", "--whole", "--json"])
    assert caught.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_ctrl_c_leaves_no_half_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Engine) -> None:
        assert self.sequence is not None
        self.sequence.tokens += [Token(50, None), Token(51, None)] if self.sequence.reads else []
        if not self.sequence.tokens:
            raise KeyboardInterrupt
        self.sequence.read = len(self.sequence.prompt)

    monkeypatch.setattr(Engine, "advance", interrupted)
    (tmp_path / "file").write_text(f"a{MARKER}b")
    assert main(["fim", str(folder), str(tmp_path / "file"), *OPTIONS, "--whole"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and "interrupted" in err
    assert main(["fim", str(folder), str(tmp_path / "file"), *OPTIONS]) == 130
    assert capsys.readouterr().out


def test_split_at() -> None:
    assert split_at("a\r\nXXb", "XX", "f") == ("a\r\n", "b")
    assert split_at("XX", "XX", "f") == ("", "")
