"""lowmem imports, plans, verifies and converts without the modules and functions that Windows lacks."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPO, TINY_STARCHAT

LINUX_ONLY = ("lowmem.benchmarks.experiments", "lowmem.benchmarks.humaneval.lockdown",
              "lowmem.benchmarks.humaneval.sandbox_child")  # fmt: skip
"""The experiments, and the inside of the sandbox; outside of Linux the sandbox says that it needs it."""
_START = "from tests.platform.pretended_windows import install; install()\n"


def run(code: str, folder: Path, timeout: int = 300) -> str:
    """What a Python without POSIX prints, which runs `code` in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPO)!r})\n{_START}{code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def modules() -> list[str]:
    """Every module of lowmem that is installed on all systems."""
    found = []
    for package in ("lowmem", "lowmem.convert", "lowmem.benchmarks"):
        path = __import__(package, fromlist=["x"]).__path__
        found += [one.name for one in pkgutil.walk_packages(path, package + ".", onerror=lambda name: None)]
    skipped = (*LINUX_ONLY, "lowmem.platform.", "lowmem.__main__", "lowmem.kernels.building.backend")
    skipped += ("lowmem.kernels.native._native",)
    return sorted({name for name in found if not name.startswith(skipped) and "__main__" not in name})


def test_every_module_can_be_imported(tmp_path: Path) -> None:
    names = modules()
    assert len(names) > 200 and "lowmem.chat.terminal" in names and "lowmem.convert.job" in names
    lines = [f"import {name}" for name in names]
    run("\n".join(lines), tmp_path)


@pytest.mark.parametrize(
    "words",
    [["plan", str(TINY_STARCHAT)], ["verify", str(TINY_STARCHAT)], ["doctor", "--quick"]],
    ids=lambda words: words[0],
)
def test_commands(words: list[str], tmp_path: Path) -> None:
    code = f"from lowmem.cli import main\nsys.exit(main({words!r}))"
    assert run(code, tmp_path).strip()


def test_a_conversion_locks_replaces_and_cleans_up(tmp_path: Path) -> None:
    words = [
        "convert",
        str(TINY_STARCHAT),
        "out",
        "--bits",
        "8",
        "--plain",
        "--rows",
        "2",
        "--row-length",
        "64",
    ]
    code = f"""
from lowmem.cli import main
assert main({words!r}) == 0
from lowmem.platform import system
locked = system.msvcrt.locked
assert locked and all(place >= 1 << 42 and count == 1 for place, count in locked)
assert main({[*words, "--force"]!r}) == 0
sys.exit(main(["verify", "out"]))
"""
    run(code, tmp_path)
    assert (tmp_path / "out" / "model.safetensors").is_file() or list(
        (tmp_path / "out").glob("*.safetensors")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_check_sees_what_it_forbids(tmp_path: Path) -> None:
    """A module of lowmem that imports `fcntl` fails there."""
    code = """
import types
module = types.ModuleType("lowmem.pretended")
try:
    exec("import fcntl", vars(module))
except ModuleNotFoundError as error:
    print(error)
import fcntl  # others may
"""
    assert "No module named 'fcntl', which lowmem.pretended imports" in run(code, tmp_path)
