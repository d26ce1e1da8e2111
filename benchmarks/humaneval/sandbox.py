"""Generated code, run where it can do no harm; whether it solves a problem is decided out of its reach.

Each check starts two bare interpreters (`python -I -S`), both walled in by
`lowmem.benchmarks.humaneval.lockdown` before they run anything: one runs the answer, the other the problem's
tests, which call the answer's function through pipes (`lowmem.benchmarks.humaneval.sandbox_child`). This
process only waits, counts and kills. What stands, and what does not:

- No process or thread can be started, so there is nothing but the process itself to kill, and nothing
  survives it; no signal, no ptrace, no socket of any kind.
- Files: read where Python's standard library and shared libraries lie; written in a temporary folder without
  sub-folders. That folder is a file system of limited size where namespaces are to be had; elsewhere it is
  watched, and the program is killed soon after it has written too much. Names and sizes of other files can
  be asked for (stat), their contents cannot.
- An answer passes only if the tests' own process says so: neither exit code nor output counts. It hands over
  plain data (numbers, text, containers); an object with an `==` of its own does not get to judge, and a test
  does not see arguments that an answer changes in place.
- The kernel is trusted. Code that exploits a hole in it, or times its caches, is not contained.
"""

from __future__ import annotations

import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from lowmem.errors import LowmemError

Kind = Literal["passed", "failed", "timeout", "memory", "refused"]
_FOLDER = Path(__file__).resolve().parent
_START = """\
import sys, types
for name in ("lowmem", "lowmem.benchmarks", "lowmem.benchmarks.humaneval"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{folder!r}] if name.endswith("humaneval") else []
from lowmem.benchmarks.humaneval import sandbox_child
sandbox_child.main()
"""
"""Imports the child from its folder: a bare interpreter has neither site-packages nor an editable install."""
_TICK = 0.05
"""Seconds between two looks at the folder, where a program may write too much."""
_MOST_FILES = 256
_NAMESPACES = True
"""Whether namespaces are asked for; not on all systems are they lent, and what is contained is the same."""


class SandboxError(LowmemError):
    """Generated code cannot be contained on this machine, or was not asked to be run."""


@dataclass(frozen=True)
class Limits:
    """What a check may take. seconds: of wall-clock time, both processes together; cpu_seconds: of each.
    memory_bytes: address space of each. file_bytes: what may lie in the folder. output_bytes: of what is
    printed, the first that are kept."""

    seconds: float = 15.0
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    output_bytes: int = 64 << 10


@dataclass(frozen=True)
class Outcome:
    """How a check ended. detail: why, in one line ("" if it passed). output: what the answer printed."""

    kind: Kind
    detail: str
    output: str


@dataclass(frozen=True)
class Capabilities:
    """What holds here, tried by a program that was locked in. landlock: its ABI, 0 if there is none.
    network, files, processes, signals: out of reach. reason: why nothing can be run, "" where it can."""

    namespaces: bool = False
    own_filesystem: bool = False
    landlock: int = 0
    network: bool = False
    files: bool = False
    processes: bool = False
    signals: bool = False
    reason: str = ""

    @property
    def enough(self) -> bool:
        """Whether generated code may be run."""
        return not self.reason and self.network and self.files and self.processes and self.signals

    def describe(self) -> str:
        """The walls in one line."""
        if not self.enough:
            return self.reason
        extra = ", network and mounts of its own" if self.own_filesystem else ""
        return f"seccomp, Landlock ABI {self.landlock}{extra}, no new processes, limits"


@functools.cache
def capabilities() -> Capabilities:
    """Lock a program in, have it try what it must not, and tell what held."""
    if sys.platform != "linux":
        return Capabilities(reason=f"there is no sandbox for {sys.platform}, only for Linux")
    with tempfile.TemporaryDirectory(prefix="lowmem-probe-") as outside, _folder() as folder:
        other = Path(outside) / "other"
        other.write_text("untouched")
        limits = Limits()
        with _pipe() as report:
            child = _Child({"role": "probe", "other": str(other)}, folder, limits, {"report": report[1]})
            try:
                deadline = time.monotonic() + limits.seconds
                line, _ = _wait([child], report[0], folder, limits, deadline)
            finally:
                child.kill()
        reply = json.loads(line) if line.endswith(b"\n") else {}
        if reply.get("kind") != "probed":
            reason = reply.get("detail") or f"a locked-in program {child.ending()}: {_line(child.said)}"
            return Capabilities(reason=reason)
        held = reply["held"]
        held["files"] = held["files"] and other.read_text() == "untouched"
        open_walls = ", ".join(name for name, closed in held.items() if not closed)
        return Capabilities(
            namespaces=reply["namespaces"],
            own_filesystem=reply["own_filesystem"],
            landlock=reply["landlock"],
            **held,
            reason=f"a locked-in program still reaches: {open_walls}" if open_walls else "",
        )


def require() -> Capabilities:
    """The capabilities here; SandboxError in one line where they are not enough to run anything."""
    found = capabilities()
    if not found.enough:
        raise SandboxError(
            f"generated code cannot be contained here, so it is not run: {found.reason}",
            "Use Linux 5.13 or newer with Landlock and seccomp, on x86_64 or aarch64",
        )
    return found


def check(program: str, *, prompt: str, test: str, entry_point: str, limits: Limits | None = None) -> Outcome:
    """Run `program`, which nobody trusts, and tell whether its function passes.

    program: defines the function `entry_point`. test: Python that defines check(candidate) and is trusted, as
    `prompt` is, whose helper functions the tests may use. Nothing outlives the call, and nothing is left on
    disk. The kind is "refused" where the walls cannot be built; then nothing was run.
    """
    limits = limits or Limits()
    if sys.platform != "linux":
        return Outcome("refused", capabilities().reason, "")
    deadline = time.monotonic() + limits.seconds
    about_answer = {"role": "answer", "program": program, "entry_point": entry_point}
    about_tests = {"role": "tests", "prompt": prompt, "test": test, "entry_point": entry_point}
    children: list[_Child] = []
    with _folder() as folder, _pipe() as calls, _pipe() as results, _pipe() as report:
        try:
            ends = {"calls": calls[0], "results": results[1]}
            children.append(_Child(about_answer, folder, limits, ends))
            ends = {"calls": calls[1], "results": results[0], "report": report[1]}
            children.append(_Child(about_tests, None, limits, ends))
            verdict, late = _wait(children, report[0], folder, limits, deadline)
        finally:
            for child in children:
                child.kill()
    return _judge(verdict, late, children[0], children[1], limits)


def _judge(verdict: bytes, late: str, answer: _Child, tests: _Child, limits: Limits) -> Outcome:
    """The outcome. verdict: the line that the tests' process wrote. late: why they were killed, or ""."""
    output = answer.said.decode("utf-8", errors="replace")
    if late:
        return Outcome("timeout" if "seconds" in late else "failed", late, output)
    reply = json.loads(verdict) if verdict.endswith(b"\n") else {}
    kind, detail = reply.get("kind"), _line(str(reply.get("detail", "")))
    if kind == "passed":
        return Outcome("passed", "", output)
    if kind == "refused" or answer.code == 3:
        return Outcome("refused", detail if kind == "refused" else "the walls could not be built", output)
    if answer.out_of_time or tests.out_of_time:
        return Outcome("timeout", f"took more than {limits.cpu_seconds} seconds of CPU time", output)
    if kind is None:
        return Outcome("failed", f"the tests' process {tests.ending()}", output)
    if detail.startswith("the program ended"):
        detail = f"the program {answer.ending()} before the tests were through"
    return Outcome("memory" if kind == "memory" else "failed", detail, output)


class _Child:
    """One locked-in interpreter."""

    def __init__(
        self, job: dict[str, str], folder: Path | None, limits: Limits, ends: Mapping[str, FileIO]
    ) -> None:
        """job: what to do. folder: where it may write. ends: of pipes, by what they are for; closed here."""
        place = str(folder or "/")
        environment = {"HOME": place, "TMPDIR": place, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
        if "LD_LIBRARY_PATH" in os.environ:  # or the interpreter itself might not start
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.said = b""
        self.code: int | None = None
        self.out_of_time = False
        self._limits = limits
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _START.format(folder=str(_FOLDER))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=place,
            env=environment,
            pass_fds=[end.fileno() for end in ends.values()],
            start_new_session=True,  # Ctrl-C is for this process alone
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.output = self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        whole: dict[str, Any] = {
            **asdict(limits),
            **job,
            **{name: end.fileno() for name, end in ends.items()},
            "folder": str(folder) if folder else None,
            "parent": os.getpid(),
            "namespaces": _NAMESPACES,
        }
        for end in ends.values():
            end.close()
        try:
            self.process.stdin.write(json.dumps(whole).encode())
            self.process.stdin.close()
        except BrokenPipeError:  # it died at once: what it said tells why
            pass

    def read(self) -> bool:
        """Take what it has printed, the first of it kept; False at its end."""
        data = os.read(self.output.fileno(), 1 << 16)
        self.said += data[: max(0, self._limits.output_bytes - len(self.said))]
        return bool(data)

    def kill(self) -> None:
        """End it, if it has not ended, and all that it might have started; take its last words."""
        if self.code is not None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        _, status, usage = os.wait4(self.process.pid, 0)
        self.code = self.process.returncode = os.waitstatus_to_exitcode(status)
        spent = usage.ru_utime + usage.ru_stime
        self.out_of_time = self.code == -signal.SIGKILL and spent > self._limits.cpu_seconds - 0.2
        try:
            while self.read():
                pass
        except BlockingIOError:  # nobody can hold the other end, but that would not be waited for
            pass
        self.output.close()

    def ending(self) -> str:
        """How it ended, after `kill`."""
        code = self.code or 0
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"


def _wait(
    children: Sequence[_Child], report: FileIO, folder: Path, limits: Limits, deadline: float
) -> tuple[bytes, str]:
    """(the line of the verdict, why it was not waited for any longer), while outputs are drained."""
    verdict, look = b"", 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(report, selectors.EVENT_READ)
        for child in children:
            selector.register(child.output, selectors.EVENT_READ, child)
        while True:
            now = time.monotonic()
            left = deadline - now
            if left <= 0:
                return verdict, f"took more than {limits.seconds:g} seconds"
            for key, _ in selector.select(min(left, _TICK)):
                if key.data is not None:
                    if not key.data.read():
                        selector.unregister(key.fileobj)
                    continue
                data = os.read(report.fileno(), 1 << 16)
                verdict += data
                if not data or data.endswith(b"\n"):
                    return verdict, ""
            if now < look:
                continue
            look = now + _TICK
            if _too_much(folder, limits.file_bytes):
                return verdict, f"wrote more than {limits.file_bytes >> 20} MiB to its folder"


def _too_much(folder: Path, most: int) -> bool:
    """Whether more lies in the folder than may; never, where it is the program's own file system."""
    total = 0
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries, 1):
            try:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
            except OSError:  # gone meanwhile
                continue
            if total > most or count > _MOST_FILES:
                return True
    return False


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder for one program, removed whatever it left there."""
    folder = Path(tempfile.mkdtemp(prefix="lowmem-sandbox-"))
    try:
        yield folder
    finally:
        os.chmod(folder, 0o700)
        shutil.rmtree(folder)


@contextmanager
def _pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """The read end and the write end of a pipe, closed in the end where they are not yet."""
    read, write = os.pipe()
    with FileIO(read, "rb") as source, FileIO(write, "wb") as sink:
        yield source, sink


def _line(text: str | bytes) -> str:
    """Untrusted text as one printable line."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    last = (text.strip().splitlines() or [""])[-1]
    return "".join(c if c.isprintable() else "?" for c in last)[:200]
