"""What the emulated demo says where it cannot run. The demo itself takes too long for a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat import arm_demo

REGISTERED = "enabled\ninterpreter /usr/bin/qemu-aarch64-static\nflags: {flags}\noffset 0\n"


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with everything, and the path of a folder for a Debian."""
    binfmt = tmp_path / "qemu-aarch64"
    binfmt.write_text(REGISTERED.format(flags="PF"))
    monkeypatch.setattr(arm_demo, "BINFMT", binfmt)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(arm_demo, "uv", lambda: "/usr/bin/uv")
    monkeypatch.setattr(arm_demo, "find_spec", lambda name: name)
    return tmp_path / "debian"


def test_nothing_is_missing(able: Path) -> None:
    assert arm_demo.lacks(able) == ""


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("sys.platform", "darwin", "on Linux alone"),
        ("os.geteuid", lambda: 1000, "need root"),
        ("shutil.which", lambda name: None, "apt-get install debootstrap"),
        ("tests.compat.arm_demo.BINFMT", Path("/nowhere"), "apt-get install qemu-user-static"),
        ("tests.compat.arm_demo.uv", lambda: None, "pip install uv"),
        ("tests.compat.arm_demo.find_spec", lambda name: None, "pip install ziglang"),
    ],
)
def test_what_is_missing_is_named(
    able: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str, value, said: str
) -> None:
    monkeypatch.setattr(name, value)
    assert arm_demo.main([str(able)]) == 2
    assert said in capsys.readouterr().err


def test_an_emulator_outside_of_the_chroot_is_not_enough(able: Path) -> None:
    arm_demo.BINFMT.write_text(REGISTERED.format(flags="P"))
    assert "lacks the flag F" in arm_demo.lacks(able)


def test_a_finished_debian_needs_no_debootstrap(able: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    (able / "etc").mkdir(parents=True)
    (able / "etc" / "debian_version").write_text("12.12\n")
    assert arm_demo.lacks(able) == ""


@pytest.mark.parametrize("left", ["debootstrap", "thesis"])
def test_other_folders_are_left_alone(able: Path, left: str) -> None:
    """One with files of a user, and one that an interrupted debootstrap left."""
    (able / left).mkdir(parents=True)
    if left == "debootstrap":
        (able / "etc").mkdir()
        (able / "etc" / "debian_version").write_text("12.12\n")
    assert "no finished Debian" in arm_demo.lacks(able)
