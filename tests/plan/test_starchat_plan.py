"""StarChat Alpha's plan: the published figures, the golden file, and the table in docs/run.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lowmem.benchmarks.experiments.starchat import plan as starchat_plan

from lowmem.plan.planner import Plan
from tests.commands.command_lines import ENVIRONMENT
from tests.helpers import REPO


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return starchat_plan.plans()


def test_weights_are_the_published_ones(plans: dict[str, Plan]) -> None:
    """MiB with float16 embeddings and a tied head, computed by hand from 15,517,480,960 parameters."""
    found = {o.candidate.label: o.need.weights / 2**20 for o in plans["24 GiB card"].options}
    assert found["float16"] == pytest.approx(15_517_480_960 * 2 / 2**20)
    expected = {"float16": 29_597, "8-bit g128": 15_483, "4-bit g128": 8_196, "3-bit g128": 6_375}
    assert {label: round(found[label]) for label in expected} == expected


def test_the_kv_cache_has_one_head(plans: dict[str, Plan]) -> None:
    """20,480 bytes a token: 160 MiB at 8192, not 48 times as much."""
    assert all(o.need.kv_cache == 20_480 * 8192 for o in plans["8 GiB card"].options)


def test_plan_of_the_real_layout_is_the_golden_one(plans: dict[str, Plan]) -> None:
    """To the byte. `python -m lowmem.benchmarks.experiments.starchat.plan --write` renews the file."""
    golden = json.loads(starchat_plan.RESULT.read_text(encoding="utf-8"))
    assert starchat_plan.golden(plans) == golden


def test_the_guide_has_this_table(plans: dict[str, Plan]) -> None:
    assert starchat_plan.markdown(plans) in (REPO / "docs" / "run.md").read_text(encoding="utf-8")


def test_the_command_says_the_same_and_loads_no_torch(plans: dict[str, Plan], tmp_path: Path) -> None:
    """`lowmem plan --vram` on the 31 GB of pickle shards, with no weight read and torch never imported."""
    source = starchat_plan.starchat_header_replica(tmp_path / "starchat-alpha")
    starchat_plan.gptq_header_replica(tmp_path / "starchat-alpha-4bit", 4, 128)
    code = (
        "import sys\nfrom lowmem.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    command = ["plan", str(source), "--vram", "12GiB", "--ram", "16GiB", "--json"]
    result = subprocess.run(
        [sys.executable, "-c", code, *command],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "LOWMEM_CACHE": str(tmp_path / "cache")},
    )
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout)
    expected = starchat_plan.golden(plans)["12 GiB card"]
    for key in ("label", "weights", "kv_cache", "workspace", "own_context", "need", "longest_context"):
        assert got["chosen"][key] == expected["chosen"][key], key
    assert [o["label"] for o in got["possible"]] == [
        "8-bit g128",
        "6.1-bit mixed, 8-bit head",
        "3-bit g128",
        "2-bit g128",
    ]
