"""`lowmem demo` converts, answers and measures."""

from __future__ import annotations

import json

import pytest

from lowmem.cli import main


def test_demo_converts_answers_and_measures(capsys, tmp_path):
    """With a twelfth of the text and without tuning; other tests check the figures."""
    small = ["--rows", "2", "--text-rows", "2", "--new-tokens", "4", "--effort", "fast"]
    assert main(["demo", *small, "--keep", str(tmp_path / "kept")]) == 0
    said = capsys.readouterr()
    for name in ("bfloat16", "8-bit g128", "4-bit g128"):
        assert f"# {name} answers" in said.err
        assert f"\n  {name} " in said.out
    assert "on 1,024 tokens of held-out code" in said.out
    assert (tmp_path / "kept" / "4bit" / "model.safetensors").is_file()
    config = json.loads((tmp_path / "kept" / "4bit" / "config.json").read_text())
    assert config["quantization_config"]["meta"]["tune_steps"] == 0
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["4bit", "8bit"]


@pytest.mark.parametrize("option", ["--rows", "--new-tokens", "--text-rows"])
def test_a_number_below_one_is_refused_before_anything_is_converted(capsys, tmp_path, option):
    assert main(["demo", option, "0", "--keep", str(tmp_path / "kept")]) == 2
    assert f"{option} must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
