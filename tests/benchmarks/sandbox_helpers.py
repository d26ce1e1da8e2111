"""Helpers for tests of the sandbox: run hostile programs, and check that they leave nothing behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil
import pytest
from lowmem.benchmarks.humaneval import sandbox
from lowmem.benchmarks.humaneval.sandbox import Limits, capabilities, check

sandboxed = pytest.mark.skipif(
    not capabilities().enough, reason=f"code cannot be sandboxed here: {capabilities().reason}"
)
QUICK = Limits(seconds=60, cpu_seconds=1)
PROMPT = 'def f(x):\n    """x itself."""\n'
TEST = "def check(candidate):\n    assert candidate(1) == 1\n    assert candidate('a') == 'a'\n"
RIGHT = "\ndef f(x):\n    return x\n"
PRELUDE = """
import ctypes, os, signal, socket, subprocess, sys, threading
libc, X86 = ctypes.CDLL(None, use_errno=True), os.uname().machine == 'x86_64'
def attempt(name, action):
    try:
        action()
    except BaseException as error:
        print('held', name, type(error).__name__)
    else:
        print('ESCAPED', name)
def system_call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), 'refused')
"""


def children() -> set[int]:
    """The child processes of this process, zombies included: other tests may keep a fork server."""
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture(params=["namespaces", "no namespaces"], autouse=True)
def world(request, monkeypatch, tmp_path):
    """A temporary folder for files of the sandbox. Afterwards no file and no process may be left."""
    if request.param == "no namespaces":
        monkeypatch.setattr(sandbox, "_NAMESPACES", False)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = children()
    yield tmp_path
    assert list(temporary.iterdir()) == []
    assert survivors(str(temporary)) == []
    assert children() <= before


once = pytest.mark.parametrize("world", ["namespaces"], indirect=True)


def survivors(marker: str) -> list[int]:
    """Other processes that have `marker` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def run(code: str, limits: Limits = QUICK) -> sandbox.Outcome:
    return check(PRELUDE + code, prompt=PROMPT, test=TEST, entry_point="f", limits=limits)


def assert_held(code: str, count: int, limits: Limits = QUICK) -> sandbox.Outcome:
    """Run the program, and check that it made `count` attempts and that all failed."""
    outcome = run(code + RIGHT, limits)
    assert "ESCAPED" not in outcome.output, outcome
    assert outcome.output.count("held ") == count, outcome
    return outcome
