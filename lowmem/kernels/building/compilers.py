"""Find a C compiler, and compile the library with it.

The first one that is there: what the variable CC names, the compiler that Python was built with, gcc or
clang, and zig (PyPI's `ziglang`: a compiler in a wheel, which also compiles for other systems).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lowmem.kernels.building.targets import FLAGS, Target

SOURCES = Path(__file__).parents[1] / "csrc"


class BuildError(Exception):
    """The library cannot be compiled; the message says why."""


def zig() -> list[str] | None:
    """The command that runs zig's C compiler, or None."""
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    return [found, "cc"] if (found := shutil.which("zig")) else None


def own_compiler() -> list[str] | None:
    """The command of a C compiler of this machine other than zig, or None."""
    named = os.environ.get("CC")
    if named:
        return shlex.split(named, posix=os.name != "nt")
    if sys.platform == "darwin" and _lacks_tools():
        return None
    python = shlex.split(sysconfig.get_config_var("CC") or "") if os.name != "nt" else []
    for words in (python, ["cc"], ["gcc"], ["clang"]):
        if words and shutil.which(words[0]):
            return words
    return None


def _lacks_tools() -> bool:
    """Whether a Mac lacks the Command Line Tools: its cc then is a stub that asks to install them."""
    try:
        return subprocess.run(["xcode-select", "-p"], capture_output=True).returncode != 0
    except OSError:
        return True


def compiler(target: Target | None) -> list[str]:
    """The command that compiles for a target, None for this machine. Raises BuildError if there is none."""
    if target is not None:
        if found := zig():
            return [*found, "-target", target.triple]
        raise BuildError(f"compiling for {target.name} needs zig: pip install ziglang")
    if found := own_compiler():
        return found
    if found := zig():
        return [*found, "-mcpu=baseline"]  # else it compiles for this very processor
    raise BuildError("there is no C compiler: install gcc or clang, or pip install ziglang")


def compile_library(library: Path, objects: Path, target: Target | None = None) -> None:
    """Compile the sources to the file `library`; `objects` is as in `compile_all`.

    Raises BuildError with the compiler's first error.
    """
    windows = "windows" in target.name if target else os.name == "nt"
    words = [*compiler(target), *FLAGS, *(() if windows else ("-fPIC",))]
    library.parent.mkdir(parents=True, exist_ok=True)
    made = compile_all(words, objects)
    linux = "-linux-" in target.triple if target else sys.platform == "linux"
    libraries = ("-lm", "-ldl", "-pthread") if linux else ()
    stripped = ("-s",) if target else ()
    call([*words, "-shared", *stripped, *made, *libraries, "-o", str(library)])
    for left in library.parent.glob("*.lib"):  # an import library; nothing is linked with it
        left.unlink()


def compile_all(words: Sequence[str], objects: Path, left_out: Collection[str] = ()) -> list[str]:
    """Compile the sources with the command `words`, several at a time. Returns the object files.

    objects: their folder, in which they are kept until the source or a header is newer, or the command
    another. left_out: names of sources. Raises BuildError with the compiler's first error.
    """
    objects.mkdir(parents=True, exist_ok=True)
    headers = max(path.stat().st_mtime for path in SOURCES.rglob("*.h"))
    made_by, command = objects / "command", shlex.join(words)
    same = made_by.is_file() and made_by.read_text() == command
    made_by.write_text(command)

    def compiled(source: Path) -> str:
        result = objects / ("-".join(source.relative_to(SOURCES).with_suffix("").parts) + ".o")
        newest = max(source.stat().st_mtime, headers)
        if not same or not result.is_file() or result.stat().st_mtime < newest:
            call([*words, "-c", f"-I{SOURCES}", str(source), "-o", str(result)])
        return str(result)

    sources = [path for path in SOURCES.rglob("*.c") if path.name not in left_out]
    largest_first = sorted(sources, key=lambda path: path.stat().st_size, reverse=True)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(compiled, largest_first))


def call(command: Sequence[str]) -> None:
    """Run a compiler. Raises BuildError with what it says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error.strerror or error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{(done.stderr or done.stdout).strip()}")
