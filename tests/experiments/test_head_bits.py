"""The measurement of an 8-bit head: what it measures, and the committed record beside the documents."""

from __future__ import annotations

from pathlib import Path

import pytest
from lowmem.benchmarks.experiments import head_bits
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions

from lowmem.kernels.table_format import table_bytes
from tests.helpers import REPO, TINY_STARCHAT


def test_both_heads_are_compared_with_the_unquantized_model(tmp_path: Path) -> None:
    """Two rows of each text: an 8-bit head alone costs little, and the record is read again."""
    out = tmp_path / "head.json"
    assert head_bits.main([str(TINY_STARCHAT), "--rows", "2", "--no-speed", "--out", str(out)]) == 0
    record = head_bits.Experiment("head_bits", head_bits.HeadBits, out, head_bits.render).read()
    assert {(one.version, one.head_bits) for one in record.quality} == {("float32", 8)}
    assert [one.text for one in record.quality] == list(head_bits.TEXTS)
    assert all(0 < one.kld < 0.001 and one.same_top > 0.97 for one in record.quality)


def test_both_heads_decode_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Dimensions(layers=1, n_embd=256, heads=4, n_positions=256, vocab=4100)
    monkeypatch.setattr(head_bits, "Dimensions", lambda layers: small)
    out = tmp_path / "pace.json"
    assert head_bits.main(["--rounds", "2", "--layers", "1", "--out", str(out)]) == 0
    record = head_bits.Experiment("head_bits", head_bits.HeadBits, out, head_bits.render).read()
    assert [one.head_bits for one in record.pace] == [16, 8] and not record.quality
    assert record.pace[0].weight_bytes - record.pace[1].weight_bytes == 2 * 4100 * 256 - table_bytes(
        4100, 256
    )
    assert all(len(one.token_ms.values) == 2 for one in record.pace)


@pytest.mark.parametrize("name", ["head_bits", "head_pace"])
def test_the_documents_have_the_committed_figures(name: str) -> None:
    record = head_bits.Experiment(
        "head_bits", head_bits.HeadBits, head_bits.RESULTS / f"{name}.json", head_bits.render
    ).read()
    text = (REPO / "docs" / "measurements.md").read_text(encoding="utf-8")
    for table in head_bits.render(record).split("\n\n")[:-1]:
        assert table in text
