"""The two sets of functions for operating systems: the same names, and Windows' own behaviour."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lowmem.platform import posix
from tests.helpers import REPO

_START = "from tests.platform.pretended_windows import windows_module\nsystem = windows_module()\n"


def names_of(module: types.ModuleType) -> dict[str, str]:
    """Its public functions and constants, by name; of functions what they take and return."""
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or inspect.ismodule(value) or not name.isidentifier():
            continue
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            found[name] = str(inspect.signature(value))
        elif name.isupper():
            found[name] = "a constant"
    return found


def in_pretended_windows(code: str, folder: Path) -> str:
    """What `code` prints, with `system` being Windows' functions over stand-ins."""
    start = f"import sys; sys.path.insert(0, {str(REPO)!r})\n{_START}"
    done = subprocess.run(
        [sys.executable, "-c", start + code], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_define_the_same(tmp_path: Path) -> None:
    code = "from tests.platform.test_systems import names_of\nprint(names_of(system))"
    windows: dict[str, str] = ast.literal_eval(in_pretended_windows(code, tmp_path))
    assert windows == names_of(posix)
    assert len(windows) > 25


def test_a_lock_keeps_others_out_and_takes_a_byte_that_no_file_has(tmp_path: Path) -> None:
    code = """
import os
first, second = (system.open_shared(__import__("pathlib").Path("lock"), create=True) for _ in range(2))
system.lock(first, wait=False)
try:
    system.lock(second, wait=False)
except BlockingIOError as error:
    print("busy", error.strerror)
os.close(first)
system.lock(second, wait=True)
print(system.msvcrt.locked, os.lseek(second, 0, os.SEEK_CUR))
try:
    system.open_shared(__import__("pathlib").Path("none"), create=False)
except FileNotFoundError:
    print("none")
"""
    said = in_pretended_windows(code, tmp_path).splitlines()
    assert said == ["busy another process has locked it", f"[({1 << 42}, 1), ({1 << 42}, 1)] 0", "none"]


def test_a_file_stays_locked_until_it_is_renamed_and_readers_are_waited_for(tmp_path: Path) -> None:
    code = """
import os
from pathlib import Path
part, path = Path("new.part"), Path("new")
stream, real, tries = part.open("wb"), os.replace, []
stream.write(b"content")
def replace(source, target):
    assert not stream.closed
    tries.append(1)
    if len(tries) < 3:
        raise PermissionError(13, "in use")
    real(source, target)
os.replace = replace
system.finish_file(stream, part, path)
print(path.read_bytes(), len(tries), part.exists())
system._PATIENCE, stream = 0, part.open("wb")
os.replace = lambda *names: (_ for _ in ()).throw(PermissionError(13, "in use"))
try:
    system.finish_file(stream, part, path)
except PermissionError:
    print("given up")
"""
    assert in_pretended_windows(code, tmp_path).splitlines() == ["b'content' 3 False", "given up"]


def test_a_saved_conversation_waits_for_readers(tmp_path: Path) -> None:
    code = """
import os
from lowmem.chat import store
from lowmem.chat.conversation import ChatState
store.system, real, tries = system, os.replace, []
def replace(source, target):
    tries.append(1)
    if len(tries) < 3:
        raise PermissionError(13, "in use")
    real(source, target)
os.replace = replace
store.save("talk.json", ChatState())
print(len(tries), os.listdir())
"""
    assert in_pretended_windows(code, tmp_path) == "3 ['talk.json']\n"


def test_a_folder_with_an_open_file_loses_its_marker_first(tmp_path: Path) -> None:
    code = """
import shutil
from pathlib import Path
folder, seen = Path("job"), []
folder.mkdir()
(folder / "job.json").touch(); (folder / "lock").touch()
def rename(self, target):
    raise PermissionError(13, "in use")
Path.rename = rename
real = shutil.rmtree
def rmtree(path, **options):
    seen.append((str(path), (folder / "job.json").exists()))
    real(path, **options)
shutil.rmtree = rmtree
system.remove_folder(folder, Path("job.done"), "job.json")
print(seen, folder.exists())
"""
    said = in_pretended_windows(code, tmp_path)
    assert said.strip() == "[('job.done', True), ('job', False), ('job.done', False)] False"


def test_reading_and_writing_at_a_place_leave_the_position(tmp_path: Path) -> None:
    for system in ("system", "__import__('lowmem.platform.posix', fromlist=['x'])"):
        code = f"""
import os
system = {system}
handle = os.open("file", os.O_RDWR | os.O_CREAT)
os.write(handle, b"0123456789")
os.lseek(handle, 2, os.SEEK_SET)
system.write_at(handle, b"ab", 4)
print(system.read_at(handle, 4, 3), os.lseek(handle, 0, os.SEEK_CUR))
"""
        assert in_pretended_windows(code, tmp_path).strip() == "b'3ab6' 2"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("C:\\models", "C:\\models"),
        ("C:\\" + 220 * "a", "\\\\?\\C:\\" + 220 * "a"),
        ("\\\\server\\share\\" + 220 * "a", "\\\\?\\UNC\\server\\share\\" + 220 * "a"),
        ("\\\\?\\C:\\" + 220 * "a", "\\\\?\\C:\\" + 220 * "a"),
    ],
    ids=["short", "long", "network", "extended"],
)
def test_long_paths_are_extended(path: str, expected: str, tmp_path: Path) -> None:
    code = (
        f"import os\nos.path.abspath = str\nfrom pathlib import Path\nprint(system.extended(Path({path!r})))"
    )
    assert in_pretended_windows(code, tmp_path).strip() == expected


def test_a_killed_group_leaves_no_child(tmp_path: Path) -> None:
    code = """
import subprocess, sys, time, psutil
sleep = [sys.executable, "-c", "import time; time.sleep(99)"]
child = f"import subprocess, time; print(subprocess.Popen({sleep}).pid, flush=True); time.sleep(99)"
words = [sys.executable, "-c", child]
process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **system.NEW_GROUP)
inner = int(process.stdout.readline())
system.kill_group(process)
process.wait()
for _ in range(100):
    if not psutil.pid_exists(inner) or psutil.Process(inner).status() == psutil.STATUS_ZOMBIE:
        print("gone"); break
    time.sleep(0.05)
"""
    assert in_pretended_windows(code, tmp_path).strip() == "gone"


def test_peaks_and_cores_are_this_process(tmp_path: Path) -> None:
    code = """
from lowmem.platform import posix
before = posix.memory_peak()
block = bytearray(b"x" * (64 << 20))
print(64 << 20 <= posix.memory_peak() - before < 256 << 20, (posix.memory_private() or 64 << 20) >= 64 << 20)
"""
    assert in_pretended_windows(code, tmp_path).split() == ["True", "True"]
    assert posix.usable_cores() and posix.processor_name()
