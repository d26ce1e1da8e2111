# ruff: noqa: F811 (fixtures of another file)
"""Hostile programs in the sandbox. Their effects are checked from outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lowmem.benchmarks.humaneval import sandbox
from lowmem.benchmarks.humaneval.sandbox import Limits, capabilities

from tests.benchmarks.sandbox_helpers import RIGHT, assert_held, once, run, sandboxed, survivors, world  # noqa: F401  (world is a fixture)
from tests.helpers import REPO

pytestmark = sandboxed


# --- processes ---------------------------------------------------------------------------------------------


def test_a_fork_bomb_starts_no_process():
    # Bounded, in case it ever escapes.
    assert_held(
        "for i in range(40):\n"
        "    attempt('fork', lambda: os.fork() or __import__('time').sleep(20))\n"
        "attempt('vfork', lambda: system_call(58 if X86 else 220, 17, 0, 0, 0, 0))\n"
        "attempt('thread', threading.Thread(target=print).start)\n"
        "attempt('subprocess', lambda: subprocess.run(['/bin/true']))\n"
        "attempt('spawn', lambda: os.posix_spawn('/bin/true', ['true'], {}))\n"
        "attempt('system', lambda: os.system('true') and 1 / 0)\n"
        "attempt('exec', lambda: os.execv('/bin/true', ['true']))\n"
        "attempt('pool', lambda: __import__('multiprocessing').Pool(2))\n",
        47,
    )


def test_a_daemon_does_not_survive():
    outcome = run(
        "try:\n    os.setsid()\n    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0:\n            __import__('time').sleep(20)\nexcept OSError:\n    pass\n"
        "attempt('session', os.setsid)\nattempt('group', lambda: os.setpgid(0, 0))\n"
        "attempt('parent', lambda: system_call(157, 1, 0, 0, 0, 0))\n" + RIGHT  # prctl: outlive the parent
    )
    assert "ESCAPED" not in outcome.output and outcome.output.count("held") == 3


def test_other_processes_are_not_signalled():
    """Harmless signals to all processes, and SIGKILL to a process of the test."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        try:
            assert_held(
                f"victim = {victim.pid}\n"
                "attempt('victim', lambda: os.kill(victim, signal.SIGKILL))\n"
                "attempt('parent', lambda: os.kill(os.getppid(), 0))\n"
                "attempt('parent group', lambda: os.killpg(os.getpgid(os.getppid()), 0))\n"
                "attempt('everybody', lambda: os.kill(-1, 0))\n"
                "attempt('pidfd', lambda: system_call(424, system_call(434, victim, 0), 9, 0, 0))\n"
                "attempt('limits', lambda: __import__('resource').prlimit(victim, 0, (1, 1)))\n"
                "attempt('priority', lambda: os.setpriority(os.PRIO_PROCESS, victim, 19))\n"
                "attempt('affinity', lambda: os.sched_setaffinity(victim, {0}))\n"
                "attempt('ptrace', lambda: system_call(101 if X86 else 117,"
                " 16, victim, 0, 0))\n"
                f"attempt('memory', lambda: open('/proc/{victim.pid}/mem', 'r+b'))\n",
                10,
            )
            assert victim.poll() is None
        finally:
            victim.kill()


def test_no_signal_through_a_file_owner():
    """With fcntl(F_SETOWN) and F_SETSIG the kernel sends any signal to a process of the same user."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        try:
            assert_held(
                "import fcntl\nreading, writing = os.dup(1), os.dup(1)\n"
                f"attempt('owner', lambda: fcntl.fcntl(writing, fcntl.F_SETOWN, {victim.pid}))\n"
                "attempt('signal', lambda: fcntl.fcntl(writing, 10, 9))\n"
                "attempt('async', lambda: fcntl.fcntl(writing, fcntl.F_SETFL, fcntl.FASYNC))\n"
                f"attempt('ioctl', lambda: fcntl.ioctl(writing, 0x8901, {victim.pid}))\n",
                4,
            )
            assert victim.poll() is None
        finally:
            victim.kill()


@once
def test_the_program_ends_with_its_parent(tmp_path):
    """If the process that runs a check is killed, the program ends too."""
    marker = tmp_path / "temporary"
    code = (
        "import tempfile\n"
        f"tempfile.tempdir = {str(marker)!r}\n"
        "from lowmem.benchmarks.humaneval.sandbox import Limits, check\n"
        "check('import time; time.sleep(30)', prompt='', test='', entry_point='f', limits=Limits(seconds=40))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPO) as process:
        wait_for(lambda: len(survivors(str(marker))) >= 1)
        time.sleep(0.3)
        process.kill()
    wait_for(lambda: not survivors(str(marker)))
    for folder in marker.iterdir():  # the killed process could not remove it
        folder.rmdir()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- time and memory ---------------------------------------------------------------------------------------


@once
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "for s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "def f(x):\n    while True:\n        try:\n            [][0]\n        except BaseException:\n"
        "            pass",
    ],
    ids=["loop", "deaf loop", "loop in the function"],
)
def test_an_infinite_loop_ends(code):
    outcome = run(code)
    assert outcome.kind == "timeout" and "CPU" in outcome.detail


@once
def test_a_sleeping_program_times_out():
    outcome = run("__import__('time').sleep(100)", Limits(seconds=0.7))
    assert (outcome.kind, outcome.detail) == ("timeout", "took more than 0.7 seconds")


def test_ten_gigabytes_cannot_be_allocated():
    outcome = run("x = bytearray(10 << 30)" + RIGHT)
    assert (outcome.kind, outcome.detail) == ("memory", "MemoryError")
    held = assert_held(
        "attempt('mapping', lambda: __import__('mmap').mmap(-1, 10 << 30))\n"
        "attempt('memory file', lambda: os.memfd_create('x'))\n"
        "attempt('shared', lambda: __import__('multiprocessing.shared_memory').shared_memory.SharedMemory("
        "create=True, size=10 << 30))\n",
        3,
    )
    assert held.kind == "passed"


@once
def test_many_small_allocations_hit_the_limit():
    limits = Limits(seconds=60, cpu_seconds=2, memory_bytes=128 << 20)
    assert run("x = []\nwhile True: x.append(bytearray(1 << 20))", limits).kind == "memory"


@once
def test_endless_output_is_cut():
    outcome = run("while True: print('x' * 10000)", Limits(seconds=2, cpu_seconds=1, output_bytes=1000))
    assert outcome.kind == "timeout" and outcome.output == "x" * 1000


@once
def test_an_endless_result_is_not_read():
    outcome = run(
        "import gc\nfor end in range(3, 20):\n    try:\n        while True: os.write(end, b'[' * 65536)\n"
        "    except OSError: pass"
    )
    assert outcome.kind == "failed" and outcome.detail != ""


# --- files -------------------------------------------------------------------------------------------------


def test_nothing_is_written_elsewhere(world):
    """Every way to write beside its folder, in the home, in the repository and in the system is refused."""
    victim = world / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)
    before = victim.stat()
    new = [world / "new", Path.home() / "lowmem-escaped", REPO / "lowmem-escaped"]
    new += [Path("/tmp/lowmem-escaped"), Path("/dev/shm/lowmem-escaped"), Path("/var/tmp/lowmem-escaped")]
    outcome = assert_held(
        f"victim, new = {str(victim)!r}, {[str(path) for path in new]!r}\n"
        "for path in new:\n"
        "    attempt('new', lambda: open(path, 'w'))\n"
        "    attempt('folder', lambda: os.mkdir(path))\n"
        "    attempt('socket', lambda: os.mknod(path))\n"
        "    attempt('link', lambda: os.symlink('/', path))\n"
        "    attempt('hard link', lambda: os.link('/etc/passwd', path))\n"
        "for mode in ('r', 'w', 'a', 'r+', 'x'):\n"
        "    attempt(mode, lambda: open(victim, mode))\n"
        "    attempt(mode, lambda: open(os.path.relpath(victim), mode))\n"
        "os.symlink(victim, 'link')\n"
        "os.symlink(os.path.dirname(victim), 'there')\n"
        "attempt('through a link', lambda: open('link', 'w'))\n"
        "attempt('through a linked folder', lambda: open('there/new', 'w'))\n"
        "attempt('truncate', lambda: os.truncate(victim, 0))\n"
        "attempt('open to truncate', lambda: os.open(victim, os.O_RDONLY | os.O_TRUNC))\n"
        "attempt('unlink', lambda: os.unlink(victim))\n"
        "attempt('rename', lambda: os.rename(victim, 'mine'))\n"
        "attempt('rename onto', lambda: (open('mine', 'w').close(), os.rename('mine', victim)))\n"
        "attempt('chmod', lambda: os.chmod(victim, 0o777))\n"
        "attempt('chown', lambda: os.chown(victim, os.getuid(), os.getgid()))\n"
        "attempt('times', lambda: os.utime(victim, (0, 0)))\n"
        "attempt('attribute', lambda: os.setxattr(victim, 'user.x', b'x'))\n"
        "attempt('python', lambda: open(os.__file__, 'a'))\n"
        "attempt('python emptied', lambda: os.open(os.__file__, os.O_RDONLY | os.O_TRUNC))\n"
        "attempt('mount', lambda: libc.mount(b'x', os.getcwd().encode(), b'tmpfs', 0, None) and 1 / 0)\n"
        "attempt('namespace', lambda: libc.unshare(0x10000000) and 1 / 0)\n"
        "attempt('root', lambda: os.chroot('.'))\n"
        "attempt('user', lambda: os.setuid(12345))\n"
        "attempt('folder inside', lambda: os.mkdir('inside'))\n",
        6 * 5 + 10 + 18,
    )
    assert outcome.kind == "passed"
    assert victim.read_text() == "precious"
    after = victim.stat()
    assert (after.st_mode, after.st_mtime, after.st_ino) == (before.st_mode, before.st_mtime, before.st_ino)
    assert not [path for path in new if path.exists() or path.is_symlink()]
    assert Path(os.__file__).stat().st_size > 1000


def test_its_own_folder_is_writable():
    outcome = run(
        "import tempfile\n"
        "assert os.getcwd() == os.environ['HOME'] and tempfile.gettempdir() == os.getcwd()\n"
        "assert os.listdir() == []\n"
        "with open('a', 'w') as file: file.write('x')\n"
        "os.rename('a', 'b'); os.symlink('b', 'c')\n"
        "with tempfile.TemporaryFile() as file: file.write(b'x')\n"
        "assert open('c').read() == 'x' and sorted(os.listdir()) == ['b', 'c']; os.unlink('b')\n"
        "os.open('unreadable', os.O_CREAT | os.O_WRONLY, 0)\n" + RIGHT
    )
    assert outcome.kind == "passed", outcome


def test_the_disk_is_not_filled(world):
    """Many files, each up to the limit, and deleted files that stay open."""
    limits = Limits(seconds=60, cpu_seconds=5, file_bytes=4 << 20)
    outcome = run(
        "import time\nwritten = 0\n"
        "for i in range(60):\n"
        "    try:\n"
        "        file = os.open(str(i), os.O_CREAT | os.O_WRONLY)\n"
        "        for _ in range(64): written += os.write(file, bytes(1 << 16))\n"
        "        os.close(file)\n"
        "    except OSError: pass\n"
        "    print(written, flush=True)\n"
        "    time.sleep(0.01)\n" + RIGHT,
        limits,
    )
    most = max(map(int, outcome.output.split()))
    assert most >= 1 << 20, "it did write"
    if outcome.kind == "passed":  # the sandbox has its own file system
        assert capabilities().own_filesystem and most <= 4 << 20
    else:
        assert outcome.detail == "wrote more than 4 MiB to its folder" and most < 200 << 20
    one_file = run("with open('a', 'wb') as file: file.write(bytes(5 << 20))" + RIGHT, limits)
    assert one_file.kind == "failed" and one_file.detail.startswith(("OSError", "wrote more"))


# --- secrets and the network -------------------------------------------------------------------------------


def test_secrets_cannot_be_read(world, monkeypatch):
    monkeypatch.setenv("LOWMEM_TEST_TOKEN", "a-secret-of-the-parent")
    secret = world / "secret"
    secret.write_text("a-secret-in-a-file")
    outcome = assert_held(
        "print(dict(os.environ))\n"
        "print(sys.argv, sys.stdin.read())\n"
        "for pid in ('self', 'thread-self', '1', str(os.getpid()), str(os.getppid())):\n"
        "    for name in ('environ', 'mem', 'maps', 'cmdline', 'status', 'fd', 'cwd/x', 'root/etc/passwd'):\n"
        "        attempt(pid, lambda: print(os.listdir(f'/proc/{pid}/{name}') if name == 'fd' else"
        " open(f'/proc/{pid}/{name}', 'rb').read(10**6)))\n"
        f"for path in ('/etc/passwd', '/etc/hostname', '/proc/mounts', {str(secret)!r},"
        f" {str(Path(sandbox.__file__))!r}):\n"
        "    attempt(path, lambda: print(open(path).read()))\n"
        f"for path in ('/', '/home', '/root', '/tmp', '/proc', '/sys', {str(world)!r}):\n"
        "    attempt(path, lambda: print(os.listdir(path)))\n"
        "attempt('keys', lambda: system_call(250 if X86 else 219, 0, -3, 0))\n"
        "attempt('read memory', lambda: system_call(310 if X86 else 270,"
        " os.getppid(), 0, 0, 0, 0, 0))\n",
        5 * 8 + 5 + 7 + 2,
    )
    assert "a-secret" not in outcome.output


def test_no_socket_of_any_kind(world):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(world / "unix"))
    unix.listen()
    unix.setblocking(False)
    with listener, unix:
        assert_held(
            f"address, unix = {listener.getsockname()!r}, {str(world / 'unix')!r}\n"
            "attempt('tcp', lambda: socket.create_connection(address, 2))\n"
            "attempt('tcp server', lambda: socket.create_server(('127.0.0.1', 0)))\n"
            "attempt('udp', lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', address))\n"
            "attempt('udp 6', lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))\n"
            "attempt('raw', lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))\n"
            "attempt('packet', lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))\n"
            "attempt('netlink', lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))\n"
            "attempt('unix', lambda: socket.socket(socket.AF_UNIX).connect(unix))\n"
            "attempt('pair', socket.socketpair)\n"
            "attempt('name', lambda: socket.getaddrinfo('localhost', 80) and socket.gethostbyname('x.org'))\n"
            "attempt('url', lambda: __import__('urllib.request').request.urlopen('http://127.0.0.1:%d' %"
            " address[1], timeout=2))\n"
            "attempt('io_uring', lambda: system_call(425, 8, ctypes.create_string_buffer(256)))\n"
            "attempt('bpf', lambda: system_call(321 if X86 else 280, 0, 0, 0))\n"
            "attempt('user faults', lambda: system_call(323 if X86 else 282, 0))\n",
            14,
        )
        for server in (listener, unix):
            with pytest.raises(BlockingIOError):
                server.accept()
