"""`lowmem demo` converts, answers and measures."""

from __future__ import annotations

from lowmem.cli import main


def test_demo_converts_answers_and_measures(capsys, tmp_path, monkeypatch):
    """With a twelfth of the text; other tests check the figures."""
    monkeypatch.setattr("lowmem.benchmarks.demo.TEXT_ROWS", 2)
    assert main(["demo", "--rows", "2", "--new-tokens", "4", "--keep", str(tmp_path / "kept")]) == 0
    said = capsys.readouterr()
    for name in ("bfloat16", "8-bit g128", "4-bit g128"):
        assert f"# {name} answers" in said.err
        assert f"\n  {name} " in said.out
    assert "on 1,024 tokens of held-out code" in said.out
    assert (tmp_path / "kept" / "4bit" / "model.safetensors").is_file()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["4bit", "8bit"]
