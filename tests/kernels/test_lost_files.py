"""A mapped file that is truncated ends the command with one line, and the terminal is restored."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem.kernels.native.lost_files import library_path
from tests.helpers import REPO, TINY_STARCHAT

pytestmark = pytest.mark.skipif(library_path() is None, reason="the kernels are not compiled")

# The command, held between loading and the first token until the test has truncated the file.
HELD = """
import sys
from lowmem import session
from lowmem.cli import main
made = session.Session.__init__
def held(self, *args, **options):
    made(self, *args, **options)
    print("loaded", flush=True)
    sys.stdin.buffer.raw.readline()
session.Session.__init__ = held
sys.exit(main(sys.argv[1:]))
"""
ECHO_OFF = """
import mmap, os, sys, termios
from lowmem.kernels.native.lost_files import lost_files_told
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 0)
with lost_files_told("it is gone", 7):
    was = termios.tcgetattr(0)
    termios.tcsetattr(0, termios.TCSANOW, [*was[:3], was[3] & ~termios.ECHO, *was[4:]])
    file.truncate(0)
    mapped[8192]
"""
SENT = """
import os, signal, sys
from lowmem.kernels.native.lost_files import lost_files_told
before = signal.getsignal(signal.SIGBUS)
with lost_files_told("it is gone", 7):
    if len(sys.argv) > 1:
        os.kill(os.getpid(), signal.SIGBUS)
with lost_files_told("again", 7):
    pass
os.kill(os.getpid(), signal.SIGBUS)
"""


@pytest.fixture
def terminal() -> Iterator[int]:
    ours, theirs = pty.openpty()
    yield theirs
    os.close(ours)
    os.close(theirs)


def started(code: str, *arguments: str | Path, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPO,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **{"stdin": subprocess.PIPE, **options},  # type: ignore[call-overload]
    )


def test_weights_that_are_truncated_while_a_model_runs(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY_STARCHAT, folder)
    options = ("--quiet", "--device", "cpu", "--max-new-tokens", "4")
    child = started(HELD, "run", folder, "-p", "def", *options)
    assert child.stdout is not None and child.stdout.readline() == "loaded\n"
    for shard in folder.glob("*.safetensors"):
        os.truncate(shard, 4096)  # in place, so that the mapped pages are lost
    out, err = child.communicate("go on\n", timeout=120)
    assert child.returncode == 2 and out == ""
    last = err.splitlines()[-1]  # after torch's own messages
    assert last.startswith("lowmem run: a file of the model can no longer be read") and err.endswith("\n")
    assert "Traceback" not in err and err.count("lowmem run:") == 1


def test_the_terminal_is_restored(tmp_path: Path, terminal: int) -> None:
    (tmp_path / "weights").write_bytes(bytes(1 << 16))
    child = started(ECHO_OFF, tmp_path / "weights", stdin=terminal)
    _, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (7, "it is gone\n")
    assert termios.tcgetattr(terminal)[3] & termios.ECHO


@pytest.mark.parametrize("inside", [(), ("inside",)])
def test_a_signal_sent_by_a_process_has_its_default_action(inside: tuple[str, ...]) -> None:
    child = started(SENT, *inside)
    _, err = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGBUS and err == ""
