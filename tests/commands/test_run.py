"""`lowmem run -p`: the answer on standard output, as text or JSON; one line for every mistake."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem.chat.conversation import ChatState, Conversation, Exchange
from lowmem.chat.store import save
from lowmem.commands import answering as command_line
from lowmem.commands import run as run_command
from lowmem.commands.run import read_prompt
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, LowmemError
from lowmem.loading.loader import load
from lowmem.models.dialogue import Message
from lowmem.session import Session
from lowmem.text.stream import TextStream
from tests.helpers import REPO, save_source, tiny_model

GREEDY = SamplingParams(temperature=0, max_new_tokens=6)
OPTIONS = ["--temperature", "0", "--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu"]


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    run_command.add_arguments(parser)
    return run_command.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tiny_model("gpt_bigcode_mqa", positions=128), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return Session(load(folder))


@pytest.fixture(autouse=True)
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading standard input fails unless a test provides one."""

    def read(*_: Any) -> str:
        raise AssertionError("standard input was read")

    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "read", read)
    monkeypatch.setattr("sys.stdin", stdin)


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_the_answer_alone_is_on_stdout(
    folder: Path, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "-p", "Hi", *OPTIONS) == 0
    captured = capsys.readouterr()
    expected = session.complete("Hi", GREEDY).text.removeprefix("\n")
    assert captured.out == expected + "\n" * (not expected.endswith("\n"))
    assert "loaded in" in captured.err and "+ 6 tokens · TTFT" in captured.err
    assert "cut at 6 new tokens" in captured.err and "\x1b" not in captured.err


def test_json_is_one_object(folder: Path, session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "-p", "Hi", "--json", *OPTIONS) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == session.complete("Hi", GREEDY).text.removeprefix("\n")
    assert record["new_tokens"] == 6 and record["finish_reason"] == "length" and record["bits"] is None
    assert record["label"] and record["reason"] and record["device"] == "cpu" and record["context"] == 128
    assert record["memory"]["host"] > 0 and record["ttft_seconds"] > 0 and record["weight_bytes"] > 0


def test_quiet_says_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "-p", "Hi", "--quiet", *OPTIONS) == 0
    assert capsys.readouterr().err == ""


def test_where_the_prompt_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "code.py"
    file.write_bytes("x = 'é'\r\n\n".encode())
    assert read_prompt(None, str(file)) == "x = 'é'"
    assert read_prompt("Explain:", str(file)) == "Explain:\n\nx = 'é'"
    assert read_prompt("a\n", None) == "a\n"
    pipe(monkeypatch, b"Hi\nthere\n")
    assert read_prompt(None, None) == "Hi\nthere"
    pipe(monkeypatch, b"piped\n")
    assert read_prompt("Explain:", "-") == "Explain:\n\npiped"


def test_an_invalid_prompt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_bytes(b" \n")
    for words, match in (
        (["-f", str(tmp_path)], "cannot read"),
        (["-f", str(tmp_path / "nowhere")], "No such file"),
        (["-f", "a\0b"], "cannot read"),
        (["-f", str(tmp_path / "binary")], "not UTF-8"),
        (["-f", str(tmp_path / "empty")], "is empty"),
        (["-p", " "], "is empty"),
    ):
        with pytest.raises(InvalidRequestError, match=match):
            run("model", *words)
    pipe(monkeypatch, b" \n")
    with pytest.raises(InvalidRequestError, match="standard input is empty"):
        run("model")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)  # and stdout is a file, so no chat starts
    with pytest.raises(InvalidRequestError, match="prompt is missing"):
        run("model")
    monkeypatch.setattr(command_line, "LARGEST", 10)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(InvalidRequestError, match="larger"):
        run("model", "-f", tmp_path / "large")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--seed", "-1"], "seed"),
        (["--stop", ""], "stop"),
        (["--load", "nowhere.json"], "does not exist"),
        (["--device", "tpu"], "device"),
        (["--device", "cuda:77"], "device"),
        (["--system", "x", "--raw"], "template"),
        (["--load", "x", "--raw"], "template"),
        (["--context", "999999"], "positions"),
    ],
)
def test_mistakes_are_one_line(folder: Path, words: list[str], match: str) -> None:
    with pytest.raises(LowmemError, match=match) as caught:
        run(folder, "-p", "Hi", *words)
    assert "\n" not in str(caught.value)


def test_options_reach_the_session(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[Any] = []
    real = Session.stream

    def stream(self: Session, prompt: Any, params: SamplingParams, **options: Any) -> Any:
        heard.append((prompt, params, options))
        return real(self, prompt, params, **options)

    monkeypatch.setattr(Session, "stream", stream)
    words = ["--top-k", "3", "--top-p", "0.5", "--min-p", "0.1", "--repetition-penalty", "1.2", "--seed", "9"]
    words += ["--stop", "a", "--stop", "b c", "--max-new-tokens", "2", "--system", "S", "--no-speculation"]
    assert run(folder, "-p", "Hi", *words) == 0
    prompt, params, options = heard[0]
    assert (prompt, options) == ("Hi", {"system": "S", "raw": False})
    expected = SamplingParams(
        top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.2, seed=9, stop=("a", "b c")
    )
    assert params == replace(expected, max_new_tokens=2)


def test_a_saved_conversation_is_resumed(
    folder: Path, tmp_path: Path, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(str(tmp_path / "talk.json"), ChatState(Conversation("S", (Exchange("a", "b"),)), GREEDY))
    assert run(folder, "-p", "c", "--load", path, "--dtype", "float32", "--device", "cpu") == 0
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    expected = session.complete(turns, GREEDY, system="S").text.removeprefix("\n")
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")


def test_ctrl_c_ends_the_answer_cleanly(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = TextStream.push, [0]

    def interrupted(self: TextStream, token: int) -> str:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(self, token)

    monkeypatch.setattr(TextStream, "push", interrupted)
    assert run(folder, "-p", "Hi", "--temperature", "0") == 130
    captured = capsys.readouterr()
    assert captured.out.endswith("\n") and "interrupted" in captured.err


def test_escape_codes_reach_a_file_but_no_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = TextStream.push
    monkeypatch.setattr(TextStream, "push", lambda self, token: "\x1b[2J" + real(self, token))
    assert run(folder, "-p", "Hi", *OPTIONS) == 0
    assert "\x1b[2J" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run(folder, "-p", "Hi", *OPTIONS) == 0
    out = capsys.readouterr().out
    assert "[2J" in out and "\x1b" not in out


def test_a_closed_pipe_is_not_an_error(folder: Path) -> None:
    """`lowmem run M -p x | head -1` ends without a traceback."""
    command = (
        f'"{sys.executable}" -m lowmem run "{folder}" -p Hi --max-new-tokens 60 --temperature 0 | head -c 1'
    )
    result = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    assert result.stdout[1:].strip() == "0", result.stderr
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr
