"""Windows. What it has no counterpart of does nothing; the docstrings say so.

Constants and functions are those of Microsoft's documentation of the Win32 API.
"""

from __future__ import annotations

import contextlib
import ctypes
import msvcrt
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import winreg
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import psutil

assert sys.platform == "win32"  # type checkers read on only there

END_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)
"""Signals by which a user or a service manager ends a process."""
NEW_GROUP: Mapping[str, Any] = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
"""Arguments of Popen for a child that leads its own group, which Ctrl-C in the console does not reach."""
ENDS_WITH_US: Mapping[str, Any] = {}
"""Arguments of Popen for a child that is to end if this process is killed: there are none."""

_GENERIC_READ, _GENERIC_WRITE = 0x80000000, 0x40000000
_SHARE_ALL = 7
"""Others may read, write, rename and remove the file while it is open."""
_OPEN_EXISTING, _OPEN_ALWAYS, _NORMAL = 3, 4, 0x80
_NOT_A_HANDLE = ctypes.c_void_p(-1).value
_LOCKED = 1 << 42
"""The byte that a lock takes, which no file has: a locked byte cannot be read by others."""
_PATIENCE = 10.0
"""Seconds in which a virus scanner or a reader closes the file that a new one is to replace."""
_LONGEST = 200
"""Characters of a folder's path that leave room for the names in it; a whole path has at most 259."""
_ECHO, _LINES = 0x0004, 0x0002
"""Console modes: keys are shown; reading waits for a whole line."""


# --- files -----------------------------------------------------------------------------------------------


def open_shared(path: Path, *, create: bool) -> int:
    """Open a file that others may rename or remove meanwhile, such as a lock; returns its handle."""
    opened = ctypes.windll.kernel32.CreateFileW
    opened.restype = ctypes.c_void_p
    handle = opened(
        str(path),
        ctypes.c_uint32(_GENERIC_READ | _GENERIC_WRITE),
        _SHARE_ALL,
        None,
        _OPEN_ALWAYS if create else _OPEN_EXISTING,
        _NORMAL,
        None,
    )
    if handle == _NOT_A_HANDLE:
        raise ctypes.WinError()
    return msvcrt.open_osfhandle(handle, os.O_RDWR | os.O_BINARY)


def lock(handle: int, *, wait: bool) -> None:
    """Lock an open file against other processes until it is closed.

    Raises BlockingIOError if another process has locked it and `wait` is False, OSError if the file system
    has no locks.
    """
    while True:
        try:
            with _at(handle, _LOCKED):
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            return
        except PermissionError as error:
            if not wait:
                raise BlockingIOError(error.errno, "another process has locked it") from error
        time.sleep(0.05)


def discard_file(stream: IO[bytes], part: Path) -> None:
    """Remove an unfinished file, open as `stream`; flushing its buffer would only fail again."""
    with contextlib.suppress(OSError):
        part.unlink()  # opened by open_shared, which shares removal
    with contextlib.suppress(OSError):
        stream.close()


def finish_file(stream: IO[bytes], part: Path, path: Path) -> None:
    """Flush the file `part`, open as `stream`, to disk, and rename it to `path`, which it replaces.

    `open_shared` opened it, so it can be renamed while it is open and locked.
    """
    stream.flush()
    os.fsync(stream.fileno())
    replace_file(part, path)


def replace_file(part: Path, path: Path) -> None:
    """Rename the file `part` to `path`, which it replaces.

    A program that has `path` open without sharing it, such as a virus scanner, is waited for.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            os.replace(part, path)
            return
        except PermissionError:
            if time.monotonic() > end:
                raise
        time.sleep(0.05)


def flush_folder(folder: Path) -> None:
    """Nothing: NTFS keeps a journal of renames."""


def remove_folder(folder: Path, waste: Path, marker: str) -> None:
    """Remove a folder so that half of it is never taken for the whole.

    A folder in which a file is open, such as a lock, cannot be renamed to `waste`; then the file `marker`,
    which makes it one, is removed first.
    """
    shutil.rmtree(waste, ignore_errors=True)
    try:
        folder.rename(waste)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            (folder / marker).unlink()
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(waste, ignore_errors=True)


def read_at(handle: int, size: int, begin: int) -> bytes:
    """Read up to `size` bytes of an open file from `begin` on."""
    with _at(handle, begin):
        return os.read(handle, size)


def write_at(handle: int, data: bytes, begin: int) -> None:
    """Write bytes into an open file at `begin`."""
    with _at(handle, begin):
        os.write(handle, data)


@contextlib.contextmanager
def _at(handle: int, place: int) -> Iterator[None]:
    """Inside, an open file stands at `place`; afterwards where it stood before."""
    before = os.lseek(handle, 0, os.SEEK_CUR)
    try:
        os.lseek(handle, place, os.SEEK_SET)
        yield
    finally:
        os.lseek(handle, before, os.SEEK_SET)


def keep_private(handle: int) -> None:
    """Nothing: files in the user's folder are the user's alone."""


def set_blocking(handle: int) -> None:
    """Nothing: no parent leaves a stream that does not block."""


def will_need(handle: int, begin: int, size: int) -> bool:
    """Have the system read a part of a file into its cache; False, since it cannot be told."""
    return False


def drop_pages(address: int, size: int) -> None:
    """Nothing: Windows drops the pages of mapped files as it needs memory."""


def extended(path: Path) -> Path:
    """The path in the form that has no limit of length, if files in it could exceed that of other paths."""
    text = os.path.abspath(path)
    if len(text) <= _LONGEST or text.startswith("\\\\?\\"):
        return path
    return Path("\\\\?\\UNC\\" + text[2:]) if text.startswith("\\\\") else Path("\\\\?\\" + text)


# --- memory ----------------------------------------------------------------------------------------------


def memory_peak() -> int:
    """Peak of the resident bytes of this process."""
    return int(psutil.Process().memory_info().peak_wset)


def memory_private() -> int | None:
    """Bytes of this process that no file backs."""
    return int(psutil.Process().memory_info().private)


def limit_memory(most: int) -> bool:
    """Limit the address space of this process for good; False, since Windows has no such limit."""
    return False


@contextlib.contextmanager
def allow_more_memory(most: int) -> Iterator[None]:
    """Limit the address space inside the block: does nothing."""
    yield


def return_freed_memory(smallest: int) -> None:
    """Have the C library return freed blocks to the system at once: does nothing."""


def trim_memory() -> None:
    """Have the C library return all freed pages to the system: does nothing."""


# --- processor -------------------------------------------------------------------------------------------


def usable_cores() -> set[int]:
    """The cores that this process may run on."""
    return set(psutil.Process().cpu_affinity() or ())


def processor_name() -> str:
    """The processor's model."""
    with contextlib.suppress(OSError):
        where = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, where) as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    return platform.processor() or platform.machine()


def processor_flags() -> frozenset[str]:
    """The instruction sets by Linux's names: none; the kernels' library still finds its own."""
    return frozenset()


def load_average() -> float:
    """Processes that ran or waited to run during the last minute; 0 until psutil has watched that long."""
    return float(psutil.getloadavg()[0])


# --- console ---------------------------------------------------------------------------------------------


def console_modes(handle: int) -> Any:
    """The modes of the console of an open file; None if it is none."""
    mode = ctypes.c_uint32()
    try:
        found = ctypes.windll.kernel32.GetConsoleMode(
            ctypes.c_void_p(msvcrt.get_osfhandle(handle)), ctypes.byref(mode)
        )
    except (OSError, ValueError):
        return None
    return mode.value if found else None


def set_console(handle: int, modes: Any) -> None:
    """Set modes that `console_modes` gave. A console that is gone is ignored."""
    with contextlib.suppress(OSError, ValueError):
        ctypes.windll.kernel32.SetConsoleMode(ctypes.c_void_p(msvcrt.get_osfhandle(handle)), modes)


def quiet_console(handle: int, modes: Any) -> None:
    """Let keys wait for the next prompt without an echo; Ctrl-C works."""
    set_console(handle, modes & ~(_ECHO | _LINES))


def discard_typed(handle: int) -> None:
    """Discard keys that were typed ahead."""
    with contextlib.suppress(OSError, ValueError):
        ctypes.windll.kernel32.FlushConsoleInputBuffer(ctypes.c_void_p(msvcrt.get_osfhandle(handle)))


# --- processes -------------------------------------------------------------------------------------------


def wait_ended(process: subprocess.Popen[Any]) -> None:
    """Wait until a process has ended; its id stays reserved while Popen holds its handle."""
    process.wait()


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that NEW_GROUP started, with those that it started."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()


def group_runs(process: subprocess.Popen[Any]) -> bool:
    """Whether a process that NEW_GROUP started still runs."""
    return process.poll() is None


def was_killed(code: int) -> bool:
    """Whether an exit code means that memory ran out: Windows kills no process then."""
    return False


def die_with_parent() -> None:
    """Have this process killed when its parent ends: does nothing."""
