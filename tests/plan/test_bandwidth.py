"""Memory bandwidth: measured once, kept, and measured again when the machine is another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from lowmem.plan import bandwidth
from lowmem.plan.bandwidth import (
    MACHINE_FILE,
    card_bandwidth,
    host_bandwidth,
    machine_name,
    measure_host,
)
from lowmem.platform import system
from tests.helpers import REPO


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """measure_host as a counter: the n-th measurement gives n GB/s."""
    calls: list[int] = []

    def measure() -> float:
        calls.append(1)
        return len(calls) * 1e9

    monkeypatch.setattr(bandwidth, "measure_host", measure)
    return calls


def test_a_real_measurement_is_plausible(tmp_path: Path) -> None:
    """Slower than a cache by far, faster than a disk: a wide range, since machines differ."""
    rate = host_bandwidth(folder=tmp_path).bytes_per_second
    assert 1e9 < rate < 5e12
    kept = json.loads((tmp_path / MACHINE_FILE).read_text())["host_bandwidth"]
    assert kept["bytes_per_second"] == rate and kept["machine"] == machine_name() and len(kept["date"]) == 10


def test_every_core_reads_and_all_bytes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says one second a pass, the figure is the bytes of the buffer."""
    monkeypatch.setattr(bandwidth, "_buffer_bytes", lambda: 48 << 20)
    monkeypatch.setattr(system, "usable_cores", lambda: {0, 1, 2})
    sizes: list[int] = []
    largest = numpy.max
    monkeypatch.setattr(numpy, "max", lambda a: (sizes.append(a.nbytes), largest(a))[1])

    def one_second(one_pass: object, seconds: float, least: int) -> float:
        one_pass()  # type: ignore[operator]
        return 1.0

    monkeypatch.setattr(bandwidth, "best", one_second)
    assert measure_host() == sum(sizes) == 48 << 20
    assert len(sizes) == 3


def test_the_buffer_is_past_the_caches_and_leaves_memory_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bandwidth._LEAST_BUFFER <= bandwidth._buffer_bytes() <= bandwidth._MOST_BUFFER
    monkeypatch.setattr(bandwidth, "host_memory_available", lambda: 64 << 20)
    assert bandwidth._buffer_bytes() == 8 << 20


def test_it_is_measured_once(tmp_path: Path, counted: list[int]) -> None:
    folder = tmp_path / "not" / "there"
    assert [host_bandwidth(folder=folder).bytes_per_second for _ in range(3)] == [1e9] * 3
    assert host_bandwidth(refresh=True, folder=folder).bytes_per_second == 2e9
    assert host_bandwidth(folder=folder).bytes_per_second == 2e9
    assert [path.name for path in folder.iterdir()] == [MACHINE_FILE]


def test_another_machine_is_measured_anew(
    tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home folder on a network, or a container that gets more cores."""
    host_bandwidth(folder=tmp_path)
    monkeypatch.setattr(system, "usable_cores", lambda: set(range(1024)))
    assert host_bandwidth(folder=tmp_path).bytes_per_second == 2e9
    assert "1024 cores" in host_bandwidth(folder=tmp_path).machine


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"host_bandwidth": 3}',
        '{"host_bandwidth": {"bytes_per_second": "fast", "machine": "NAME", "date": ""}}',
        '{"host_bandwidth": {"bytes_per_second": 0, "machine": "NAME", "date": ""}}',
        '{"host_bandwidth": {"bytes_per_second": NaN, "machine": "NAME", "date": ""}}',
        '{"host_bandwidth": {"bytes_per_second": 1e300, "machine": "NAME", "date": ""}}',
    ],
)
def test_a_damaged_file_is_measured_over(text: str, tmp_path: Path, counted: list[int]) -> None:
    (tmp_path / MACHINE_FILE).write_text(text.replace("NAME", machine_name()))
    assert host_bandwidth(folder=tmp_path).bytes_per_second == 1e9
    assert host_bandwidth(folder=tmp_path).bytes_per_second == 1e9 and len(counted) == 1


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, counted: list[int]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert host_bandwidth(folder=file / "below").bytes_per_second == 1e9


@pytest.mark.parametrize(("seconds", "least"), [(12.0, 2), (2.0, 3)])
def test_the_best_pass_is_taken(seconds: float, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of 5, 3 and 4 seconds: 3, and the first of all is not counted."""
    clock = [0.0]
    lengths = iter([1.0, 5.0, 3.0, 4.0, 2.0])
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: clock[0])

    def one_pass() -> None:
        clock[0] += next(lengths)

    assert bandwidth.best(one_pass, seconds, least) == 3.0


def test_a_cards_twin() -> None:
    """The card's copy, on the CPU: reads and writes count."""
    assert 5e8 < card_bandwidth(torch.device("cpu")) < 5e12


def test_the_planner_needs_no_torch_for_it(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from lowmem.plan.bandwidth import host_bandwidth\n"
        f"host_bandwidth(folder=Path({str(tmp_path)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
