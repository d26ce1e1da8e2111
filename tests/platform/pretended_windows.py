"""A Python that lacks what Windows lacks, as far as lowmem's own modules see it.

`install` runs in a process of its own. Modules of other projects go on as on this machine.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import fcntl
import importlib
import os
import signal
import subprocess
import sys
import types
from typing import Any

import psutil  # imported before this is a Windows

HIDDEN_MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty")
HIDDEN = {
    os: (
        "fchmod getloadavg getpgid killpg posix_fadvise POSIX_FADV_WILLNEED pread pwrite sched_getaffinity "
        "setsid wait4 waitid"
    ),
    signal: "SIGHUP SIGUSR1 SIGUSR2 SIGQUIT",
}
"""What the modules do not have on Windows; a few that Python's own modules need here are left."""


class Msvcrt(types.ModuleType):
    """The functions of `msvcrt` that lowmem uses, with Linux's locks. It also records them."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.locked: list[tuple[int, int]] = []

    def locking(self, handle: int, mode: int, count: int) -> None:
        assert mode == self.LK_NBLCK
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error
        self.locked.append((os.lseek(handle, 0, os.SEEK_CUR), count))

    def open_osfhandle(self, handle: int, flags: int) -> int:
        return handle

    def get_osfhandle(self, handle: int) -> int:
        return handle


class Kernel32:
    """The functions of kernel32.dll that lowmem uses. No file is a console."""

    def __init__(self) -> None:
        self.CreateFileW = _create_file

    def GetConsoleMode(self, handle: Any, mode: Any) -> int:
        return 0


class Registry(types.ModuleType):
    """The part of `winreg` that names the processor."""

    HKEY_LOCAL_MACHINE = 0

    def OpenKey(self, root: int, path: str) -> Any:
        assert path == r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        return contextlib.nullcontext()

    def QueryValueEx(self, key: Any, name: str) -> tuple[str, int]:
        assert name == "ProcessorNameString"
        return "Pretended processor", 1


class Process(psutil.Process):
    """Windows' names of a process's memory."""

    def memory_info(self) -> Any:
        found = super().memory_info()
        return types.SimpleNamespace(rss=found.rss, peak_wset=found.rss, private=found.rss)


def _create_file(path: str, access: Any, share: int, _safety: None, opening: int, *_rest: Any) -> int:
    create = {3: 0, 4: os.O_CREAT}[opening]
    try:
        return os.open(path, os.O_RDWR | create, 0o666)
    except OSError as error:
        ctypes.last = error  # type: ignore[attr-defined]
        return int(ctypes.c_void_p(-1).value or 0)


def windows_module() -> types.ModuleType:
    """`lowmem.platform.windows`, imported on this system with stand-ins for what it uses."""
    stand_ins: list[tuple[Any, str, Any]] = [
        (ctypes, "windll", types.SimpleNamespace(kernel32=Kernel32())),
        (ctypes, "WinError", lambda: ctypes.last),  # type: ignore[attr-defined]
        (os, "O_BINARY", 0),
        (signal, "SIGBREAK", 21),
        (subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    ]
    for owner, name, value in stand_ins:
        setattr(owner, name, value)
    sys.modules["msvcrt"], sys.modules["winreg"] = Msvcrt(), Registry("winreg")
    system, sys.platform = sys.platform, "win32"
    try:
        windows = importlib.import_module("lowmem.platform.windows")
        windows.psutil = types.SimpleNamespace(**{**vars(psutil), "Process": Process})  # type: ignore[attr-defined]
        return windows
    finally:
        sys.platform = system
        del sys.modules["msvcrt"], sys.modules["winreg"]  # other projects ask for them


def install() -> None:
    """From now on lowmem's modules use Windows' functions, and cannot import POSIX' modules."""
    real = builtins.__import__

    def checked(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
        importer = (globals or {}).get("__name__", "")
        if name.partition(".")[0] in HIDDEN_MODULES and importer.partition(".")[0] == "lowmem":
            raise ModuleNotFoundError(f"No module named '{name}', which {importer} imports", name=name)
        return real(name, globals, *rest, **named)

    windows = windows_module()
    package = types.ModuleType("lowmem.platform")
    package.__path__ = list(sys.modules["lowmem.platform"].__path__)
    package.system = windows  # type: ignore[attr-defined]
    sys.modules["lowmem.platform"] = package
    sys.modules.pop("lowmem.platform.posix", None)
    builtins.__import__ = checked
    for owner, names in HIDDEN.items():
        for name in names.split():
            delattr(owner, name)
