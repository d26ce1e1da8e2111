"""Ask whether every dependency of lowmem has a wheel on every system and Python that README names.

    python -m tests.compat.dependencies                 all of them
    python -m tests.compat.dependencies windows 3.14    one system, or one Python

Needs `uv` (pip install uv), which resolves for other systems than its own, and a package index. GPTQModel and
some that it needs publish no wheels: it is a dependency on Linux with x86-64 alone, where pip builds them
from source, and it is left out here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence

from tests.helpers import REPO

SYSTEMS = {
    "linux-x86_64": "x86_64-manylinux_2_31",
    "linux-aarch64": "aarch64-manylinux_2_31",
    "macos-arm64": "aarch64-apple-darwin",
    "windows-x86_64": "x86_64-pc-windows-msvc",
}
"""uv's names. manylinux_2_31 is llguidance's, glibc of Debian 11 and Ubuntu 20.04."""
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACOS = "14.0"
"""What bitsandbytes and PyTorch are built for."""
FROM_SOURCE = "gptqmodel"


def uv() -> str | None:
    """The path of uv, or None."""
    return shutil.which("uv") or shutil.which("uv", path=os.path.dirname(sys.executable))


def wanted() -> list[str]:
    """lowmem's dependencies, as pyproject.toml has them, without those that pip builds from source."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    return [line for line in project["dependencies"] if not line.startswith(FROM_SOURCE)]


def for_system(system: str, python: str) -> list[str]:
    """uv's options that choose wheels for a system of SYSTEMS and a Python."""
    return ["--python-platform", SYSTEMS[system], "--python-version", python, "--only-binary", ":all:"]


def refusal(system: str, python: str) -> str:
    """Why the dependencies cannot be resolved to wheels; "" if they can."""
    command = [uv() or "uv", "pip", "compile", "--quiet", "-", "--no-header", "--no-annotate"]
    command += for_system(system, python)
    environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": MACOS}
    done = subprocess.run(command, input="\n".join(wanted()), env=environment, capture_output=True, text=True)
    return "" if done.returncode == 0 and "torch==" in done.stdout else done.stderr.strip() or "no answer"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each system and Python; the exit code is 1 if one is refused."""
    words = list(sys.argv[1:] if argv is None else argv)
    if uv() is None:
        print("uv is missing: pip install uv", file=sys.stderr)
        return 2
    refused = 0
    for system in SYSTEMS:
        for python in PYTHONS:
            if any(word not in f"{system} {python}" for word in words):
                continue
            why = refusal(system, python)
            refused += bool(why)
            print(f"{system:<15} Python {python:<5} {'no: ' + why if why else 'wheels'}", flush=True)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
