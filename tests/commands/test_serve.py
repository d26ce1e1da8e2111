"""`lowmem serve`: options, access, start and shutdown."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from lowmem.cli import main
from lowmem.commands import serve as serve_command
from lowmem.commands.serve import KEYS, Access, check_access, read_keys, served_name
from lowmem.errors import InvalidRequestError
from tests.helpers import REPO, TINY_STARCHAT
from tests.server.server_fixture import PATIENCE
from tests.server.test_api import QUESTION, answer_to, user

KEY = "0123456789abcdef"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS, raising=False)


def access(*words: str) -> Access:
    parser = argparse.ArgumentParser()
    serve_command.add_arguments(parser)
    args = parser.parse_args(["model", *words])
    names = ("api_key", "api_key_file", "no_api_key", "allow_host")
    return check_access(args.host, **{name: getattr(args, name) for name in names})


def refused(*words: str) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        access(*words)
    assert "\n" not in str(caught.value) and caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "box.lan"])
def test_other_machines_need_a_key_or_an_explicit_option(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host in refused("--host", host) and "--no-api-key" in refused("--host", host)
    assert access("--host", host, "--no-api-key").keys == ()
    monkeypatch.setenv(KEYS, KEY)
    assert access("--host", host).keys == (KEY,)
    assert "--no-api-key" in refused("--host", host, "--no-api-key")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_no_key(host: str) -> None:
    assert access("--host", host).keys == ()


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\nanother-key-here\n{KEY}\n")
    assert read_keys(str(file)) == (KEY, "another-key-here")
    monkeypatch.setenv(KEYS, f"{KEY}, third-key-here")
    assert read_keys(None) == (KEY, "third-key-here")
    assert read_keys(str(file)) == (KEY, "another-key-here")
    file.write_text("\n")
    with pytest.raises(InvalidRequestError, match="contains no key"):
        read_keys(str(file))
    for bad in ("tiny!", "a-key-with-ünicode"):
        file.write_text(bad)
        with pytest.raises(InvalidRequestError) as caught:
            read_keys(str(file))
        assert bad not in str(caught.value)
    with pytest.raises(InvalidRequestError, match="cannot read"):
        read_keys(str(tmp_path / "nowhere"))


def test_a_key_on_the_command_line_is_refused_and_not_shown() -> None:
    """Every user of the machine can read the arguments of a process."""
    message = refused("--api-key", KEY)
    assert KEY not in message and "--api-key-file" in message


@pytest.mark.parametrize("name", ["http://box.lan", "box.lan:80", "", "a b/"])
def test_host_names_have_no_scheme_and_no_port(name: str) -> None:
    assert "--allow-host" in refused("--allow-host", name)


def test_a_model_is_called_by_the_last_part_of_its_path(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "weights.gguf").touch()
    assert served_name(str(tmp_path / "my-model")) == "my-model"
    assert served_name(str(tmp_path / "my-model" / "..") + "/my-model/") == "my-model"
    assert served_name(str(tmp_path / "weights.gguf")) == "weights"
    assert served_name("HuggingFaceH4/starchat-alpha") == "HuggingFaceH4/starchat-alpha"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "70000"),
        (["--queue", "0"], "--queue"),
        (["--time-limit", "0"], "--time-limit"),
        (["--time-limit", "nan"], "--time-limit"),
        (["--max-body", "much"], "--max-body"),
        (["--prefix-cache", "some"], "--prefix-cache"),
        (["--host", "no such host"], "no such host"),
        (["--host", "203.0.113.9", "--no-api-key"], "203.0.113.9"),
        (["--host", "0.0.0.0"], "0.0.0.0"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = main(["serve", str(TINY_STARCHAT), *words])
    except SystemExit as ended:
        code = ended.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and said in lines[0]


def test_a_port_in_use_is_reported_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(TINY_STARCHAT), "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"127.0.0.1:{port} is in use" in line and "--port" in line


def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/nowhere/model", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "/nowhere/model" in line


@contextmanager
def serving(*words: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """A server process that is listening."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "lowmem",
            "serve",
            str(TINY_STARCHAT),
            "--port",
            "0",
            "--dtype",
            "float32",
            *words,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, KEYS: KEY},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, process.communicate()
        url = line.rpartition("API: ")[2].strip().rstrip(")")
        yield process, openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()


def test_the_first_signal_lets_the_running_answer_finish() -> None:
    with serving("--served-name", "one", "--served-name", "two") as (process, client):
        assert [card.id for card in client.models.list().data] == ["one", "two"]
        several = client.chat.completions.create(
            model="two", messages=user(QUESTION), temperature=0, max_tokens=100, n=4, stream=True
        )
        chunks = [next(iter(several))]
        process.send_signal(signal.SIGTERM)
        chunks += several
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason]
        assert len(reasons) == 4
        whole = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == 3)
        assert answer_to(QUESTION) in whole
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        log = process.stderr.read()
        assert "POST /v1/chat/completions 200" in log and "Traceback" not in log and KEY not in log


@pytest.mark.slow
def test_the_second_signal_ends_at_once() -> None:
    with serving("--shutdown-seconds", "600") as (process, client):
        stream = client.chat.completions.create(
            model="tiny-starchat", messages=user(QUESTION), temperature=0, max_tokens=900, n=16, stream=True
        )
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "once more" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
