"""Commands whose time and memory are measured, on Linux."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem.benchmarks.common.processes import environment_with

from lowmem.platform import system

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Usage:
    """Time and memory of a process."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Peak resident memory, mapped files included."""
    peak_anonymous_bytes: int
    """Peak of the part that no file backs and that Linux cannot drop, sampled."""
    load_average_before: float


def run_process(command: Sequence[str], log: Path) -> Usage:
    """Run a command with its output in `log`, and measure its memory. Raises SystemExit if the command
    fails.
    """
    usage, code = attempt(command, log)
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise SystemExit(f"{' '.join(command[1:4])} … failed with exit code {code}:\n{tail}")
    return usage


def attempt(
    command: Sequence[str],
    log: Path,
    *,
    errors: Path | None = None,
    environment: Mapping[str, str] | None = None,
    sample: Callable[[], None] | None = None,
) -> tuple[Usage, int]:
    """Run a command in the folder of `log` and measure its memory.

    Returns (usage, exit code); a negative exit code is a signal number.

    log: for its output, and its standard error if `errors` is None. environment: added to this process's.
    sample: called every SAMPLE_SECONDS.
    """
    own = environment_with(environment or {})
    own["CUDA_VISIBLE_DEVICES"] = ""  # figures are of the CPU on machines with a card, too
    load, peak, anonymous = system.load_average(), 0, 0
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        other = stack.enter_context(errors.open("wb")) if errors else subprocess.STDOUT
        process = subprocess.Popen(command, cwd=log.parent, env=own, stdout=output, stderr=other)
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                memory = resident(process.pid)
                peak = max(peak, memory.get("VmHWM", 0))
                anonymous = max(anonymous, memory.get("RssAnon", 0))
                if sample:
                    sample()
                time.sleep(SAMPLE_SECONDS)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    cpu = usage.ru_utime + usage.ru_stime
    # ru_maxrss includes this process's own memory at the fork, so the high-water mark is preferred.
    found = Usage(round(wall, 2), round(cpu, 2), peak or usage.ru_maxrss * 1024, anonymous, round(load, 2))
    return found, process.returncode


def resident(pid: int) -> dict[str, int]:
    """Read the memory lines of /proc/PID/status, in bytes; empty if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in fields}
