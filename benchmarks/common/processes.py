"""Processes that are measured, and the machine that they run on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, for experiments that run from one."""
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
    own = _environment(environment or {})
    own["CUDA_VISIBLE_DEVICES"] = ""  # figures are of the CPU on machines with a card, too
    load, peak, anonymous = os.getloadavg()[0], 0, 0
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


def converse(
    module: str, message: str, hear: Callable[[str], None], log: Path, environment: dict[str, str]
) -> int:
    """Run `python -m module` with `message` on standard input. Returns its exit code, negative for a signal.

    hear: called with each line of its standard output. log: for its standard error. environment: added to
    this process's. The process runs in the folder of `log`, so modules in the user's folder are not imported.
    It leads a process group that Ctrl-C in the terminal does not reach; the group is killed when its leader
    ends, and on any exception here, KeyboardInterrupt included.
    """
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=_environment(environment),
            cwd=log.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it ended before it read; the exit code says why
                process.stdin.write(message)
                process.stdin.close()
            for line in process.stdout:
                hear(line)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # keeps its id reserved until the kill
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        return code


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `added`."""
    # GPTQModel's own default, but at least two workers: it cannot load with one.
    workers = str(max(2, ((os.cpu_count() or 1) + 1) // 2))
    return {"GPTQMODEL_CPU_WORKERS": workers, **os.environ, **added}


def resident(pid: int) -> dict[str, int]:
    """Read the memory lines of /proc/PID/status, in bytes; empty if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in fields}


def hardware() -> dict[str, Any]:
    """Describe the processor, its cores and the memory."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", "?"),
        "flags": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "memory_bytes": total,
    }
