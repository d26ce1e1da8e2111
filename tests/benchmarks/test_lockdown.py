"""The layers of the sandbox: all are required and probed, and their constants equal those of the kernel."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import struct
import sys
from pathlib import Path

import pytest
from lowmem.benchmarks.humaneval import lockdown, sandbox
from lowmem.benchmarks.humaneval.sandbox import SandboxError, capabilities, require

from tests.benchmarks.sandbox_helpers import RIGHT, once, run, sandboxed, world  # noqa: F401  (world is a fixture)
from tests.helpers import REPO

pytestmark = sandboxed


def copy_with(root: Path, change: str) -> Path:
    """A copy of the sandboxed code, with lines added to its lockdown."""
    root.mkdir(parents=True, exist_ok=True)
    for file in ("__init__.py", "sandbox_child.py", "lockdown.py"):
        text = (REPO / "benchmarks" / "humaneval" / file).read_text()
        (root / file).write_text(text + f"\n\n{change}" if file == "lockdown.py" else text)
    return root


# --- the layers ------------------------------------------------------------------------------------------


@once
def test_nothing_runs_if_a_layer_fails(monkeypatch, tmp_path):
    """Each required layer fails in turn: the program does not start, and the reason is reported."""
    for wall, said in (("_landlock", "no Landlock"), ("_seccomp", "no filter")):
        broken = f"def {wall}(*arguments):\n    raise WallError({said!r})\n"
        monkeypatch.setattr(sandbox, "_FOLDER", copy_with(tmp_path / wall, broken))
        outcome = run("open('/dev/stderr', 'w').write('it ran')")
        assert (outcome.kind, outcome.output) == ("refused", "") and outcome.detail == said
        capabilities.cache_clear()
        with pytest.raises(
            SandboxError, match=f"cannot be sandboxed here, so it is not run: {said}"
        ) as caught:
            require()
        assert "\n" not in str(caught.value)
    capabilities.cache_clear()


@once
def test_the_probe_sees_an_open_door(monkeypatch, tmp_path):
    """A filter that allows sockets is noticed, although every layer reports that it is in place."""
    open_door = "for _, calls in ARCHITECTURES.values():\n    calls.update(socket=41, socket2=198)\n"
    monkeypatch.setattr(sandbox, "_FOLDER", copy_with(tmp_path, open_door))
    capabilities.cache_clear()
    try:
        assert not capabilities().enough and capabilities().reason.endswith("can still reach: network")
    finally:
        capabilities.cache_clear()


@once
def test_other_systems_are_refused_with_a_reason(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    capabilities.cache_clear()
    try:
        with pytest.raises(SandboxError, match="needs Linux, and this is darwin"):
            require()
        assert run(RIGHT).kind == "refused"
    finally:
        capabilities.cache_clear()


@once
@pytest.mark.parametrize(
    ("machine", "header", "pattern"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+) (\d+)"),
        ("aarch64", "/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+) (\d+)"),
    ],
)
def test_system_call_numbers_equal_the_kernel_headers(machine, header, pattern):
    if not Path(header).exists():
        pytest.skip("no kernel headers here")
    numbers = {name: int(number) for name, number in re.findall(pattern, Path(header).read_text())}
    numbers.setdefault("newfstatat", numbers.get("fstatat", -1))
    calls = lockdown.ARCHITECTURES[machine][1]
    assert {name: numbers.get(name) for name in calls} == calls


@once
@pytest.mark.parametrize("machine", lockdown.ARCHITECTURES)
def test_the_filter_allows_and_refuses_the_right_calls(machine):
    """Interpret the BPF program for every system call and all relevant arguments."""
    architecture, calls = lockdown.ARCHITECTURES[machine]
    program = list(struct.iter_unpack("=HBBI", lockdown.filter_program(machine)))
    allowed, refused, killed = 0x7FFF0000, 0x00050001, 0x80000000

    def verdict(number: int, arguments=(0,) * 6, arch: int = architecture) -> int:
        data = struct.pack("=IIQ6Q", number, arch, 0, *arguments)
        at = accumulator = 0
        while True:
            code, yes, no, k = program[at]
            at += 1
            if code == 0x20:
                (accumulator,) = struct.unpack_from("=I", data, k)
            elif code == 0x54:
                accumulator &= k
            elif code == 0x15:
                at += yes if accumulator == k else no
            else:
                assert code == 0x06
                return k

    special = {calls[n] for n in ("fcntl", "ioctl", "open", "openat", "clone3") if n in calls}
    for number in range(1000):
        expected = allowed if number in calls.values() else refused
        assert number in special or verdict(number) == expected
    assert verdict(calls["read"] | 0x40000000) == refused  # x32
    assert verdict(calls["read"], arch=0x40000003) == killed  # 32-bit calls of a 64-bit process
    assert verdict(calls["clone3"]) == 0x00050026 and verdict(calls["ioctl"]) == 0x00050019
    for command in range(2000):
        known = command in (0, 1, 2, 3, 1030)
        assert verdict(calls["fcntl"], (1, command, 0, 0, 0, 0)) == (allowed if known else refused)
    for name, place in (("open", 1), ("openat", 2)):
        for flags in range(0o4000) if name in calls else ():
            arguments = [0] * 6
            arguments[place] = flags
            empties = flags & os.O_TRUNC and flags & os.O_ACCMODE == os.O_RDONLY
            assert verdict(calls[name], arguments) == (refused if empties else allowed)


@once
def test_capabilities_name_the_layers():
    found = require()
    assert found.landlock == lockdown.landlock_abi() >= 1
    assert found.describe().startswith(f"seccomp, Landlock ABI {found.landlock}")
    assert platform.machine() in lockdown.ARCHITECTURES
    assert ctypes.sizeof(ctypes.c_void_p) == 8 and signal.SIGKILL == 9
