"""The next layer's bytes are read into the page cache in the background."""

from __future__ import annotations

import pytest
import torch

from lowmem.checkpoint.source.open import open_source
from lowmem.streaming.read_ahead import read_ahead
from tests.helpers import save_source, starchat_replica, tiny_model


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_the_requested_bytes_are_the_tensors(layout, tmp_path):
    if layout == "bin":
        folder = starchat_replica(tmp_path / "source")
    else:
        folder = save_source(tiny_model("llama"), tmp_path / "source", dtype=torch.float16)
    source = open_source(str(folder))
    names = [name for name, info in source.infos.items() if len(info.shape) == 2][:6]
    found = source.byte_ranges(names)
    assert len(found) == len(names)
    for name, part in zip(names, found, strict=True):
        data = part.path.read_bytes()[part.begin : part.begin + part.size]
        wanted = source.read(name).contiguous().view(torch.uint8).numpy().tobytes()
        assert wanted in data
        assert len(data) <= len(wanted) + 1024
    source.release()
    thread = read_ahead(source, names)
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()


def test_a_missing_file_is_ignored(tmp_path):
    folder = save_source(tiny_model("llama"), tmp_path / "source")
    source = open_source(str(folder))
    names = list(source.infos)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    thread = read_ahead(source, names)
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()
