"""Install the wheel for ARM in an emulated Debian, and run `lowmem demo` and the kernels' oracle tests there.

    python -m tests.compat.arm_demo FOLDER                  everything: about half an hour, 8 GB
    python -m tests.compat.arm_demo FOLDER --only tests     a part: install, demo or tests

FOLDER becomes an ARM Debian, made by debootstrap; one that is there already is used as it is. The kernels
come from lowmem's wheel alone: PATH is empty while the demo runs, and the Debian has no compiler. torch is
slow in QEMU, so the demo calibrates on one row of text, does not tune, and measures one row.

Needs root, `debootstrap`, `qemu-user-static` and `binfmt-support`, with which Linux starts programs for ARM;
uv, ziglang, a Debian mirror and a package index.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lowmem.kernels.building.targets import TARGETS
from lowmem.kernels.building.wheels import build
from tests.compat.dependencies import for_system, uv, wanted
from tests.helpers import REPO

BINFMT = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")
MIRROR = "http://deb.debian.org/debian"
NAMESPACE = ("unshare", "--mount", "--propagation", "private")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = ("python3", "python3-venv")
HOME = "/opt/lowmem"
"""The environment with lowmem, inside of the Debian."""
CPU = "neoverse-n1"
"""QEMU's name. It lacks instructions for bfloat16: QEMU takes three times as long for those as for torch's
conversions to float32."""
DEMO = ("demo", "--rows", "1", "--text-rows", "1", "--new-tokens", "16", "--effort", "fast")
TESTED_CPU = "max,sve=off"
"""It has every instruction set of the kernels, and the tests use each. With SVE torch's own products in
bfloat16 are wrong in QEMU 7.2, as `lowmem doctor` shows there."""
TESTS = ("native_kernels", "native_linear", "native_attention", "quantized_tables", "reference_kernel")
TEST_PACKAGES = ("pytest", "pytest-timeout", "hypothesis")
PARTS = ("install", "demo", "tests")
_COMPILERS = ("cc", "gcc", "clang", "tcc", "zig")
_KERNEL = re.compile(r"^\s*([48]-bit) .*\blowmem NEON\b", re.MULTILINE)


def lacks(folder: Path) -> str:
    """What is missing to emulate a Debian in `folder`, and how to get it; "" if nothing."""
    if sys.platform != "linux":
        return "an ARM Debian is emulated on Linux alone"
    if os.geteuid() != 0:
        return "debootstrap and chroot need root: run it as root, or in a virtual machine"
    if not is_debian(folder) and folder.is_dir() and any(folder.iterdir()):
        return f"{folder} holds files, but no finished Debian: name another folder"
    if not is_debian(folder) and shutil.which("debootstrap") is None:
        return "debootstrap is not installed: apt-get install debootstrap"
    if not BINFMT.is_file():
        return "Linux cannot start programs for ARM: apt-get install qemu-user-static binfmt-support"
    if not re.search(r"^flags: .*F", BINFMT.read_text(), re.MULTILINE):
        return f"{BINFMT} lacks the flag F, so QEMU is not found in a chroot: install qemu-user-static"
    if uv() is None:
        return "uv is missing: pip install uv"
    if find_spec("ziglang") is None:
        return "ziglang, which compiles the kernels for ARM, is missing: pip install ziglang"
    return ""


def is_debian(folder: Path) -> bool:
    """Whether a folder holds a Debian that debootstrap has finished."""
    return (folder / "etc" / "debian_version").is_file() and not (folder / "debootstrap").exists()


class Emulated:
    """An ARM Debian in a folder, and the CPU of QEMU's that runs it."""

    def __init__(self, folder: Path, cpu: str) -> None:
        self.folder, self.cpu = folder, cpu

    def inside(self, path: str) -> Path:
        """Where a path of the Debian is for this machine."""
        return self.folder / path.lstrip("/")

    def run(self, *command: str, path: str = PATH) -> None:
        """Run a command in the Debian, without this machine's environment. Raises CalledProcessError."""
        subprocess.run(self._words(command, path), check=True)

    def said(self, *command: str, path: str = PATH) -> str:
        """`run`, and what it printed on standard output."""
        words = self._words(command, path)
        return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE).stdout

    def _words(self, command: tuple[str, ...], path: str) -> list[str]:
        """/proc and /dev are mounted in a namespace of the process alone, so nothing stays mounted.

        /sys is not: torch crashes where it describes an x86 machine. See `describe_processor`.
        """
        mounts = 'mount --rbind /proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"'
        settings = (f"PATH={path}", "HOME=/root", "LANG=C.UTF-8", f"QEMU_CPU={self.cpu}")
        return [*NAMESPACE, "sh", "-c", mounts, str(self.folder), "/usr/bin/env", "-i", *settings, *command]


def make_debian(folder: Path, suite: str, mirror: str) -> None:
    """Make an ARM Debian by debootstrap, which runs its second half in QEMU."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ("--arch=arm64", "--variant=minbase", f"--include={','.join(PACKAGES)}")
    subprocess.run([*NAMESPACE, "debootstrap", *options, suite, str(folder), mirror], check=True)


def describe_processor(debian: Emulated) -> None:
    """Two files that torch's library cpuinfo reads; without them the norm of a vector raises an error."""
    folder = debian.inside("/sys/devices/system/cpu")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("possible", "present"):
        (folder / name).write_text(f"0-{(os.cpu_count() or 1) - 1}\n")


def install(debian: Emulated) -> None:
    """Install lowmem's wheel for ARM by the Debian's own pip, and its dependencies by uv, outside of QEMU."""
    if not all(debian.inside(f"/var/lib/dpkg/info/{name}.list").exists() for name in PACKAGES):
        shutil.copy("/etc/resolv.conf", debian.inside("/etc/resolv.conf"))
        debian.run("apt-get", "update")
        debian.run("apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)
    say("installing the dependencies")
    debian.run("python3", "-m", "venv", HOME)
    (packages,) = debian.inside(HOME).glob("lib/python3*/site-packages")
    python = packages.parent.name.removeprefix("python")
    command = [uv() or "uv", "pip", "install", "--quiet", "--target", str(packages)]
    command += [*for_system("linux-aarch64", python), "--constraint", "constraints.txt", "-r", "-"]
    lines = "\n".join([*wanted(), *TEST_PACKAGES])
    subprocess.run(command, input=lines, text=True, check=True, cwd=REPO)
    say("compiling and installing lowmem's wheel")
    wheel = build(TARGETS["linux-aarch64"], debian.inside(f"{HOME}/wheels"))
    pip = (f"{HOME}/bin/python", "-m", "pip", "--disable-pip-version-check")
    options = ("--quiet", "--no-index", "--no-deps", "--force-reinstall")
    debian.run(*pip, "install", *options, f"{HOME}/wheels/{wheel.name}")
    debian.run(*pip, "check")


def demo(debian: Emulated) -> str:
    """`lowmem demo` with an empty PATH; "" if both versions ran on lowmem's kernels, else the fault."""
    found = [name for name in _COMPILERS if debian.inside(f"/usr/bin/{name}").exists()]
    if found:
        return f"the Debian has a compiler: {', '.join(found)}"
    printed = debian.said(f"{HOME}/bin/lowmem", *DEMO, path="/nowhere")
    print(printed, flush=True)
    ran = sorted(set(_KERNEL.findall(printed)))
    return "" if ran == ["4-bit", "8-bit"] else f"lowmem's kernels computed {ran or 'nothing'}"


def oracle_tests(debian: Emulated) -> str:
    """The kernels' tests on TESTED_CPU; "" if they pass, else the fault."""
    place = debian.inside(f"{HOME}/checkout")
    for folder in (Path("tests"), Path("lowmem", "data")):
        shutil.copytree(REPO / folder, place / folder, dirs_exist_ok=True)
    shutil.copy(REPO / "pyproject.toml", place)
    (installed,) = debian.inside(HOME).glob("lib/python3*/site-packages/lowmem/benchmarks")
    experiments = REPO / "benchmarks" / "experiments"  # no part of a wheel; the tests' helpers use some
    shutil.copytree(experiments, installed / "experiments", dirs_exist_ok=True)
    files = [f"tests/kernels/test_{name}.py" for name in TESTS]
    pytest = f"cd {HOME}/checkout && exec {HOME}/bin/python -m pytest --timeout 1800 {' '.join(files)}"
    try:
        Emulated(debian.folder, TESTED_CPU).run("/bin/sh", "-c", pytest)
    except subprocess.CalledProcessError as error:
        return f"pytest ended with {error.returncode}"
    return ""


def say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code is 1 if the demo or a test failed, and 2 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="an ARM Debian, or where to make one")
    parser.add_argument("--only", choices=PARTS, help="one part; the others ran before")
    parser.add_argument("--suite", default="bookworm", help="Debian's release (default: %(default)s)")
    parser.add_argument("--mirror", default=MIRROR, help="of Debian (default: %(default)s)")
    parser.add_argument("--cpu", default=CPU, help="QEMU's CPU for the demo (default: %(default)s)")
    args = parser.parse_args(argv)
    folder = args.folder.absolute()
    if missing := lacks(folder):
        print(missing, file=sys.stderr)
        return 2
    debian, results = Emulated(folder, args.cpu), []
    for part in PARTS if args.only is None else (args.only,):
        began = time.monotonic()
        try:
            fault = _part(part, debian, args)
        except subprocess.CalledProcessError as error:
            fault = f"exit code {error.returncode}"
        results.append((part, fault))
        print(f"{part}: {fault or 'passed'}, {time.monotonic() - began:.0f} s", flush=True)
        if fault and part == "install":
            break
    return int(any(fault for _, fault in results))


def _part(part: str, debian: Emulated, args: argparse.Namespace) -> str:
    if part == "install":
        if not is_debian(debian.folder):
            make_debian(debian.folder, args.suite, args.mirror)
        describe_processor(debian)
        install(debian)
        return ""
    return demo(debian) if part == "demo" else oracle_tests(debian)


if __name__ == "__main__":
    sys.exit(main())
