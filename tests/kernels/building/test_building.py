"""Which compiler builds the library, what zig is asked for, and what a wheel must be like."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lowmem.kernels.building import backend, compilers, wheels
from lowmem.kernels.building.compilers import BuildError, compile_library, compiler
from lowmem.kernels.building.targets import FLAGS, TARGETS, Target, asked_for, library_name
from lowmem.kernels.native.lost_files import library_path
from tests.helpers import REPO

needs_zig = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None and not os.environ.get("CI"), reason="no ziglang"
)


def without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which neither Python's own compiler nor any other is found."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compilers.shutil, "which", lambda name, **_: None)
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)


def test_the_variable_cc_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "clang --driver-mode=gcc")
    assert compiler(None) == ["clang", "--driver-mode=gcc"]


def test_zig_is_used_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compilers(monkeypatch)
    with pytest.raises(BuildError, match="install gcc or clang, or pip install ziglang"):
        compiler(None)
    with pytest.raises(BuildError, match="pip install ziglang"):
        compiler(TARGETS["macos-arm64"])
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: name == "ziglang")
    assert compiler(None) == [sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"]
    assert compiler(TARGETS["macos-arm64"])[-2:] == ["-target", "aarch64-macos.11.0"]


@pytest.mark.parametrize(
    ("system", "processor", "wanted"),
    [
        ("linux", "x86_64", True),
        ("linux", "aarch64", True),
        ("win32", "AMD64", True),
        ("darwin", "arm64", True),
        ("linux", "riscv64", False),
        ("freebsd14", "amd64", False),
    ],
)
def test_pip_fetches_zig_where_it_exists_and_no_compiler_does(
    system: str, processor: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOWMEM_TARGET", raising=False)
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda settings: ["setuptools"])
    monkeypatch.setattr(backend.sys, "platform", system)
    monkeypatch.setattr(backend.platform, "machine", lambda: processor)
    monkeypatch.setattr(backend, "own_compiler", lambda: None)
    assert backend.get_requires_for_build_wheel() == ["setuptools", *["ziglang>=0.17"] * wanted]
    monkeypatch.setattr(backend, "own_compiler", lambda: ["gcc"])
    assert backend.get_requires_for_build_wheel() == ["setuptools"]


def test_an_unknown_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_TARGET", "linux-riscv64")
    with pytest.raises(SystemExit, match=r"LOWMEM_TARGET=linux-riscv64 is not one of linux-x86_64, "):
        asked_for()
    monkeypatch.setenv("LOWMEM_TARGET", "")
    assert asked_for() is None


def test_each_system_has_its_own_name_of_the_library() -> None:
    assert [library_name(name) for name in ("linux", "darwin", "win32")] == [
        "_native.so",
        "_native.dylib",
        "_native.dll",
    ]
    assert {target.library for target in TARGETS.values()} == {"_native.so", "_native.dylib", "_native.dll"}


def pretended_wheel(
    folder: Path, target: Target, *, tag: str = "", library: bytes = b"", names: tuple[str, ...] = ()
) -> Path:
    """A wheel as `target` wants it, apart from what is given."""
    path = folder / f"lowmem-0.1.0-py3-none-{target.tag}.whl"
    header = {
        "linux-x86_64": b"\x7fELF\x02\x01" + bytes(12) + b"\x3e\x00",
        "linux-aarch64": b"\x7fELF\x02\x01" + bytes(12) + b"\xb7\x00",
        "macos-arm64": b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01",
        "macos-x86_64": b"\xcf\xfa\xed\xfe\x07\x00\x00\x01",
        "windows-x86_64": b"MZ" + bytes(58) + b"\x80\x00\x00\x00" + bytes(64) + b"PE\x00\x00\x64\x86",
    }[target.name]
    with zipfile.ZipFile(path, "w") as archive:
        for name in names or (f"lowmem/kernels/native/{target.library}",):
            archive.writestr(name, library or header)
        archive.writestr(
            "lowmem-0.1.0.dist-info/WHEEL",
            f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag or f'py3-none-{target.tag}'}\n",
        )
    return path


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_wrong_wheel_is_found(target: Target, tmp_path: Path) -> None:
    assert wheels.fault(pretended_wheel(tmp_path, target), target) == ""
    other = next(one for one in TARGETS.values() if one is not target)
    assert "it is named" in wheels.fault(pretended_wheel(tmp_path, target), other)
    assert "describes itself" in wheels.fault(pretended_wheel(tmp_path, target, tag="py3-none-any"), target)
    assert "another system" in wheels.fault(pretended_wheel(tmp_path, target, library=b"\x7fELF"), target)
    for names in (("lowmem/__init__.py",), ("lowmem/_native.so", f"lowmem/kernels/native/{target.library}")):
        assert "its libraries are" in wheels.fault(pretended_wheel(tmp_path, target, names=names), target)


def test_the_command_names_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["dist", "solaris"]):
        assert wheels.main(words) == 2
        assert "linux-aarch64" in capsys.readouterr().err


@needs_zig
@pytest.mark.slow
def test_five_wheels_from_one_machine(tmp_path: Path) -> None:
    """`wheels.fault` checks each; a machine without a compiler installs this one's and uses its kernels."""
    assert wheels.main([str(tmp_path)]) == 0
    made = sorted(path.name for path in tmp_path.glob("*.whl"))
    assert len(made) == len(TARGETS) == 5
    (own,) = tmp_path.glob("*manylinux*x86_64.whl")
    with zipfile.ZipFile(own) as archive:
        archive.extractall(tmp_path / "installed")
    library = ctypes.CDLL(str(tmp_path / "installed" / wheels.FOLDER / "_native.so"))
    library.lm_isa_name.restype = ctypes.c_char_p
    assert library.lm_isa_name()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "system", "words"),
    [
        ("auditwheel", "linux-x86_64", "manylinux_2_17_x86_64"),
        ("auditwheel", "linux-aarch64", "manylinux_2_17_aarch64"),
        ("delvewheel", "windows-x86_64", "None"),
    ],
)
def test_tools_of_others_find_nothing_to_repair(tool: str, system: str, words: str, tmp_path: Path) -> None:
    """auditwheel names the oldest system that a wheel runs on; delvewheel the libraries that it would add."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"no {tool}")
    wheel = wheels.build(TARGETS[system], tmp_path)
    done = subprocess.run([sys.executable, "-m", tool, "show", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
def test_objects_are_kept_until_a_source_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "csrc"
    (sources / "room").mkdir(parents=True)
    (sources / "one.c").write_text("int one(void) { return 1; }\n")
    (sources / "room/two.c").write_text('#include "two.h"\nint two(void) { return TWO; }\n')
    (sources / "two.h").write_text("#define TWO 2\n")
    monkeypatch.setattr(compilers, "SOURCES", sources)
    library, objects = tmp_path / "library.so", tmp_path / "o"
    compile_library(library, objects)
    made = {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}
    assert set(made) == {"one.o", "room-two.o"}
    os.utime(sources / "one.c", ns=(made["one.o"] + 10**9,) * 2)
    compile_library(library, objects)
    again = {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}
    assert again["room-two.o"] == made["room-two.o"] and again["one.o"] != made["one.o"]
    monkeypatch.setattr(compilers, "FLAGS", (*FLAGS, "-DOTHER"))
    compile_library(library, objects)
    assert (objects / "room-two.o").stat().st_mtime_ns > made["room-two.o"]
    (sources / "one.c").write_text("int one(void) { return }\n")
    os.utime(sources / "one.c", ns=(again["one.o"] + 10**9,) * 2)
    with pytest.raises(BuildError, match=r"one\.c"):
        compile_library(library, objects)


def test_this_checkout_uses_one_name() -> None:
    """A library of another name, such as that of an extension module, would never be loaded."""
    folder = REPO / "lowmem" / "kernels" / "native"
    found = library_path()
    assert found is None or found == folder / library_name()
