"""Lock a process down before it runs untrusted code, with Linux's own means and without privileges.

There are four layers, and none of them can be removed again:

- namespaces (network, mounts, IPC), if the system allows them: no network device, and a file system of
  limited size as the folder;
- Landlock: only Python's own files can be read, and only the folder can be written;
- a seccomp filter with a list of allowed system calls. All others (sockets, new processes and threads,
  signals to other processes, ptrace, changes of owners and modes, …) fail with EPERM;
- resource limits: CPU time, memory, file size, open files, no core dump.

Landlock and seccomp are required: `lock_down` raises if one of them is refused. This runs in a bare
interpreter of Linux and imports only the standard library.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

assert sys.platform == "linux"  # and type checkers read on only there

import resource  # noqa: E402

FILES = 256
"""Most files in the folder, if it is a file system of its own."""
OPEN_FILES = 24

_NEW_USER, _NEW_MOUNTS, _NEW_IPC, _NEW_NET = 0x10000000, 0x00020000, 0x08000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 1 << 14, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38

# (AUDIT_ARCH, {system call: its number}): asm/unistd_64.h of x86_64, asm-generic/unistd.h of aarch64.
_X86_64 = """read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11
brk 12 rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 ioctl 16 pread64 17 pwrite64 18 readv 19 writev 20
access 21 select 23 sched_yield 24 mremap 25 madvise 28 dup 32 dup2 33 nanosleep 35 getpid 39 exit 60 uname 63
fcntl 72 fsync 74 fdatasync 75 ftruncate 77 getcwd 79 chdir 80 rename 82 unlink 87 symlink 88 readlink 89
umask 95 gettimeofday 96 getrlimit 97 getrusage 98 sysinfo 99 times 100 getuid 102 getgid 104 geteuid 107
getegid 108 getppid 110 sigaltstack 131 gettid 186 time 201 futex 202 sched_getaffinity 204 getdents64 217
restart_syscall 219 clock_gettime 228 clock_getres 229 clock_nanosleep 230 exit_group 231 openat 257
newfstatat 262 unlinkat 263 renameat 264 symlinkat 266 readlinkat 267 faccessat 269 pselect6 270 ppoll 271
dup3 292 renameat2 316 getrandom 318 statx 332 clone3 435 faccessat2 439"""
_AARCH64 = """getcwd 17 dup 23 dup3 24 fcntl 25 ioctl 29 unlinkat 35 symlinkat 36 renameat 38 ftruncate 46
faccessat 48 chdir 49 openat 56 close 57 getdents64 61 lseek 62 read 63 write 64 readv 65 writev 66 pread64 67
pwrite64 68 pselect6 72 ppoll 73 readlinkat 78 newfstatat 79 fstat 80 fsync 82 fdatasync 83 exit 93
exit_group 94 futex 98 nanosleep 101 clock_gettime 113 clock_getres 114 clock_nanosleep 115 sched_yield 124
restart_syscall 128 sched_getaffinity 123 sigaltstack 132 rt_sigaction 134 rt_sigprocmask 135 rt_sigreturn 139
times 153 uname 160 getrlimit 163 getrusage 165 umask 166 gettimeofday 169 getpid 172 getppid 173 getuid 174
geteuid 175 getgid 176 getegid 177 gettid 178 sysinfo 179 brk 214 munmap 215 mremap 216 mmap 222 mprotect 226
madvise 233 renameat2 276 getrandom 278 statx 291 clone3 435 faccessat2 439"""


def _table(text: str) -> dict[str, int]:
    words = text.split()
    return {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}


ARCHITECTURES = {"x86_64": (0xC000003E, _table(_X86_64)), "aarch64": (0xC00000B7, _table(_AARCH64))}
"""Machine → (AUDIT_ARCH, allowed system calls). `_condition` restricts some of them."""


class WallError(Exception):
    """A required layer is not available here."""


@dataclass(frozen=True)
class Built:
    """The layers that are in place: namespaces, a file system of its own, and Landlock's ABI."""

    namespaces: bool
    own_filesystem: bool
    landlock: int


def lock_down(
    folder: Path | None,
    *,
    cpu_seconds: int,
    memory_bytes: int,
    file_bytes: int,
    parent: int,
    namespaces: bool = True,
) -> Built:
    """Lock this process down for good, with `folder` as its working directory.

    folder: the only place that it can write to; None for none. cpu_seconds, memory_bytes (of address space),
    file_bytes (of one file, and of all files if the folder is a file system of its own): limits. parent: id
    of the process whose end also ends this one. namespaces: use them if possible. The process must have one
    thread. Raises WallError if Landlock or seccomp is not available; no code may be run then.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    namespaces = namespaces and _own_namespaces(libc)
    own = folder is not None and namespaces and _own_filesystem(libc, folder, file_bytes)
    os.chdir(folder or "/")
    _call(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    abi = _landlock(libc, folder)
    _drop_capabilities(libc)
    _limit(cpu_seconds, memory_bytes, file_bytes)
    # Before the filter and after everything else: a change of credentials would undo it.
    _call(libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "the end with its parent")
    if os.getppid() != parent:
        raise WallError("the parent process has ended")
    _seccomp(libc)
    return Built(namespaces, own, abi)


def _call(result: int, what: str) -> int:
    if result < 0:
        raise WallError(f"{what} is not available: {os.strerror(ctypes.get_errno())}")
    return result


# --- namespaces --------------------------------------------------------------------------------------------


def _own_namespaces(libc: ctypes.CDLL) -> bool:
    """Enter new network, mount and IPC namespaces; False if the system refuses."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_IPC | _NEW_NET) != 0:
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError:  # files still belong to this user; only the user's name is lost
        pass
    return True


def _own_filesystem(libc: ctypes.CDLL, folder: Path, size: int) -> bool:
    """Mount a file system in memory, of limited size, over the folder; False if refused."""
    if libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        return False
    options = f"size={size},nr_inodes={FILES},mode=0700".encode()
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    return bool(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options) == 0)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Drop every capability: root's, and those of a user namespace."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    _call(libc.capset(header, none), "giving up capabilities")


# --- Landlock ----------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_WRITE, _READ, _LIST, _REMOVE, _MAKE_FILE, _MAKE_LINK, _TRUNCATE = (1 << b for b in (1, 2, 3, 5, 8, 12, 14))
_RIGHTS = ((1, (1 << 13) - 1), (2, 1 << 13), (3, _TRUNCATE), (5, 1 << 15))
"""(Landlock ABI, file rights that it introduced). All are denied unless a rule grants them."""


def landlock_abi() -> int:
    """Return the Landlock ABI of this kernel; 0 if it has no Landlock."""
    if sys.platform != "linux":
        return 0
    return max(0, int(ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, 1)))


def _landlock(libc: ctypes.CDLL, folder: Path | None) -> int:
    abi = landlock_abi()
    if abi < 1:
        raise WallError("Landlock is not available (it needs Linux 5.13 or newer with Landlock enabled)")
    handled = sum(rights for since, rights in _RIGHTS if since <= abi)
    network = 3 if abi >= 4 else 0  # bind and connect of TCP
    scopes = 3 if abi >= 6 else 0  # signals and abstract sockets of outside processes
    attributes = struct.pack("QQQ", handled, network, scopes)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = _call(
        libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0), "a Landlock ruleset"
    )
    for path in python_paths():
        _allow(libc, rules, path, _READ | _LIST if path.is_dir() else _READ)
    _allow(libc, rules, Path("/dev/null"), (_READ | _WRITE | _TRUNCATE) & handled)
    for device in ("/dev/zero", "/dev/urandom", "/dev/random"):
        _allow(libc, rules, Path(device), _READ)
    if folder is not None:  # no sub-folders: a deep tree is hard to remove
        rights = _WRITE | _READ | _LIST | _REMOVE | _MAKE_FILE | _MAKE_LINK | _TRUNCATE
        _allow(libc, rules, folder, rights & handled)
    _call(libc.syscall(_RESTRICT_SELF, rules, 0), "Landlock")
    os.close(rules)
    return abi


def _allow(libc: ctypes.CDLL, rules: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not on this system
        return
    rule = struct.pack("=Qi", rights, descriptor)
    _call(libc.syscall(_ADD_RULE, rules, 1, rule, 0), f"a Landlock rule for {path}")
    os.close(descriptor)


def python_paths() -> list[Path]:
    """Return the paths that this interpreter reads while it runs: the standard library and shared
    libraries.
    """
    own = [Path(os.__file__).parent, *(Path(entry) for entry in sys.path if entry)]
    prefix = Path(sys.base_prefix)
    shared = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/etc/ld.so.cache"]
    paths = [*own, prefix / "lib", prefix / "lib64", *map(Path, shared), Path("/usr/share/zoneinfo")]
    return [path for path in dict.fromkeys(paths) if path.exists() and path != Path("/")]


# --- limits ------------------------------------------------------------------------------------------------


def _limit(cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
    # Soft limits equal hard ones: the CPU limit then sends SIGKILL, which cannot be ignored.
    for what, limit in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),  # does not apply to root; the filter does
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        _, hard = resource.getrlimit(what)
        least = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (least, least))


# --- seccomp -----------------------------------------------------------------------------------------------

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _MASK, _RETURN = 0x20, 0x15, 0x54, 0x06  # BPF: load a word, compare, and with, return
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data, of little-endian machines
_FCNTL = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
"""Without F_SETOWN and F_SETSIG, which make the kernel send any signal to any process of the user."""


def filter_program(machine: str) -> bytes:
    """Build the BPF program (struct sock_filter[]) for one of ARCHITECTURES.

    System calls of another architecture (32-bit ones on a 64-bit kernel) kill the process.
    """
    architecture, calls = ARCHITECTURES[machine]
    program: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for name, number in calls.items():
        body = _condition(name)
        program += [(_EQUAL, 0, len(body), number), *body]
    program.append((_RETURN, 0, 0, _ERRNO | errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _condition(name: str) -> list[tuple[int, int, int, int]]:
    """Instructions for one allowed system call; every path ends with a return."""

    def argument(position: int) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, _ARGUMENTS + 8 * position)  # the low word: all arguments are ints

    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    if name == "clone3":  # "no such call": the C library then tries clone, which is refused
        return [(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    if name == "ioctl":  # "not a terminal": Python asks for every file
        return [(_RETURN, 0, 0, _ERRNO | errno.ENOTTY)]
    if name == "fcntl":
        tests = [(_EQUAL, len(_FCNTL) - i, 0, command) for i, command in enumerate(_FCNTL)]
        return [argument(1), *tests, refuse, allow]
    if name in ("open", "openat"):
        # Landlock before ABI 3 allows truncating a file that can be read.
        flags = argument(1 if name == "open" else 2)
        masked = (_MASK, 0, 0, os.O_ACCMODE | os.O_TRUNC)
        return [flags, masked, (_EQUAL, 0, 1, os.O_RDONLY | os.O_TRUNC), refuse, allow]
    return [allow]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _seccomp(libc: ctypes.CDLL) -> None:
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise WallError(f"the list of system calls for {machine} is missing")
    code = filter_program(machine)
    program = _Program(len(code) // 8, code)
    # 2: SECCOMP_MODE_FILTER
    _call(libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "a seccomp filter")
