"""Garbage collection is paused while a model is loaded, and restored afterwards, also after errors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem.errors import SourceError
from lowmem.loading.garbage import paused_collection
from lowmem.loading.loader import load
from tests.helpers import TINY_STARCHAT


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


def test_it_is_paused_inside_and_as_it_was_outside() -> None:
    with paused_collection():
        assert not gc.isenabled()
        with paused_collection():
            pass
        assert not gc.isenabled(), "the inner one ends no outer one"
    assert gc.isenabled()
    with pytest.raises(KeyError), paused_collection():
        raise KeyError
    assert gc.isenabled()
    gc.disable()  # somebody else's wish stays
    with paused_collection():
        pass
    assert not gc.isenabled()


def test_a_load_is_not_collected_in_and_failing_ones_leave_it_on(tmp_path: Path) -> None:
    seen: list[str] = []
    gc.collect()
    gc.callbacks.append(lambda phase, info: seen.append(phase))
    try:
        loaded = load(TINY_STARCHAT, progress=lambda done, total: seen.append("reading"))
        assert "reading" in seen and "start" not in seen[: len(seen) - seen[::-1].index("reading")]
    finally:
        gc.callbacks.pop()
    assert loaded.model is not None and gc.isenabled()
    with pytest.raises(SourceError):
        load(tmp_path)
    assert gc.isenabled()
