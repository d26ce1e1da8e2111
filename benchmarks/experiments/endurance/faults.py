"""A command in a process of its own that meets a fault at a chosen moment. Linux only.

The moment is a file operation of the command: Python's audit events come before something below the trial's
folder is opened, renamed, made or removed. Or it is a CPU time, watched by a timer of the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

STEPS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
BALLAST = ".ballast"
_LIMIT_SECONDS = 300


@dataclass(frozen=True)
class Fault:
    """A fault and its moment."""

    kind: str
    """See `crashes`; "stop" is SIGSTOP."""
    step: int
    """The file operation that the fault comes before, from 1; 0 where `cpu_seconds` is the moment."""
    cpu_seconds: float
    amount: int
    """Bytes that a full disk still has, or that memory may still give."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    """Negative for a signal."""
    said: str
    hit: bool
    """Whether the fault came before its end."""
    steps: int
    """All its file operations; 0 where it was killed. So is `cpu_seconds`."""
    cpu_seconds: float


class Disk:
    """The trial's folder: a disk of its own of `size` bytes, or a plain folder for 0."""

    def __init__(self, root: Path, size: int) -> None:
        self.root, self.size = root, size
        self.below = root.with_name(root.name + ".disk")

    def __enter__(self) -> Disk:
        self.root.mkdir()
        if self.size:
            self.below.mkdir()
            _mount("-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.below))
            _mount("--bind", str(self.below), str(self.root))
        return self

    def mend(self) -> None:
        """Lift the fault: free the disk, or mount it again."""
        if self.size:
            if not os.path.ismount(self.root):
                _mount("--bind", str(self.below), str(self.root))
            with contextlib.suppress(FileNotFoundError):
                (self.root / BALLAST).unlink()

    def __exit__(self, *_: object) -> None:
        if self.size:
            for folder in (self.root, self.below):
                if os.path.ismount(folder):
                    subprocess.run(["umount", "-l", str(folder)], check=True)
            self.below.rmdir()
        shutil.rmtree(self.root)


def marks_of(root: Path) -> Path:
    """Where the stand-in for timing processes leaves a line for each, beside the trial's folder."""
    return root.with_name(root.name + ".marks")


@cache
def can_mount() -> bool:
    """Whether this user may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return done.returncode == 0


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


class Child:
    """One command, and the fault that it will meet, if any."""

    def __init__(self, context: Any, root: Path, fault: Fault | None) -> None:
        self.context, self.root, self.fault = context, root, fault

    def run(self, words: Sequence[str]) -> Outcome:
        """Run `lowmem WORDS` to its end."""
        self.start(words)
        return self.wait()

    def start(self, words: Sequence[str]) -> None:
        """Start `lowmem WORDS`; `wait` must follow."""
        self.folder = Path(tempfile.mkdtemp(prefix="lowmem-fault-"))
        arguments = (list(words), str(self.root), self.fault, str(self.folder))
        self.process = self.context.Process(target=_command, args=arguments)
        self.process.start()

    def stopped(self) -> bool:
        """Wait until it stops at its fault of kind "stop"; False if it ended before."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        while time.monotonic() < deadline and self.process.is_alive():
            if Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
                return True
            time.sleep(0.01)
        return False

    def go_on(self) -> None:
        """Let a stopped one continue."""
        os.kill(self.process.pid, signal.SIGCONT)

    def wait(self) -> Outcome:
        """How it ended."""
        process, folder = self.process, self.folder
        try:
            process.join(_LIMIT_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
                raise AssertionError(f"a command did not end: {self.fault}")
            told: dict[str, Any] = {}
            with contextlib.suppress(OSError, ValueError):
                told = json.loads((folder / "told").read_text())
            said = (folder / "said").read_text(errors="replace") if (folder / "said").exists() else ""
            code = -signal.SIGKILL if process.exitcode == -signal.SIGPROF else int(process.exitcode)
            hit = code == -signal.SIGKILL or (folder / "hit").exists()
            return Outcome(code, said, hit, told.get("steps", 0), told.get("cpu_seconds", 0.0))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _command(words: list[str], root: str, fault: Fault | None, told: str) -> None:
    """In the child: the command, its standard error in a file."""
    handle = os.open(os.path.join(told, "said"), os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ["LOWMEM_CACHE"] = os.path.join(root, "cache")
    if words[:2] == ["bench", "latency"]:
        _replace_times(Path(root))
    from lowmem.cli import main

    steps = _Steps(root, fault, told)
    sys.addaudithook(steps)
    if fault is not None and not fault.step:
        _kill_after(fault.cpu_seconds)
    begun = _cpu_seconds()
    code = main(words)
    steps.over = True
    if fault is None:
        with open(os.path.join(told, "told"), "w") as file:
            json.dump({"steps": steps.count, "cpu_seconds": _cpu_seconds() - begun}, file)
    sys.stdout.flush()
    os._exit(code)


class _Steps:
    """Counts the file operations below a folder, and causes the fault before the chosen one."""

    def __init__(self, root: str, fault: Fault | None, told: str) -> None:
        self.root, self.fault, self.told = root, fault, told
        self.count = 0
        self.over = self.broken = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in STEPS or self.over:
            return
        if not any(isinstance(a, (str, bytes, os.PathLike)) and self._ours(a) for a in args[:2]):
            return
        self.count += 1
        if self.fault is not None and self.count == self.fault.step:
            self.over = True  # our own file operations do not count
            self._happen(self.fault)
            self.over = False
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fsdecode(args[0]))

    def _ours(self, path: str | bytes | os.PathLike[Any]) -> bool:
        return os.fsdecode(path).startswith(self.root)

    def _happen(self, fault: Fault) -> None:
        with open(os.path.join(self.told, "hit"), "w"):
            pass
        if fault.kind in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        elif fault.kind == "full":
            _fill(os.path.join(self.root, BALLAST), fault.amount)
        elif fault.kind == "broken":
            self.broken = True
        elif fault.kind == "gone":
            subprocess.run(["umount", "-l", self.root], check=True)
        elif fault.kind == "memory":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            size = pages * resource.getpagesize() + fault.amount
            resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _fill(file: str, leave: int) -> None:
    """Fill the disk up to `leave` bytes."""
    room = os.statvfs(os.path.dirname(file))
    size = room.f_bavail * room.f_frsize - leave
    with open(file, "wb") as stream:
        if size > 0:
            os.posix_fallocate(stream.fileno(), 0, size)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _kill_after(seconds: float) -> None:
    """Have the kernel kill this process after so much more CPU time; no code of ours runs then."""
    # SIGPROF's default action ends a process as abruptly as SIGKILL.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-6))


def _replace_times(root: Path) -> None:
    """Replace the timing processes: the same figures for all versions, and a mark in a file for each."""
    from lowmem.benchmarks.latency import machine_state
    from lowmem.benchmarks.latency import rounds as latency_rounds
    from lowmem.benchmarks.latency.roofline import Rates
    from lowmem.benchmarks.latency.tasks import DecodeTime, PromptTime, Timings, TimingTask

    def run_task(task: TimingTask, tell: Any) -> Timings | str:
        rates = Rates(1e9, 4e9, 1e10)
        found = Timings(
            1,
            (rates, rates),
            1 << 30,
            "torch",
            1.0,
            tuple(PromptTime(count, count / 100) for count in task.lengths.prompts),
            tuple(
                DecodeTime(count, (0.1,) * (task.lengths.new_tokens - 1), None)
                for count in task.lengths.contexts
            ),
            peak_host_bytes=1 << 29,
        )
        if task.path:
            handle = os.open(marks_of(root), os.O_WRONLY | os.O_APPEND)
            os.write(handle, f"{task.method}\n".encode())
            os.close(handle)
        return found

    def look_before(load_average: float, seconds: float = 0.0) -> machine_state.Before:
        return machine_state.Before((), 0)

    latency_rounds.run_task = run_task
    machine_state.look_before = look_before
