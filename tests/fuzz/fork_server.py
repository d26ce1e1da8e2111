"""Run `lowmem` command lines on hostile folders, each in its own monitored fork with limits.

One process imports torch and transformers and forks for every case. A case then costs milliseconds, even if
it is killed, runs out of memory or exceeds its time. An audit hook records what a fork does: opened files,
names looked up in pickles, started programs, connections.

    python -m tests.fuzz.fork_server      read cases as lines of JSON, write one outcome per line
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.helpers import REPO

MEMORY = 1 << 30
"""Bytes of address space that a case may add to what the imports use."""
SECONDS = 20
"""Limit of CPU time in seconds; a case should take one or two. The limit of wall time is ten times as
long."""
_TEXT = 100_000
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link")
_NEVER = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


@dataclass(frozen=True)
class Outcome:
    """The result of one command line.

    code: the exit code; None if an exception left main (`stderr` has the traceback) or a signal ended it.
    signal: the signal that ended it, or 0. events: forbidden actions, see `_watch`. seconds: its time.
    peak: growth of its resident memory in bytes.
    """

    code: int | None
    signal: int
    stdout: str
    stderr: str
    events: list[str]
    seconds: float
    peak: int


class ForkServer:
    """The process that forks."""

    def __init__(self, home: Path) -> None:
        self.home = home
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "HF_HUB_OFFLINE": "1",
            "LOWMEM_CACHE": str(home / "lowmem"),
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
            "XDG_CACHE_HOME": str(home / "cache"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=home,
        )

    def run(self, arguments: list[str], root: Path) -> Outcome:
        """Run one command line, given without "lowmem". It may write only below `root`, and may not read
        `root`/outside."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([arguments, str(root)]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the fork server has ended"
        return Outcome(**json.loads(line))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def fork_server(home: Path) -> Iterator[ForkServer]:
    """A server whose commands keep their caches below `home`."""
    home.mkdir(parents=True, exist_ok=True)
    server = ForkServer(home)
    try:
        yield server
    finally:
        server.close()


# ---- in the forking process


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _preload()
    for line in sys.stdin:
        arguments, root = json.loads(line)
        print(json.dumps(asdict(_fork(arguments, root))), file=answers, flush=True)


def _preload() -> None:
    import logging

    import torch

    import lowmem.checkpoint.verify.converted
    import lowmem.cli
    import lowmem.loading.opening
    import lowmem.session  # noqa: F401

    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def _fork(arguments: list[str], root: str) -> Outcome:
    with contextlib.ExitStack() as stack:
        out, err, seen = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        begun = time.perf_counter()
        child = os.fork()
        if not child:
            _child(arguments, root, out.fileno(), err.fileno(), seen.fileno())
        _, status, used = os.wait4(child, 0)
        seconds = time.perf_counter() - begun
        texts = []
        for file in (out, err, seen):
            file.seek(0)
            texts.append(file.read(_TEXT).decode("utf-8", "backslashreplace"))
    before, *events = texts[2].splitlines()
    return Outcome(
        code=os.WEXITSTATUS(status) if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 99 else None,
        signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        stdout=texts[0],
        stderr=texts[1],
        events=sorted(set(events)),
        seconds=seconds,
        peak=max((used.ru_maxrss << 10) - int(before), 0),
    )


def _child(arguments: list[str], root: str, out: int, err: int, seen: int) -> None:
    code: Any = 99
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS * 10)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        pages = Path("/proc/self/statm").read_text().split()
        used, resident = (int(count) * resource.getpagesize() for count in pages[:2])
        os.write(seen, b"%d\n" % resident)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _watch(root, seen)
        from lowmem.cli import main

        try:
            code = main(arguments)
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code if type(code) is int else 99)


def _watch(root: str, seen: int) -> None:
    """Write a line to `seen` for each action that no command may take on a hostile folder.

    These are: opening a file in `root`/outside, writing outside of the case's folder and the caches, and
    every event of `_NEVER`. The actions are recorded, not prevented.
    """
    outside = os.path.join(os.path.realpath(root), "outside")
    allowed = (os.path.realpath(root), os.environ["HOME"], tempfile.gettempdir(), "/dev", "/proc/self")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and args[0] == "uname":  # from the standard library's `platform`
            return
        if event in _NEVER:
            note(f"{event} {args!r:.200}")
        elif event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if path.startswith(outside) or (writes and not may_write(path)):
                note(f"{event} {path}")
        elif event in _CHANGES:
            for path in args[:2]:
                if isinstance(path, (str, bytes)):
                    path = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
                    if not may_write(path):
                        note(f"{event} {path}")

    def may_write(path: str) -> bool:
        if path.startswith(outside):
            return False
        return path.startswith(allowed) or "__pycache__" in path

    def note(text: str) -> None:
        os.write(seen, text.replace("\n", " ").encode("utf-8", "backslashreplace") + b"\n")

    sys.addaudithook(hook)


if __name__ == "__main__":
    _serve()
