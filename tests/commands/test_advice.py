"""What messages advise exists, and works: options, commands, extras and variables; a dozen pieces tried."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from lowmem.cli import COMMANDS, build_parser, command_parser
from tests.commands.command_lines import ENVIRONMENT, Done, in_one_process
from tests.helpers import REPO, TINY_STARCHAT, save_source, tiny_model

FOLDERS = ("lowmem", "convert", "benchmarks")
SOURCES = sorted(p for f in FOLDERS for p in (REPO / f).rglob("*.py") if "experiments" not in p.parts)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
COMMAND = re.compile(r"\blowmem ([a-z]+)((?: [^.:;,()`]*)?)")
PIP = re.compile(r"pip install ([^.:;)]*)")
VARIABLE = re.compile(r"\bLOWMEM_[A-Z_]+\b")
OF_OTHER_PROGRAMS = {"--merge"}  # llama-gguf-split
RUN_OTHERS = ("lowmem/engines/vllm_command.py", "lowmem/kernels/building/wheels.py")
"""Files that write the command lines of other programs."""
OF_PIP = {"--upgrade", "--force-reinstall"}
ANSWER = ("run", "fim", "serve")
# Files of the lower packages whose advice only some commands give.
ONLY = {
    "lowmem/cli.py": ("run", "lowmem"),
    "lowmem/chat": ("run",),
    "lowmem/server": ("serve",),
    "lowmem/doctor": ("doctor",),
    "lowmem/engines": ("serve",),
    "lowmem/checkpoint/files/writer.py": ("convert",),  # merges the converter's shards
    "lowmem/checkpoint/readers.py": ("convert",),
    "lowmem/export": ("export",),
    "lowmem/plan/fit": ("convert",),
    "lowmem/streaming": ("convert", "bench quality"),
    "lowmem/prompts.py": ("run",),  # a client of the server gets an ApiError instead
}


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def parsers() -> dict[str, set[str]]:
    """The options of each command, and of each word of `lowmem bench`."""
    found = {"lowmem": options_of(build_parser())}
    for command in COMMANDS:
        parser = command_parser(command)
        found[command.name] = options_of(parser)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"bench {name}": options_of(sub) for name, sub in action.choices.items()}
    return found


PARSERS = parsers()


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a file that may be shown: string literals, {} for values; no docstrings and no help."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            hidden.add(id(node.value))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("add_argument"):
            hidden |= {id(inner) for inner in ast.walk(node)}
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
            hidden |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in hidden:
            yield node.lineno, node.value


def speakers(path: Path) -> tuple[str, ...]:
    """The commands that show the messages of a file."""
    name = path.relative_to(REPO).as_posix()
    for prefix, commands in ONLY.items():
        if name.startswith(prefix):
            return commands
    if name.startswith("convert/"):
        return ("convert",)
    if name.startswith("benchmarks/"):
        word = path.relative_to(REPO / "benchmarks").parts[0].removesuffix(".py")
        return (
            (f"bench {word}",) if f"bench {word}" in PARSERS else tuple(n for n in PARSERS if "bench " in n)
        )
    if name.startswith("lowmem/commands/"):
        return (path.stem,) if path.stem in PARSERS else ANSWER
    return ("run",)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_what_messages_name_exists(path: Path) -> None:
    extras = metadata.metadata("lowmem").get_all("Provides-Extra") or []
    wrong = []
    for line, text in texts(path):
        of_others = set(OF_OTHER_PROGRAMS)
        for name, rest in COMMAND.findall(text):
            if name not in PARSERS:
                continue
            word = f"{name} {rest.split()[0]}" if rest.split() else name
            options = set(OPTION.findall(rest))
            wrong += [f"{line}: lowmem {name} has no {o}" for o in options - PARSERS.get(word, PARSERS[name])]
            of_others |= options
        for install in PIP.findall(text):
            of_others |= OF_PIP
            wrong += [
                f"{line}: no extra {e}" for e in re.findall(r"lowmem\[([a-z]+)\]", install) if e not in extras
            ]
        runs_others = path.relative_to(REPO).as_posix() in RUN_OTHERS
        for option in set() if runs_others else set(OPTION.findall(text)) - of_others:
            if not any(option in PARSERS[name] for name in speakers(path)):
                wrong.append(f"{line}: {' and '.join(speakers(path))} without {option}")
        documented = "".join(page.read_text() for page in (REPO / "docs").glob("*.md"))
        wrong += [
            f"{line}: {name} is in no document" for name in VARIABLE.findall(text) if name not in documented
        ]
    assert not wrong


# ---- tried

MODEL = str(TINY_STARCHAT)
CONVERT = ["--rows", "2", "--plain", "--quiet"]
SHORT = ["--row-length", "64"]
LAST = ["-p", "x", "--max-new-tokens", "2"]
# A command that is refused, the advice in its message, and the command that follows it: {words} is the
# refused command, {0} the part of the advice in parentheses.
TRIED: list[tuple[list[str], str, str]] = [
    (["convert", "source", "a", *CONVERT], r"Use (--row-length 256) or less", "{words} {0}"),
    (
        ["convert", "source", "b", *CONVERT, *SHORT, "--memory", "1MiB"],
        r"at least (--memory \w+)",
        "{words} {0}",
    ),
    (["convert", "source", "ready", *CONVERT, *SHORT], r"replace it with (--force)", "{words} {0}"),
    (
        ["convert", "source", "c", *CONVERT, *SHORT, "--group-size", "7"],
        r"of (32)",
        "{words} --group-size {0}",
    ),
    (
        ["convert", "source", "d", *CONVERT, *SHORT, "--damp-percent", "2"],
        r"(0\.01)",
        "{words} --damp-percent {0}",
    ),
    (
        ["convert", "source", "e", *CONVERT, *SHORT, "--bpw", "2.01"],
        r"Use at least (--bpw [\d.]+)",
        "{words} {0}",
    ),
    (["convert", "source", *CONVERT, *SHORT], r"Type lowmem (run \S+),", "{0} -p x --max-new-tokens 2"),
    (["convert", "source", *CONVERT, *SHORT], r"convert it again with (--force)", "{words} {0}"),
    (
        ["run", MODEL, *LAST, "--bits", "3"],
        r"lowmem (convert .*)",
        "{0} --rows 2 --row-length 64 --plain -q",
    ),
    (["run", MODEL, *LAST, "--ram", "20MiB"], r"that would be enough is (\w+)", "{words} --ram {0}"),
    (["run", MODEL, *LAST, "--context", "99999"], r"has (\d+) positions", "{words} --context {0}"),
    (["run", MODEL, *LAST, "--temperature", "-1"], r"Use (0) for greedy", "{words} --temperature {0}"),
    (
        ["run", MODEL, *LAST, "--raw", "--system", "x"],
        r"(--raw) turns off. Leave one out",
        "run {model} -p x --raw",
    ),
    (["fim", MODEL, "gap.py", "--max-new-tokens", "2"], r"or set (--marker)", "{words} {0} GAP"),
    (["rm", "nothing"], r"See lowmem (list)", "{0}"),
    (["bench", "report", "nothing"], r"`lowmem (bench quality) MODEL --out nothing`", "{0} --help"),
    (["plan", "nowhere"], r"see lowmem (list)", "{0}"),
]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Done, Done]]:
    """For each row of TRIED the refusal, and what came of its advice."""
    folder = tmp_path_factory.mktemp("advice")
    save_source(tiny_model("gpt_bigcode_mqa", layers=2), folder / "source")
    (folder / "gap.py").write_text("x = GAP\n")
    ready = [["convert", "source", *out, *CONVERT, *SHORT] for out in ([], ["ready"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "LOWMEM_CACHE", str(folder / "cache"))
        refused = in_one_process([*ready, *(words for words, _, _ in TRIED)], folder)[len(ready) :]
        followed = []
        for (words, advice, then), done in zip(TRIED, refused, strict=True):
            found = re.search(advice, done.stderr)
            assert done.returncode == 2 and found, (words, done)
            line = then.format(found[1], words=shlex.join(words), model=MODEL)
            followed.append(shlex.split(line))
        return list(zip(refused, in_one_process(followed, folder), strict=True))


@pytest.mark.parametrize(
    "number", range(len(TRIED)), ids=lambda number: " ".join(TRIED[number][0][:1]) + str(number)
)
def test_advice_that_is_followed_works(number: int, tried: list[tuple[Done, Done]]) -> None:
    refused, followed = tried[number]
    assert followed.returncode == 0, (refused.stderr, followed.stderr)
