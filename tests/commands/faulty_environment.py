"""Run `lowmem` command lines in environments that fail: closed and full streams, no home, an unnamed user.

One process imports torch and forks for every command, since the import takes seconds:

    python -m tests.commands.faulty_environment      reads a JSON list of commands, writes a list of results
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.commands.command_lines import ENVIRONMENT


@dataclass(frozen=True)
class Fault:
    """What is wrong in an environment."""

    name: str
    variables: dict[str, str | None] = field(default_factory=dict)
    """Environment variables to set, or to remove (None). {tmp} is an empty folder."""
    stdin: str = "null"
    """closed or null"""
    stdout: str = "file"
    """file, closed, full, gone (a pipe whose reader has exited) or read-only"""
    stderr: str = "file"
    """As stdout."""
    encoding: str = "utf-8"
    """Of standard output."""
    user: int = 0
    """The user's number; one without a name in the system's list."""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def run_all(commands: Sequence[tuple[Sequence[str], Fault]], folder: Path) -> list[Result]:
    """The results of command lines, given without the word lowmem, each in its environment."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.commands.faulty_environment"],
        input=json.dumps([[list(words), asdict(fault)] for words, fault in commands]),
        stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=folder, check=True,
    )  # fmt: skip
    return [Result(*fields) for fields in json.loads(done.stdout)]


# ---- in the forking process


def _fork(words: list[str], fault: Fault) -> tuple[int, str, str]:
    files = tempfile.TemporaryFile
    with files() as out, files() as err, tempfile.TemporaryDirectory() as tmp:
        os.chmod(tmp, 0o755)
        child = os.fork()
        if not child:
            code = 99
            try:
                code = _in_child(words, fault, (out.fileno(), err.fileno()), tmp)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "backslashreplace"))
        return code, texts[0], texts[1]


def _in_child(words: list[str], fault: Fault, files: tuple[int, int], tmp: str) -> int:
    for name, value in fault.variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value.replace("{tmp}", tmp)
    targets = (_opened(fault.stdin, -1), _opened(fault.stdout, files[0]), _opened(fault.stderr, files[1]))
    for number, target in enumerate(targets):
        if target is None:
            os.close(number)
        else:
            os.dup2(target, number)
    encodings = ("utf-8", fault.encoding, "utf-8")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode, buffering = "w" if number else "r", 1 if number == 2 else -1
        open_file = functools.partial(open, number, mode, buffering, encodings[number], closefd=False)
        setattr(sys, name, None if targets[number] is None else open_file())
    if fault.user:
        os.setgroups([])
        os.setgid(fault.user)
        os.setuid(fault.user)
    from lowmem.cli import main

    sys.argv = ["lowmem", *words]
    try:
        code = main()
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        import traceback

        os.write(files[1], traceback.format_exc().encode())
        code = 1
    try:  # as Python does at its end
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        os.write(files[1], f"Exception ignored: {error!r}\n".encode())
        code = 120
    return code


def _opened(what: str, file: int) -> int | None:
    """A descriptor, or None for a closed stream."""
    if what == "closed":
        return None
    if what == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    paths = {"full": ("/dev/full", os.O_WRONLY), "null": ("/dev/null", os.O_RDWR)}
    paths["read-only"] = ("/dev/null", os.O_RDONLY)
    return os.open(*paths[what]) if what in paths else file


def _preload() -> None:
    import logging
    import signal

    import torch

    import lowmem.checkpoint.verify.converted
    import lowmem.cli
    import lowmem.loading.opening
    import lowmem.session  # noqa: F401

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    torch.set_num_threads(1)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _preload()
    json.dump([_fork(words, Fault(**fault)) for words, fault in asked], answers)
    answers.flush()
