"""`lowmem run --schema` and `--grammar`: the answer matches, and one line for every mistake."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import jsonschema
import pytest

from lowmem.commands import run as run_command
from lowmem.errors import LowmemError
from tests.helpers import TINY_STARCHAT

OPTIONS = ["-p", "Where?", "--dtype", "float32", "--device", "cpu", "--quiet", "--max-new-tokens", "60"]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
LARK = 'start: "sum(" NUMBER ("," NUMBER){1,2} ")"\nNUMBER: /[0-9]{1,3}/\n'
GBNF = 'root ::= ("ab" | "c"){2} [0-9]?\n'


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    run_command.add_arguments(parser)
    return run_command.run(parser.parse_args([str(TINY_STARCHAT), *OPTIONS, *map(str, words)]))


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "given"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_the_answer_is_valid_under_the_schema(
    mark: str, temperature: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, mark + json.dumps(SCHEMA))
    assert run("--schema", file, "--temperature", temperature, "--seed", "3") == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)


@pytest.mark.parametrize(("text", "pattern"), [(LARK, r"sum\(\d+(,\d+)+\)"), (GBNF, "(ab|c){2}[0-9]?")])
def test_the_answer_is_a_text_of_the_grammar(
    text: str, pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--grammar", written(tmp_path, text), "--raw", "--temperature", "0", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert re.fullmatch(pattern, answer["text"]) and answer["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("--schema", "", "JSON"),
        ("--schema", "{", "JSON"),
        ("--schema", "[1]", "schema"),
        ("--schema", '{"not": {}}', "not"),
        ("--schema", '{"type": "string", "minLength": 9, "maxLength": 2}', ""),
        ("--schema", b"\xff\xfe\x00", "UTF-8"),
        ("--grammar", "", ""),
        ("--grammar", "start: (", ""),
        ("--grammar", 'root ::= "a" other\n', "other"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_the_model_is_loaded(
    option: str, text: str | bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lowmem.loading.loader.load", load)
    with pytest.raises(LowmemError) as caught:
        run(option, written(tmp_path, text))
    assert said.lower() in str(caught.value).lower() and "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_missing_file_and_two_grammars_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LowmemError, match="nothing"):
        run("--schema", tmp_path / "nothing")
    file = written(tmp_path, json.dumps(SCHEMA))
    with pytest.raises(SystemExit) as left:
        run("--schema", file, "--grammar", file)
    assert left.value.code == 2 and "not allowed with" in capsys.readouterr().err
