"""Stored references: they reproduce the log-probabilities, are reused, and are recomputed if damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.benchmarks.quality.reference_states import cache_folder, reference_states
from lowmem.benchmarks.quality.texts import Text, digest_of

from lowmem.checkpoint import cache
from lowmem.checkpoint.source.open import open_source
from lowmem.streaming.forward import StreamedModel
from tests.helpers import save_source, tiny_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch) -> StreamedModel:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "model")
    return StreamedModel(open_source(tmp_path / "model"), torch.float32)


def text(name: str, seed: int, rows: int = 3) -> Text:
    ids = torch.randint(0, 4096, (rows, 20), generator=torch.Generator().manual_seed(seed))
    return Text(name, ids, digest_of(ids))


TEXTS = (text("one", 1), text("two", 2, rows=2))


def computed(
    model: StreamedModel, texts=TEXTS, folder: Path | None = None
) -> tuple[Any, list[int], list[str]]:
    """Returns (the reference, the computed layers, notes)."""
    layers: list[int] = []
    notes: list[str] = []
    found = reference_states(
        model, texts, folder or cache_folder(model), lambda done, _: layers.append(done), notes.append
    )
    return found, layers, notes


def test_log_probabilities_from_the_cache_equal_those_of_transformers(model, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    computed(model)
    found, layers, _ = computed(model)
    assert not layers  # read from the cache
    for one in TEXTS:
        with torch.no_grad():
            expected = torch.log_softmax(whole(input_ids=one.rows, use_cache=False).logits.double(), -1)
        states = found.states[one.name].read(0, len(one.rows))
        with model.head() as logits:  # in other chunks than when it was computed
            parts = [torch.log_softmax(logits(p).double(), -1) for p in states.flatten(0, 1).split(7)]
        error = (torch.cat(parts).view_as(expected) - expected).abs().max()
        assert error < 5e-6


def test_texts_are_stored_separately(model):
    _, layers, _ = computed(model, TEXTS[:1])
    assert layers == [0, 1, 2]
    found, layers, _ = computed(model)
    assert layers == [0, 1, 2] and found.seconds > 0 and found.peak_bytes > 0
    found, layers, notes = computed(model, TEXTS[::-1])
    assert not layers and not notes and found.seconds == 0 and found.peak_bytes == 0
    assert found.cache_bytes == 5 * 20 * 64 * 4


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "json", "version"])
def test_damage_is_detected_and_recomputed(model, damage):
    before, _, _ = computed(model)
    path = before.states["one"].path
    expected = path.read_bytes()
    about = path.with_suffix(".json")
    if damage == "flip":
        path.write_bytes(bytes([expected[0] ^ 1]) + expected[1:])
    elif damage == "cut":
        path.write_bytes(expected[:-4])
    elif damage == "gone":
        path.unlink()
    elif damage == "json":
        about.write_text("{")
    else:
        about.write_text(json.dumps({**json.loads(about.read_text()), "lowmem": "0.0.1"}))
    found, layers, notes = computed(model)
    assert layers == [0, 1, 2] and found.states["one"].path.read_bytes() == expected
    assert bool(notes) is (damage != "version")


def test_another_dtype_text_or_source_needs_another_reference(model, tmp_path):
    computed(model)
    half = StreamedModel(open_source(tmp_path / "model"), torch.bfloat16)
    found, layers, _ = computed(half)
    assert layers and found.states["one"].dtype == torch.bfloat16
    assert not computed(model)[1]
    assert computed(model, [text("one", 3)])[1]
    save_source(tiny_model("gpt_bigcode_mqa", seed=1), tmp_path / "other")
    other = StreamedModel(open_source(tmp_path / "other"), torch.float32)
    assert cache_folder(other) != cache_folder(model)


def test_the_checkpoint_cache_does_not_list_references(model):
    computed(model)
    folder = cache_folder(model)
    assert folder.is_relative_to(cache.cache_root()) and list(folder.iterdir())
    assert cache.entries() == []
    place = cache.claim("owner/name", "4bit-g128")
    cache.prune(place)
    assert not computed(model)[1]


def test_an_interrupted_reference_resumes(model):
    def stop(done: int, count: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference_states(model, TEXTS, cache_folder(model), stop)
    _, layers, _ = computed(model)
    assert layers == [1, 2]
    assert not list(cache_folder(model).glob("*.partial"))
