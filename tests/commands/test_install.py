"""The wheel: what it installs, and that no file of the current folder is imported in place of a library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from lowmem.cli import COMMANDS
from lowmem.kernels.native.lost_files import library_path
from tests.helpers import REPO, TINY_STARCHAT

SHADOWS = (
    "convert",
    "bench",
    "benchmarks",
    "random_name",
    "torch",
    "rich",
    "numpy",
    "transformers",
    "psutil",
)
"""Modules in the current folder, each of which ends the process when it is imported."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, with the kernels that are compiled already."""
    work = tmp_path_factory.mktemp("wheel")
    library, lib = library_path(), work / "lib"
    if library is not None:
        (lib / "lowmem/kernels/native").mkdir(parents=True)
        shutil.copy(library, lib / "lowmem/kernels/native")  # newer than its sources: not compiled again
    commands = f"egg_info --egg-base {work} build --build-base {work} --build-lib {lib}"
    commands += f" bdist_wheel --bdist-dir {work / 'bdist'} --dist-dir {work / 'dist'}"
    subprocess.run(
        [sys.executable, "setup.py", "-q", *commands.split()], cwd=REPO, check=True, capture_output=True
    )
    (found,) = (work / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a fresh environment with the wheel; it borrows the dependencies of this one."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    scheme = {"base": str(venv), "platbase": str(venv)}
    scripts, site = (Path(sysconfig.get_path(name, "venv", scheme)) for name in ("scripts", "purelib"))
    (site / "borrowed.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "-q"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return scripts


def test_the_wheel_has_one_package_with_all_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lowmem"}
    assert not [name for name in names if "experiments" in name or "/tests/" in name or "/results/" in name]
    sources = {
        f"lowmem/{package}{path.relative_to(REPO / folder)}"
        for folder, package in (("lowmem", ""), ("convert", "convert/"), ("benchmarks", "benchmarks/"))
        for path in (REPO / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so", ".c", ".h")
    }
    left_out = sources - set(names)
    assert {name for name in left_out if not name.startswith(("lowmem/benchmarks/experiments/",
            "lowmem/benchmarks/results/"))} == set()  # fmt: skip
    for name in ("py.typed", "__init__.pyi", "server/page/index.html", "data/tiny-starchat/config.json"):
        assert f"lowmem/{name}" in names
    assert any(name.startswith("lowmem/benchmarks/report/templates/") for name in names)
    if library_path() is not None:
        assert any(name.startswith("lowmem/kernels/native/_native") for name in names)


@pytest.mark.parametrize("module", [False, True], ids=["lowmem", "python -m lowmem"])
def test_files_in_the_current_folder_are_not_imported(module: bool, installed: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in SHADOWS:
        (hostile / f"{name}.py").write_text(f"raise SystemExit('{name}.py was executed')")
    lowmem = [installed / "python", "-m", "lowmem"] if module else [installed / "lowmem"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LOWMEM_CACHE": str(tmp_path / "cache")}
    tiny = installed.parent / "tiny"
    if not tiny.exists():
        shutil.copytree(TINY_STARCHAT, tiny)
    for words in (
        *([command.name, "--help"] for command in COMMANDS),
        ["list"],
        ["plan", str(tiny)],
        ["doctor", "--quick"],
        ["verify", str(tiny)],
        ["bench", "report", "--help"],
    ):
        done = subprocess.run([*lowmem, *words], cwd=hostile, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "executed" not in done.stdout + done.stderr, (words, done)
        assert done.stdout or done.stderr
