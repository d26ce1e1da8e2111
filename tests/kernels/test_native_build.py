"""The kernels are compiled when lowmem is installed; without a compiler the installation succeeds too."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from lowmem.kernels.building.targets import library_name
from lowmem.kernels.native import header
from lowmem.kernels.native import library as native
from tests.helpers import REPO

SOURCES = sorted((REPO / "lowmem" / "kernels" / "csrc").rglob("*.[ch]"))


def setup_py(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=REPO,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def built(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".so", ".dylib", ".pyd")]


@pytest.mark.skipif(not os.environ.get("CI"), reason="a machine without a compiler is supported")
def test_this_installation_has_the_kernels() -> None:
    """Otherwise most tests of the kernels would be skipped silently."""
    assert native.available(), native.why_not()


def test_without_a_compiler_the_installation_goes_on(tmp_path: Path) -> None:
    """It says so; the package then uses torch's own operators."""
    result = setup_py(
        "build_ext",
        "--build-lib",
        str(tmp_path / "lib"),
        "--build-temp",
        str(tmp_path / "o"),
        CC="no-such-cc",
    )
    assert result.returncode == 0, result.stderr
    assert "no-such-cc" in result.stderr + result.stdout
    assert not built(tmp_path)


def test_a_source_distribution_contains_all_sources(tmp_path: Path) -> None:
    result = setup_py("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {str(path.relative_to(REPO)) for path in SOURCES}
    assert len(wanted) > 5 and wanted | {"setup.py", "pyproject.toml"} <= names


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")
def test_every_source_is_compiled_into_one_library_that_works(tmp_path: Path) -> None:
    """Built from scratch: all functions exist, and no symbol is undefined."""
    result = setup_py(
        "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "o"), "--force"
    )
    assert result.returncode == 0, result.stderr
    compiled = {path.stem.replace("-", "/") for path in (tmp_path / "o").rglob("*.o")}
    root = REPO / "lowmem" / "kernels" / "csrc"
    assert compiled == {
        str(path.relative_to(root).with_suffix("")) for path in SOURCES if path.suffix == ".c"
    }
    (library,) = built(tmp_path / "lib")
    assert library.name == library_name()
    loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOW)  # raises for an undefined symbol
    assert all(hasattr(loaded, name) for name in header.FUNCTIONS)
    loaded.lm_isa_name.restype = ctypes.c_char_p
    assert loaded.lm_isa_name()
    # Only the exported functions are visible.
    assert not hasattr(loaded, "lm_isa_selected") and not hasattr(loaded, "lm_barrier")


def test_a_missing_or_different_library_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"no library")
    other = next(iter((Path(torch.__file__).parent / "lib").glob("libtorch_global_deps.*")))
    for path, words in ((None, "not compiled"), (broken, "cannot be used"), (other, "lm_")):
        native._load.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(native, "library_path", lambda path=path: path)
            assert not native.available()
            assert words in native.why_not() and "install a C compiler" in native.why_not()
            assert "\n" not in native.why_not()
            with pytest.raises(RuntimeError, match=words):
                native.library()
    native._load.cache_clear()


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("contract", "widths"),
    [
        (header.CONTRACT, header.WIDTHS),
        (header.CONTRACT - 1, header.WIDTHS),
        (header.CONTRACT, header.WIDTHS[1:]),
    ],
    ids=["same", "contract", "widths"],
)
def test_a_library_of_other_sources_is_refused(
    contract: int, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All functions exist, as after an update without a new installation, but not all is the same."""
    has = " || ".join(f"bits == {bits}" for bits in widths)
    results = dict.fromkeys(header.FUNCTIONS, "0") | {"lm_contract": str(contract), "lm_has_width": has}
    text = "".join(f"int {name}(int bits) {{ return {result}; }}\n" for name, result in results.items())
    (tmp_path / "old.c").write_text(text)
    compiler = shutil.which("cc") or "gcc"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", tmp_path / "_native.so", tmp_path / "old.c"], check=True
    )
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "_native.so")
    native._load.cache_clear()
    try:
        refused = (contract, widths) != (header.CONTRACT, header.WIDTHS)
        assert native.available() != refused
        assert (
            ("another version" in native.why_not()) == ("install lowmem again" in native.why_not()) == refused
        )
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
