"""A process to talk with, and the machine that it runs on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from lowmem.platform import system

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, for experiments that run from one."""


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
            env=environment_with(environment),
            cwd=log.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            **system.NEW_GROUP,
        )
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it ended before it read; the exit code says why
                process.stdin.write(message)
                process.stdin.close()
            for line in process.stdout:
                hear(line)
            system.wait_ended(process)
        finally:
            system.kill_group(process)
            code = process.wait()
        return code


def environment_with(added: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `added`."""
    # GPTQModel's own default, but at least two workers: it cannot load with one.
    workers = str(max(2, ((os.cpu_count() or 1) + 1) // 2))
    return {"GPTQMODEL_CPU_WORKERS": workers, **os.environ, **added}


def hardware() -> dict[str, Any]:
    """Describe the processor, its cores and the memory."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    flags = system.processor_flags()
    return {
        "cpu": system.processor_name(),
        "flags": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
