"""Warnings about the machine that a benchmark runs on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lowmem.benchmarks.latency import machine_state


def test_load_governor_and_busy_processes(tmp_path: Path) -> None:
    assert machine_state.load_warning(1.0, 2) == ""
    assert "load average 1.20 on 2 cores" in machine_state.load_warning(1.2, 2)
    for core, (governor, driver) in enumerate(
        [("powersave", "acpi-cpufreq"), ("powersave", "intel_pstate"), ("performance", "acpi-cpufreq")]
    ):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(governor + "\n")
        (folder / "scaling_driver").write_text(driver + "\n")
    assert "keeps 1 cores slow" in machine_state.governor_warning(tmp_path)
    assert machine_state.governor_warning(tmp_path / "none") == ""
    before = {(1, "idle"): 5.0, (2, "make"): 1.0, (3, "gone"): 0.0}
    after = {(1, "idle"): 5.01, (2, "make"): 1.4, (4, "new"): 9.0}
    assert machine_state.busy_warnings(before, after, 0.5) == ["make (process 2) used 80% of a core"]


def test_swapping_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine_state.Before((), machine_state._swapped())
    assert machine_state.swap_warning(before) == ""
    moved = before.swapped + (64 << 20)
    monkeypatch.setattr(machine_state, "_swapped", lambda: moved)
    assert machine_state.swap_warning(before).startswith("64 MiB were swapped")


def test_a_busy_process_is_detected() -> None:
    """Start a real process that computes until it is killed."""
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            before, after = machine_state._processor_times(0.3)
            key = next((key for key in after if key[0] == child.pid), None)
            if key is not None and after[key] > before.get(key, after[key]):
                break
        assert key is not None and after[key] > before[key]
        assert not any(pid == os.getpid() for pid, _ in after)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
