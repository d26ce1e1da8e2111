"""Linux and macOS. What only Linux has does nothing on macOS; the docstrings say so."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

assert sys.platform != "win32"  # and type checkers read no further there

END_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
"""Signals by which a user or a service manager ends a process."""
NEW_GROUP: Mapping[str, Any] = {"start_new_session": True}
"""Arguments of Popen for a child that leads its own group, which Ctrl-C in the terminal does not reach."""
_INPUT_FLAGS, _LOCAL_FLAGS, _CONTROL_CHARACTERS = 0, 3, 6  # indexes into termios' list of attributes
_PARENT_DEATH_SIGNAL = 1  # of prctl
_DONTNEED = 4  # of madvise
_MMAP_THRESHOLD = -3  # of mallopt
_LIBC = ctypes.CDLL(None)
_LIMITING = threading.Lock()


# --- files -----------------------------------------------------------------------------------------------


def open_shared(path: Path, *, create: bool) -> int:
    """Open a file that others may rename or remove meanwhile, such as a lock; returns its handle."""
    return os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)


def lock(handle: int, *, wait: bool) -> None:
    """Lock an open file against other processes until it is closed.

    Raises BlockingIOError if another process has locked it and `wait` is False, OSError if the file
    system has no locks.
    """
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def discard_file(stream: IO[bytes], part: Path) -> None:
    """Remove an unfinished file, open as `stream`; flushing its buffer would only fail again."""
    with contextlib.suppress(OSError):
        part.unlink()
    with contextlib.suppress(OSError):
        stream.close()


def finish_file(stream: IO[bytes], part: Path, path: Path) -> None:
    """Flush the file `part`, open as `stream`, to disk, and rename it to `path`, which it replaces."""
    stream.flush()
    os.fsync(stream.fileno())
    replace_file(part, path)


def replace_file(part: Path, path: Path) -> None:
    """Rename the file `part` to `path`, which it replaces."""
    os.replace(part, path)


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Path, waste: Path, marker: str) -> None:
    """Remove a folder so that half of it is never taken for the whole: it is renamed to `waste` first.

    marker: the file that makes it one, which is removed first where it cannot be renamed.
    """
    shutil.rmtree(waste, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(waste)
    shutil.rmtree(waste, ignore_errors=True)


def read_at(handle: int, size: int, begin: int) -> bytes:
    """Read up to `size` bytes of an open file from `begin` on."""
    return os.pread(handle, size, begin)


def write_at(handle: int, data: bytes, begin: int) -> None:
    """Write bytes into an open file at `begin`."""
    os.pwrite(handle, data, begin)


def keep_private(handle: int) -> None:
    """Let only the user read and write an open file."""
    if os.fstat(handle).st_mode & 0o077:
        os.fchmod(handle, 0o600)


def set_blocking(handle: int) -> None:
    """Let writes to an open file wait until it takes them."""
    os.set_blocking(handle, True)


def will_need(handle: int, begin: int, size: int) -> bool:
    """Have the system read a part of a file into its cache; False where it cannot be told (macOS)."""
    if sys.platform != "linux":
        return False
    os.posix_fadvise(handle, begin, size, os.POSIX_FADV_WILLNEED)
    return True


def drop_pages(address: int, size: int) -> None:
    """Drop whole pages of a mapped file from memory; they are read again when touched. Linux only."""
    if sys.platform == "linux":
        _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _DONTNEED)


def extended(path: Path) -> Path:
    """The path in the form that has no limit of length."""
    return path


# --- memory ----------------------------------------------------------------------------------------------


def memory_peak() -> int:
    """Peak of the resident bytes of this process."""
    peak = _status_bytes("VmHWM:")
    if peak is None:  # macOS; on Linux, ru_maxrss is in KiB and includes the parent's memory at the fork
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak


def memory_private() -> int | None:
    """Resident bytes of this process that no file backs; None where that is unknown (macOS)."""
    return _status_bytes("RssAnon:")


def _status_bytes(name: str) -> int | None:
    """A value of Linux's /proc/self/status, or None elsewhere."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
    except (OSError, StopIteration):
        return None


def limit_memory(most: int) -> bool:
    """Limit the address space of this process to `most` bytes for good; False if the system refuses."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (OSError, ValueError):  # macOS
        return False
    return True


@contextlib.contextmanager
def allow_more_memory(most: int) -> Iterator[None]:
    """Limit the address space to `most` bytes more than now, inside the block. Linux only."""
    if sys.platform != "linux":
        yield
        return
    with _LIMITING:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as stream:
            whole = int(stream.read().split()[0]) * resource.getpagesize() + most
        if soft != resource.RLIM_INFINITY:
            whole = min(whole, soft)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (whole, hard))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def return_freed_memory(smallest: int) -> None:
    """Have glibc return freed blocks of at least `smallest` bytes to the system at once."""
    with contextlib.suppress(OSError, AttributeError):
        _LIBC.mallopt(_MMAP_THRESHOLD, smallest)


def trim_memory() -> None:
    """Have glibc return all freed pages to the system."""
    with contextlib.suppress(OSError, AttributeError):
        _LIBC.malloc_trim(ctypes.c_size_t(0))


# --- processor -------------------------------------------------------------------------------------------


def usable_cores() -> set[int]:
    """The cores that this process may run on; all of them on macOS."""
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def processor_name() -> str:
    """The processor's model."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            words = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            said = subprocess.run(words, capture_output=True, text=True, timeout=5).stdout.strip()
            if said:
                return said
    own = platform.processor() or platform.machine()
    return next(_cpuinfo("model name"), own)


def processor_flags() -> frozenset[str]:
    """The instruction sets that Linux lists, by its names; none elsewhere, where the kernels' library
    still finds its own.
    """
    return frozenset(next(_cpuinfo("flags", "Features"), "").split())


def _cpuinfo(*names: str) -> Iterator[str]:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in names:
                yield value.strip()


def load_average() -> float:
    """Processes that ran or waited to run during the last minute."""
    return os.getloadavg()[0]


# --- terminal --------------------------------------------------------------------------------------------


def console_modes(handle: int) -> Any:
    """The modes of the terminal of an open file; None if it is none."""
    try:
        return termios.tcgetattr(handle)
    except (termios.error, OSError, ValueError):
        return None


def set_console(handle: int, modes: Any) -> None:
    """Set modes that `console_modes` gave. A terminal that is gone is ignored."""
    with contextlib.suppress(termios.error, OSError):
        termios.tcsetattr(handle, termios.TCSANOW, modes)


def quiet_console(handle: int, modes: Any) -> None:
    """Let keys wait for the next prompt without an echo. Ctrl-C works, Ctrl-Z does not."""
    quiet: list[Any] = [list(part) if isinstance(part, list) else part for part in modes]
    quiet[_LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
    quiet[_LOCAL_FLAGS] |= termios.NOFLSH  # or Ctrl-C would discard pending output
    quiet[_INPUT_FLAGS] &= ~termios.ICRNL
    quiet[_CONTROL_CHARACTERS][termios.VSUSP] = b"\0"  # or the answer would be drawn over the shell
    set_console(handle, quiet)


def discard_typed(handle: int) -> None:
    """Discard keys that were typed ahead."""
    with contextlib.suppress(termios.error, OSError):
        termios.tcflush(handle, termios.TCIFLUSH)


# --- processes -------------------------------------------------------------------------------------------


def wait_ended(process: subprocess.Popen[Any]) -> None:
    """Wait until a process has ended; on Linux its id stays reserved for `kill_group`."""
    if sys.platform != "linux":
        process.wait()
        return
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that NEW_GROUP started, with its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where all have ended
        os.killpg(process.pid, signal.SIGKILL)


def group_runs(process: subprocess.Popen[Any]) -> bool:
    """Whether a process that NEW_GROUP started, or another of its group, still runs."""
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def was_killed(code: int) -> bool:
    """Whether an exit code of Popen means that the system killed the process, as when memory runs out."""
    return code == -signal.SIGKILL


def die_with_parent() -> None:
    """Have this process killed when its parent ends, and before others when memory runs out. Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError, AttributeError):
        _LIBC.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _end_with_parent() -> None:
    _LIBC.prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


ENDS_WITH_US: Mapping[str, Any] = {"preexec_fn": _end_with_parent} if sys.platform == "linux" else {}
"""Arguments of Popen for a child that is to end if this process is killed. Linux only."""
