"""The experiment on exported files: its versions, and a GGUF's weights back in transformers' model."""

from __future__ import annotations

import pytest
import torch
from lowmem.benchmarks.experiments.peers.exported import EXPORTED, versions
from lowmem.benchmarks.experiments.peers.steps import fill_from_gguf, stored_size

from lowmem.export.export import export
from tests.helpers import save_source, tiny_model


def test_every_width_is_measured_four_ways():
    found = versions()
    assert len({version.label for version in found}) == len({version.key for version in found}) == len(found)
    assert [version.method for version in found] == ["gptq", "unpacked", "gguf", "gguf"] * 3
    files = {version.key for version in found if version.of and version.method == "gguf"}
    assert {version.of for version in found if version.method == "unpacked"} == files


@pytest.mark.parametrize("kind", ["gpt_bigcode_mha", "llama"])
def test_a_files_weights_in_the_model(tmp_path, kind):
    model = tiny_model(kind)
    file = export(str(save_source(model, tmp_path / "m")), tmp_path / "m.gguf").path
    other = tiny_model(kind, seed=1)
    fill_from_gguf(other, file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    bits, nbytes = stored_size("unpacked", file, "")
    assert bits == 32 and nbytes == sum(p.numel() * 4 for p in model.parameters())


def test_the_committed_record_holds_what_the_documents_say():
    """The file has the checkpoint's figures exactly; in llama.cpp it is far better than llama.cpp's own."""
    record = EXPORTED.read()
    four = {version.subject.label: version for version in record.versions}
    checkpoint, unpacked = four["lowmem 4-bit g128"], four["its Q4_0 file, dequantized"]
    for ours, file in zip(checkpoint.texts, unpacked.texts, strict=True):
        assert ours.kld.mean == pytest.approx(file.kld.mean, rel=1e-4)
        assert ours.same_top1 == pytest.approx(file.same_top1, abs=1e-4)
    exported, own = four["its Q4_0 file in llama.cpp"], four["llama.cpp Q4_0"]
    assert exported.texts[0].kld.mean <= 0.0032 < own.texts[0].kld.mean / 2
    assert "its Q4_0 file in llama.cpp" in EXPORTED.render(record)
