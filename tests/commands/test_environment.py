"""Every command in environments that fail: one line and an exit code, never a traceback, never a hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem import cli, debug
from lowmem.cli import COMMANDS, main
from lowmem.errors import OutputError
from tests.commands.command_lines import ENVIRONMENT
from tests.commands.faulty_environment import Fault, Result, run_all
from tests.helpers import TINY_STARCHAT, save_source, tiny_model

MODEL = str(TINY_STARCHAT)
SHORT = ["--max-new-tokens", "3"]
WORK = {
    "run": ["run", MODEL, "-p", "caf\u00e9", *SHORT],
    "run --json": ["run", MODEL, "-p", "hi", *SHORT, "--json"],
    "fim": ["fim", MODEL, "hole.py", *SHORT],
    "fim --whole": ["fim", MODEL, "hole.py", *SHORT, "--whole"],
    "plan": ["plan", MODEL],
    "plan --json": ["plan", MODEL, "--json"],
    "verify": ["verify", MODEL],
    "list --json": ["list", "--json"],
    "doctor": ["doctor", "--quick"],
    "help": ["run", "--help"],
}
"""Commands whose result is their output, by a name."""
CONVERT = ["--rows", "2", "--row-length", "32", "--plain", "--bits", "8"]
OTHER = {"convert --json": ["convert", "source", "{number}", *CONVERT, "--json"]}
NO_HOME: dict[str, str | None] = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOWMEM_CACHE", "XDG_STATE_HOME"))
UNNAMED = 54321
NO_OUTPUT = [
    Fault("stdout closed", stdout="closed"),
    Fault("stdout full", stdout="full"),
    Fault("stdout read-only", stdout="read-only"),
]
ALL = (*WORK, *OTHER)
TEXTS = ("fim", "plan", "plan --json", "verify", "doctor", "help")
FILES = ("run", "plan", "doctor", "convert --json")
HARMLESS = [
    (Fault("nothing"), ALL),
    (Fault("stdin closed", stdin="closed"), ("fim", "doctor")),
    (Fault("stderr closed", stderr="closed"), ALL),
    (Fault("stderr full", stderr="full"), ("run", "convert --json")),
    (Fault("stderr gone", stderr="gone"), ("run", "convert --json")),
    (Fault("latin-1", encoding="iso-8859-1"), TEXTS),
    (Fault("ascii", encoding="ascii"), TEXTS),
    (Fault("home cannot be written", {**NO_HOME, "HOME": "/proc/self"}), FILES),
    (Fault("cache cannot be written", {"LOWMEM_CACHE": "/proc/self/cache"}), FILES),
    (Fault("no temporary folder", {"TMPDIR": "/nowhere"}), FILES),
    (Fault("no columns", {"COLUMNS": "0", "LINES": "0", "TERM": "dumb", "NO_COLOR": "1"}), TEXTS),
    (Fault("one column", {"COLUMNS": "1", "TERM": "nobody-knows"}), TEXTS),
    (Fault("relative XDG", {**NO_HOME, "XDG_CACHE_HOME": "here", "HOME": "there"}), ("run", "plan")),
]
"""Environments in which the named commands give their usual result."""
GONE = Fault("reader gone", stdout="gone")
NO_NAME = Fault("no home, no name", NO_HOME, user=UNNAMED)
NO_ENTRY = Fault("another user's home", {**NO_HOME, "HOME": "/root/x"}, user=UNNAMED)  # docker run --user
MISTAKES = [
    (["rnu"], Fault("everything closed", stdin="closed", stdout="closed", stderr="closed")),
    (["run", "nowhere", "-p", "x"], Fault("stderr full", stderr="full")),
    (["run", MODEL], Fault("stdin closed", stdin="closed")),
    (["convert", "source", *CONVERT, "--quiet"], NO_NAME),
    (["rm", "x"], NO_NAME),
    (["serve", "nowhere"], Fault("stdout closed", stdout="closed")),
    (["bench", "report", "nowhere"], Fault("stdout closed", stdout="closed")),
    (["demo"], Fault("stdout closed", stdout="closed")),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    """The result of each command in each environment, by the names of both."""
    folder = tmp_path_factory.mktemp("environment")
    save_source(tiny_model("gpt_bigcode_mqa", layers=2), folder / "source")
    (folder / "hole.py").write_text("def f():\n    <FILL_HERE>\n")
    for path in (folder, *folder.rglob("*")):  # for the unnamed user
        path.chmod(0o755)
    jobs: dict[tuple[str, str], tuple[list[str], Fault]] = {}
    others = [NO_NAME, NO_ENTRY] if os.getuid() == 0 else []
    for fault, names in (*HARMLESS, (GONE, ALL), *((fault, (*WORK,)) for fault in (*NO_OUTPUT, *others))):
        for name in names:
            words = [word.format(number=len(jobs)) for word in (WORK | OTHER)[name]]
            jobs[name, fault.name] = words, fault
    for words, fault in MISTAKES:
        if not fault.user or os.getuid() == 0:
            jobs[" ".join(words), fault.name] = words, fault
    return dict(zip(jobs, run_all(list(jobs.values()), folder), strict=True))


def lines(result: Result) -> list[str]:
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr, result.stderr
    return result.stderr.splitlines()


@pytest.mark.parametrize("fault", NO_OUTPUT, ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", WORK)
def test_a_result_that_cannot_be_written_is_an_error(
    name: str, fault: Fault, results: dict[tuple[str, str], Result]
) -> None:
    result = results[name, fault.name]
    said = lines(result)
    if name == "help" and fault.name == "stdout closed":
        assert result.code == 0  # as argparse has it
        return
    assert result.code == 2 and "standard output" in said[-1], result
    assert len([line for line in said if line.startswith("lowmem")]) == 1


@pytest.mark.parametrize(
    ("fault", "name"),
    [(fault, name) for fault, names in HARMLESS for name in names],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_does_not_concern_the_result_does_not_stop_it(
    name: str, fault: Fault, results: dict[tuple[str, str], Result]
) -> None:
    result, usual = results[name, fault.name], results[name, "nothing"]
    lines(result)
    assert result.code == 0, result
    if fault.stderr != "file":
        assert result.stderr == ""
    if "--json" in name and name != "convert --json":
        assert json.loads(result.stdout).keys() == json.loads(usual.stdout).keys()
    elif name in ("run", "fim", "verify") and fault.encoding == "utf-8":
        assert result.stdout == usual.stdout


@pytest.mark.parametrize("name", [*WORK, *OTHER])
def test_a_reader_that_has_exited_is_no_error(name: str, results: dict[tuple[str, str], Result]) -> None:
    result = results[name, GONE.name]
    unfinished = name == "convert --json"  # its work is not its output
    assert result.code == (2 if unfinished else 0) and not result.stdout
    assert any("Repeat the command" in line for line in lines(result)) == unfinished


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("fault", ["no home, no name", "another user's home"])
@pytest.mark.parametrize("name", WORK)
def test_a_user_without_a_name_or_a_home_of_its_own(
    name: str, fault: str, results: dict[tuple[str, str], Result]
) -> None:
    result = results[name, fault]
    said = lines(result)
    if name == "list --json" and fault == NO_NAME.name:
        assert result.code == 2 and "LOWMEM_CACHE" in said[-1]
    else:
        assert result.code == 0, result


@pytest.mark.parametrize(("words", "fault"), MISTAKES, ids=lambda value: getattr(value, "name", None))
def test_refusals_are_one_line_where_they_can_be_written(
    words: list[str], fault: Fault, results: dict[tuple[str, str], Result]
) -> None:
    if fault.user and os.getuid() != 0:
        pytest.skip("only root may become another user")
    result = results[" ".join(words), fault.name]
    assert result.code == 2, result
    assert len(lines(result)) == (1 if fault.stderr == "file" else 0), result


def test_characters_that_the_encoding_lacks_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-c", "import sys; from lowmem.cli import main; sys.argv[0] = 'lowmem'; sys.exit(main())"]
    code = subprocess.run(
        [sys.executable, *words, "plan", MODEL],
        capture_output=True,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "iso-8859-1", "PYTHONUTF8": "0"},
    )
    assert code.returncode == 0 and b"? " in code.stdout
    assert b"iso" in code.stderr and b"PYTHONIOENCODING=utf-8" in code.stderr


# ---- unexpected errors


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(debug.VARIABLE, "")
    yield


def broken(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every command raise `error` when it runs."""

    def run(command: cli.Command, words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", run)


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_a_bug_is_one_line_with_what_to_report(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(KeyError("a\nb"), monkeypatch)
    assert main([command, "a b", "--json"]) == cli.BUG
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lowmem {command}: unexpected KeyError: ") and " (lowmem/cli.py:" in line
    assert line.endswith(f"lowmem {command} 'a b' --json --debug")


@pytest.mark.parametrize("way", ["option", "variable"])
@pytest.mark.parametrize("error", [KeyError("x"), OutputError("no", "try again"), PermissionError(13, "no")])
def test_debug_shows_the_traceback(
    way: str, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(error, monkeypatch)
    main(["list"])
    assert "Traceback" not in capsys.readouterr().err
    if way == "variable":
        monkeypatch.setenv(debug.VARIABLE, "1")
    main(["list", *(["--debug"] if way == "option" else [])])
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.splitlines()[-1].startswith("lowmem list: ")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device", "/full/x"), 2, "/full/x: No space left on device"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), 2, "Set TMPDIR"),
        (ModuleNotFoundError("No module named 'numpy'", name="numpy"), 2, "module numpy"),
        (ModuleNotFoundError("No module named 'lowmem.x'", name="lowmem.x"), 1, "bug in lowmem"),
        (MemoryError(), 2, "out of memory"),
        (RecursionError("maximum recursion depth exceeded"), 1, "RecursionError"),
        (type("PanicException", (BaseException,), {})("in Rust"), 1, "PanicException: in Rust"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_exception_has_an_exit_code_and_a_line(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken(error, monkeypatch)
    assert main(["list"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_threads_finalizers_and_logs_are_told_in_lines() -> None:
    script = """
import logging, threading
from lowmem import debug
debug.report_in_lines("lowmem serve")
def fail():
    raise ValueError("in a thread")
class Late:
    def __del__(self):
        raise ValueError("late")
thread = threading.Thread(target=fail); thread.start(); thread.join()
late = Late()
del late
try:
    fail()
except ValueError:
    logging.getLogger("asyncio").exception("Task exception was never retrieved")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    said = result.stderr.splitlines()
    assert result.returncode == 0 and len(said) == 2, result.stderr
    assert said[0].startswith("lowmem serve: unexpected ValueError: in a thread")
    assert said[1].startswith("Task exception was never retrieved: ValueError: in a thread")


def test_a_folder_that_was_removed_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && {sys.executable} -m lowmem plan x"
    result = subprocess.run(script, shell=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 2 and "current folder no longer exists" in result.stderr
    assert len(result.stderr.splitlines()) == 1
