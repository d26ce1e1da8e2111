"""`lowmem` command lines on hostile folders, each in a fork of its own, watched and limited.

A process imports torch and transformers once and forks for every case, so a case costs milliseconds although
it may be killed, run out of memory or be cut off. What a fork does is watched by an audit hook: files opened,
names looked up in pickles, programs started, connections made.

    python -m tests.fuzz.fork_server      reads cases as lines of JSON, writes an outcome a line
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
"""Bytes of address space that a case may take beyond what the imports have taken."""
SECONDS = 20
"""Of processor time until a case is cut off; what is expected is one or two. Ten times that by the clock."""
_TEXT = 100_000
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link")
_NEVER = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


@dataclass(frozen=True)
class Outcome:
    """What became of one command line.

    code: its exit code; None where an exception left main (`stderr` has the traceback) or a signal ended it.
    signal: that ended it, or 0. events: what it did that no command may: see `_watch`. seconds, peak: time,
    and bytes that its resident memory grew by.
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
        """One command line, without the word lowmem; it may write below `root` only, and read nothing in
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
    """A server whose commands have their caches below `home`."""
    home.mkdir(parents=True, exist_ok=True)
    server = ForkServer(home)
    try:
        yield server
    finally:
        server.close()


# ---- in the process that forks


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
    """Note what no command may do to a hostile folder: a line of `seen` each.

    That is: to open a file in `root`/outside, to write where neither the case nor a cache lies, and every
    event of `_NEVER`. (Nothing of it is prevented.)
    """
    outside = os.path.join(os.path.realpath(root), "outside")
    allowed = (os.path.realpath(root), os.environ["HOME"], tempfile.gettempdir(), "/dev", "/proc/self")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and args[0] == "uname":  # the standard library's own, in `platform`
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
