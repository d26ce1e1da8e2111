"""Build a wheel for every system, on one machine.

    python -m lowmem.kernels.building.wheels dist            all (make wheels)
    python -m lowmem.kernels.building.wheels dist NAME ...   some, such as linux-aarch64

Needs setuptools and ziglang, and runs in a checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from lowmem.kernels.building.targets import TARGETS, Target

ROOT = Path(__file__).parents[3]
FOLDER = "lowmem/kernels/native"
_MAGIC = {
    "linux-x86_64": (b"\x7fELF\x02\x01", 18, b"\x3e\x00"),
    "linux-aarch64": (b"\x7fELF\x02\x01", 18, b"\xb7\x00"),
    "macos-arm64": (b"\xcf\xfa\xed\xfe", 4, b"\x0c\x00\x00\x01"),
    "macos-x86_64": (b"\xcf\xfa\xed\xfe", 4, b"\x07\x00\x00\x01"),
    "windows-x86_64": (b"MZ", -1, b"PE\x00\x00\x64\x86"),
}
"""By target: how the library begins, then where its processor stands (-1: where the header points) and what
stands there."""


def build(target: Target, folder: Path) -> Path:
    """Build the wheel of one target into `folder`; returns its path. Raises SystemExit with the reason."""
    with tempfile.TemporaryDirectory() as scratch:
        objects = ROOT / "build" / "objects" / target.name
        words = ["egg_info", "--egg-base", scratch]
        words += ["build", "--build-base", scratch, "--build-temp", str(objects)]
        words += ["bdist_wheel", "--bdist-dir", f"{scratch}/bdist", "--dist-dir", f"{scratch}/dist"]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "setup.py", "--quiet", *words],
            cwd=ROOT,
            env={**os.environ, "LOWMEM_TARGET": target.name},
            capture_output=True,
            text=True,
        )
        made = list((Path(scratch) / "dist").glob("*.whl"))
        if done.returncode or len(made) != 1:
            raise SystemExit(f"the wheel for {target.name} was not built:\n{done.stdout}{done.stderr}")
        if wrong := fault(made[0], target):
            raise SystemExit(f"the wheel for {target.name} is not right: {wrong}\n{done.stderr}")
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(made[0], folder))


def fault(wheel: Path, target: Target) -> str:
    """What is wrong with a wheel's name, its tags or its library; "" if nothing is."""
    if not wheel.name.endswith(f"-py3-none-{target.tag}.whl"):
        return f"it is named {wheel.name}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = [name for name in names if name.endswith((".so", ".dylib", ".dll", ".pyd"))]
        if libraries != [f"{FOLDER}/{target.library}"]:
            return f"its libraries are {libraries}"
        described = next(archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
        library = archive.read(libraries[0])
    if "Root-Is-Purelib: false" not in described or f"Tag: py3-none-{target.tag}\n" not in described:
        return f"it describes itself as {described}"
    begins, place, processor = _MAGIC[target.name]
    place = int.from_bytes(library[60:64], "little") if place < 0 else place
    if not library.startswith(begins) or library[place : place + len(processor)] != processor:
        return "its library is for another system"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    unknown = [name for name in words[1:] if name not in TARGETS]
    if not words or unknown or words[0].startswith("-"):
        print(
            f"usage: python -m lowmem.kernels.building.wheels FOLDER [{' '.join(TARGETS)}]", file=sys.stderr
        )
        return 2
    for name in words[1:] or TARGETS:
        print(build(TARGETS[name], Path(words[0]).resolve()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
