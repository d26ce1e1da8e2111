"""Runs many `lowmem` command lines in one new process, since importing torch takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import REPO

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
_CHILD = """
import json, os, sys, tempfile, traceback
from lowmem.cli import main

def done(arguments):
    kept, files = [os.dup(1), os.dup(2)], [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number + 1)  # what C code prints is caught too
    try:
        code = main(arguments)
    except SystemExit as left:
        code = left.code
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    texts = []
    for number, file in enumerate(files):
        os.dup2(kept[number], number + 1)
        file.seek(0)
        texts.append(file.read().decode())
    return [code or 0, *texts, sorted(os.listdir())]

print(json.dumps([done(arguments) for arguments in json.loads(sys.argv[1])]))
"""


@dataclass(frozen=True)
class Done:
    """The result of a command line: exit code, output, and the names in its folder afterwards."""

    returncode: int
    stdout: str
    stderr: str
    names: list[str]


def in_one_process(commands: Sequence[Sequence[str]], cwd: Path) -> list[Done]:
    """Run command lines, without the word lowmem, one after another in a new process in `cwd`.

    A library's output on import appears with the first command that imports it.
    """
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps([list(command) for command in commands])],
        stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=cwd, check=True,
    )  # fmt: skip
    return [Done(*fields) for fields in json.loads(result.stdout)]
