"""Run generated code in a sandbox, and decide outside of its reach whether it solves a problem.

Each check starts two bare interpreters (`python -I -S`). Both lock themselves down (`lockdown`) before they
run anything. One runs the answer. The other runs the problem's tests, which call the answer's function
through pipes (`sandbox_child`). This process only waits, counts and kills.

- Processes: no process or thread can be started, and no signal, ptrace or socket can be used. Nothing
  survives the interpreter.
- Files: the standard library and shared libraries can be read; a temporary folder without sub-folders can be
  written. Where namespaces are available the folder is a file system of limited size; elsewhere it is
  watched, and the program is killed soon after it has written too much. Names and sizes of other files can
  be queried (stat), their contents cannot.
- Verdict: an answer passes only if the process with the tests says so; its exit code and output do not count.
  Only plain data crosses the pipes (numbers, text, containers), so an object with its own `==` cannot decide
  a test, and tests do not see arguments that an answer changes in place.
- Not covered: exploits of the kernel, and timing of caches.
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
from typing import IO, Any, Literal

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
"""Imports the child from its folder under stub packages: a bare interpreter has no site-packages."""
_TICK = 0.05
"""Seconds between two checks of the folder's size."""
_MOST_FILES = 256
_NAMESPACES = True
"""Whether to use namespaces where the system allows them; they are a second wall, not a required one."""


class SandboxError(LowmemError):
    """Generated code cannot be sandboxed on this machine."""


@dataclass(frozen=True)
class Limits:
    """Limits of one check."""

    seconds: float = 15.0
    """Wall-clock time of both processes together."""
    cpu_seconds: int = 5
    """CPU time of each process."""
    memory_bytes: int = 1 << 30
    """Address space of each process."""
    file_bytes: int = 16 << 20
    """Size of the folder's contents."""
    output_bytes: int = 64 << 10
    """Printed output that is kept; the rest is dropped."""


@dataclass(frozen=True)
class Outcome:
    """How a check ended."""

    kind: Kind
    detail: str
    """The reason in one line; "" if it passed."""
    output: str
    """What the answer printed."""


@dataclass(frozen=True)
class Capabilities:
    """What the sandbox holds on this machine, tried by a program inside it."""

    namespaces: bool = False
    own_filesystem: bool = False
    landlock: int = 0
    """Landlock's ABI; 0 without Landlock."""
    network: bool = False
    """Whether the network is out of reach; the same for the next three."""
    files: bool = False
    processes: bool = False
    signals: bool = False
    reason: str = ""
    """Why no code may be run; "" if it may."""

    @property
    def enough(self) -> bool:
        """Whether generated code may be run."""
        return not self.reason and self.network and self.files and self.processes and self.signals

    def describe(self) -> str:
        """One line."""
        if not self.enough:
            return self.reason
        extra = ", network and mounts of its own" if self.own_filesystem else ""
        return f"seccomp, Landlock ABI {self.landlock}{extra}, no new processes, limits"


def _needs_linux() -> str:
    return f"the sandbox needs Linux, and this is {sys.platform}"


@functools.cache
def capabilities() -> Capabilities:
    """Run a program in the sandbox that attempts each forbidden action."""
    if sys.platform != "linux":
        return Capabilities(reason=_needs_linux())
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
            reason = reply.get("detail") or f"a sandboxed program {child.ending()}: {_line(child.said)}"
            return Capabilities(reason=reason)
        held = reply["held"]
        held["files"] = held["files"] and other.read_text() == "untouched"
        open_walls = ", ".join(name for name, closed in held.items() if not closed)
        return Capabilities(
            namespaces=reply["namespaces"],
            own_filesystem=reply["own_filesystem"],
            landlock=reply["landlock"],
            **held,
            reason=f"a sandboxed program can still reach: {open_walls}" if open_walls else "",
        )


def require() -> Capabilities:
    """Return the sandbox's capabilities on this machine. Raises SandboxError if they do not suffice."""
    found = capabilities()
    if not found.enough:
        raise SandboxError(
            f"generated code cannot be sandboxed here, so it is not run: {found.reason}",
            "Use Linux 5.13 or newer with Landlock and seccomp, on x86_64 or aarch64",
        )
    return found


def check(program: str, *, prompt: str, test: str, entry_point: str, limits: Limits | None = None) -> Outcome:
    """Run an untrusted program and test its function.

    program: defines the function `entry_point`. test: trusted Python that defines check(candidate). prompt:
    trusted, too; the tests may use its helper functions. No process survives the call, and nothing is left on
    disk. The kind is "refused" if the sandbox cannot be built; then nothing was run.
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
    """The outcome. verdict: the line written by the tests. late: why both processes were killed, or ""."""
    output = answer.said.decode("utf-8", errors="replace")
    if late:
        return Outcome("timeout" if "seconds" in late else "failed", late, output)
    reply = json.loads(verdict) if verdict.endswith(b"\n") else {}
    kind, detail = reply.get("kind"), _line(str(reply.get("detail", "")))
    if kind == "passed":
        return Outcome("passed", "", output)
    if kind == "refused" or answer.code == 3:
        return Outcome("refused", detail if kind == "refused" else "the sandbox could not be built", output)
    if answer.out_of_time or tests.out_of_time:
        return Outcome("timeout", f"took more than {limits.cpu_seconds} seconds of CPU time", output)
    if kind is None:
        return Outcome("failed", f"the process with the tests {tests.ending()}", output)
    if detail.startswith("the program ended"):
        detail = f"the program {answer.ending()} before the tests finished"
    return Outcome("memory" if kind == "memory" else "failed", detail, output)


class _Child:
    """One sandboxed interpreter."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def __init__(
        self, job: dict[str, str], folder: Path | None, limits: Limits, ends: Mapping[str, FileIO]
    ) -> None:
        """job: what it does. folder: that it may write to. ends: of its pipes, by name; closed here."""
        place = str(folder or "/")
        environment = {"HOME": place, "TMPDIR": place, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
        if "LD_LIBRARY_PATH" in os.environ:  # the interpreter itself may need it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.said = b""
        self.code: int | None = None
        self.out_of_time = False
        self._limits = limits
        if sys.platform != "linux":
            raise SandboxError(_needs_linux())
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _START.format(folder=str(_FOLDER))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=place,
            env=environment,
            pass_fds=[end.fileno() for end in ends.values()],
            start_new_session=True,  # Ctrl-C is for the parent alone
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
        except BrokenPipeError:  # it ended at once; its output says why
            pass

    def read(self) -> bool:
        """Read its output, of which the first output_bytes are kept; False at the end."""
        data = os.read(self.output.fileno(), 1 << 16)
        self.said += data[: max(0, self._limits.output_bytes - len(self.said))]
        return bool(data)

    def kill(self) -> None:
        """Kill it and its process group if it has not ended, and read the rest of its output."""
        if sys.platform != "linux":
            raise SandboxError(_needs_linux())
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
        except BlockingIOError:  # no other process can hold the pipe open; do not wait in any case
            pass
        self.output.close()

    def ending(self) -> str:
        """How it ended, after `kill`."""
        code = self.code or 0
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"


def _wait(
    children: Sequence[_Child], report: FileIO, folder: Path, limits: Limits, deadline: float
) -> tuple[bytes, str]:
    """Wait for the verdict and drain outputs: (its line, why waiting ended early or "")."""
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
    """Whether the folder holds too much; not needed if it is a file system of limited size."""
    if sys.platform != "linux":
        raise SandboxError(_needs_linux())
    total = 0
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries, 1):
            try:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
            except OSError:  # removed meanwhile
                continue
            if total > most or count > _MOST_FILES:
                return True
    return False


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder for one program, removed with all its contents."""
    folder = Path(tempfile.mkdtemp(prefix="lowmem-sandbox-"))
    try:
        yield folder
    finally:
        os.chmod(folder, 0o700)
        shutil.rmtree(folder)


@contextmanager
def _pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """(read end, write end) of a pipe, closed at the end."""
    read, write = os.pipe()
    with FileIO(read, "rb") as source, FileIO(write, "wb") as sink:
        yield source, sink


def _line(text: str | bytes) -> str:
    """Untrusted text as one printable line."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    last = (text.strip().splitlines() or [""])[-1]
    return "".join(c if c.isprintable() else "?" for c in last)[:200]
