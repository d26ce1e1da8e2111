"""The day at a card, run on the CPU: Triton's interpreter and small shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lowmem.benchmarks.common.origin import origin_of
from lowmem.benchmarks.experiments.gpu_day import __main__ as command
from lowmem.benchmarks.experiments.gpu_day.page import render
from lowmem.benchmarks.experiments.gpu_day.record import GpuDay, ModelRun, Product, Step

from lowmem.config import BITS
from tests.helpers import REPO

PRODUCT = Product("lowmem Triton", "4-bit g128", 6144, 24576, 1, 2e-4, 80_000_000)
DAY = GpuDay(
    origin_of((), "made-up weights", ""),
    "a card, 12.00 GiB",
    4e11,
    (Step("tests", "failed", 3.0, "RuntimeError: no image"), Step("kernels", "ok", 2.0, "```")),
    (PRODUCT, replace(PRODUCT, kernel="MarlinLinear", rows=0, seconds=0.0, problem="nvcc is missing")),
    (ModelRun("4-bit", "lowmem Triton", 4, 4096, 3 << 30, 2 << 30, 120.5, 900.0),),
)


def test_the_page_has_everything() -> None:
    page = render(DAY)
    assert "| 4-bit g128 | lowmem Triton | 200 | 400 (100%) |" in page
    assert "nvcc is missing" in page and "| tests | failed | 3 |" in page and "no image" in page
    assert "| 4-bit | lowmem Triton | 4 | 4096 | 3.00 GiB | 2.00 GiB | 120.5 | 900 |" in page
    assert page.count("```") == 4, "a step's output ends its block"


def test_without_a_card_it_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "day.json"), "--work", str(tmp_path)]) == 2
    assert "--tiny" in capsys.readouterr().err and not (tmp_path / "day.json").exists()


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param("models", marks=pytest.mark.slow),
        pytest.param("tests,doctor,kernels,conversion", marks=pytest.mark.slow),
    ],
)
def test_the_day_on_the_cpu(steps: str, tmp_path: Path) -> None:
    """Nothing fails: a model with memory and pace; kernels at every width, a conversion."""
    out = tmp_path / "day.json"
    words = ["--tiny", "--only", steps, "--work", str(tmp_path)]
    line = [sys.executable, "-m", "lowmem.benchmarks.experiments.gpu_day", *words, "--out", str(out)]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    day = json.loads(out.read_text())
    states = {step["name"]: step["status"] for step in day["steps"]}
    assert states == {name: "skipped" if name == "tests" else "ok" for name in steps.split(",")}, day["steps"]
    assert "# CPU" in out.with_suffix(".md").read_text()
    if "kernels" in steps:
        timed = {p["version"] for p in day["products"] if p["kernel"] == "lowmem Triton" and p["seconds"] > 0}
        assert timed == {f"{bits}-bit g32" for bits in BITS}
    else:
        assert day["models"][0]["kernel"] == "lowmem Triton" and day["models"][0]["decode"] > 0
