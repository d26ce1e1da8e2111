"""The documents say what is: commands, options, links, modules and Python code in them work."""

from __future__ import annotations

import importlib.util
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from lowmem.cli import _COMMANDS, command_parser
from tests.docs import reference, rooms
from tests.helpers import REPO, TINY_STARCHAT

DOCUMENTS = sorted(
    [*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md"), *(REPO / "lowmem" / "data").rglob("*.md")]
)
IDS = [str(path.relative_to(REPO)) for path in DOCUMENTS]
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a document in a language."""
    text = path.read_text(encoding="utf-8")
    return [textwrap.dedent(body) for _, found, body in _BLOCK.findall(text) if found == language]


def command_lines(path: Path) -> list[str]:
    """The `lowmem` commands in the shell blocks of a document, without optional parts and comments."""
    lines = []
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^(\w+=(\$\([^)]*\)|\S*) )+", "", line.strip())
            line = re.sub(r"\s+\[[^\]]*\]", "", line).replace("...", "")
            if line.startswith("lowmem "):
                lines.append(line)
    return lines


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_has_every_command_and_option():
    written = reference.FILE.read_text(encoding="utf-8")
    assert written == reference.reference(), "write it again: python -m tests.docs.reference"


def test_the_architecture_lists_every_file():
    written = rooms.FILE.read_text(encoding="utf-8")
    assert written == rooms.document(), "write it again: python -m tests.docs.rooms"


@each_document
def test_commands_parse(path):
    for line in command_lines(path):
        words = shlex.split(line, comments=True)[1:]
        if words == ["COMMAND", "--help"]:
            continue
        assert words[0] in _COMMANDS, line
        try:
            command_parser(_COMMANDS[words[0]]).parse_args(words[1:])
        except SystemExit as stop:
            pytest.fail(f"{line}: exit code {stop.code}")


@each_document
def test_commands_and_options_in_the_text_exist(path):
    """`lowmem …` in running text names a command, and options that the command has."""
    for span in re.findall(r"`(lowmem [^`\n]+)`", path.read_text(encoding="utf-8")):
        words = span.split()
        if words[1] == "COMMAND" or words[1].startswith("-"):
            continue
        assert words[1] in _COMMANDS, span
        parsers = [p for p in reference.parsers() if p.prog.split()[1] == words[1]]
        known = {option for parser in parsers for option in parser._option_string_actions}
        for word in words[2:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, span


@each_document
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


@each_document
def test_modules_and_files_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"python -m ((?:lowmem|tests)[\w.]*)", text):
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.submodule_search_locations is None or importlib.util.find_spec(f"{name}.__main__"), name
    for name in re.findall(r"`((?:lowmem|convert|benchmarks|tests|docs)/[\w./\-]+)`", text):
        assert (REPO / name).exists(), name


@each_document
def test_python_runs(path, tmp_path, monkeypatch):
    """The blocks of a document run one after the other, with the embedded model in the place of StarChat."""
    code = "\n".join(blocks(path, "python"))
    if not code:
        pytest.skip("no Python in it")
    monkeypatch.chdir(tmp_path)
    for name in ("HuggingFaceH4/starchat-alpha", "path/to/starchat-alpha"):
        code = code.replace(name, str(TINY_STARCHAT))
    code = code.replace("max_new_tokens=256", "max_new_tokens=8")
    exec(compile(code, str(path), "exec"), {"__name__": "document"})
