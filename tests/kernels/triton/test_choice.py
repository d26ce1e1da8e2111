"""How our kernels for cards are launched, chosen by times that the tests make up, and remembered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem.checkpoint.formats import LinearFormat
from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.triton.choice import (
    DENSE_ROWS,
    FEW_ROWS,
    MOST_PARTS,
    SCRATCH_WEIGHTS,
    Choice,
    DecodeShape,
    PrefillShape,
    scratch_columns,
    tuned,
    usual,
)

SPEC = LinearSpec(6144, 24576, True, LinearFormat(4, 128))
CPU = torch.device("cpu")


def test_the_fastest_launches_are_chosen_and_failing_ones_never() -> None:
    best = Choice(DecodeShape(128, 8, 4), PrefillShape(16, block=64), PrefillShape(32), 64)

    def seconds(choice: Choice, rows: int) -> float:
        if rows == 1:
            if choice.decode.block == 256:
                return float("inf")  # it does not fit this card
            return 1 + abs(choice.decode.parts - 4) + (choice.decode.warps != 8) / 8
        if rows == 16:
            return 1 + (choice.tile != best.tile)
        if choice.dense_rows <= rows:
            return 10
        return rows / 6.3 if choice.prefill == best.prefill else rows

    assert tuned(SPEC, 28, seconds) == best


def test_half_the_outputs_are_chosen_where_several_rows_are_faster_with_them() -> None:
    def seconds(choice: Choice, rows: int) -> float:
        return 1 + (rows == FEW_ROWS and choice.decode.several != 128)

    shape = tuned(SPEC, 28, seconds).decode
    assert (shape.outputs(1), shape.outputs(2), shape.outputs(FEW_ROWS)) == (256, 128, 128)
    assert DecodeShape().outputs(FEW_ROWS) == DecodeShape().block


def test_where_nothing_can_be_timed_the_choice_is_still_one() -> None:
    found = tuned(SPEC, 28, lambda choice, rows: float("inf"))
    assert found.decode.parts in (1, 2, 4, 8, MOST_PARTS) and found.dense_rows >= DENSE_ROWS


def test_a_choice_survives_json() -> None:
    choice = tuned(SPEC, 46, lambda choice, rows: hash(repr(choice)) % 97)
    assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice
    with pytest.raises((TypeError, KeyError)):
        Choice.from_json({"decode": {"block": 1, "other": 2}})


def test_the_scratch_is_bounded() -> None:
    for inputs, outputs in ((6144, 24576), (24576, 6144), (1 << 18, 4096), (64, 64)):
        columns = scratch_columns(inputs, outputs)
        assert columns <= outputs
        assert columns * inputs <= max(SCRATCH_WEIGHTS, 128 * inputs)


class Card:
    """A linear on a card that is not here."""

    qweight = SimpleNamespace(device=torch.device("cuda", 0))
    in_features, out_features, bias, middle = 6144, 6400, None, True
    format = LinearFormat(4, 128)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Counts the shapes that are timed."""
    timing = pytest.importorskip("lowmem.kernels.triton.timing")
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path))
    properties = SimpleNamespace(name="a card", multiprocessors=28)
    cards = SimpleNamespace(properties=lambda device: properties)
    monkeypatch.setattr(timing, "cards_of", lambda device: cards)
    monkeypatch.setattr(timing, "_chosen", {})
    counted: list[int] = []

    def stopwatch(linear: Any, dtype: torch.dtype) -> Any:
        counted.append(linear.out_features)
        return lambda choice, rows: abs(choice.decode.parts - 2) + 1.0

    monkeypatch.setattr(timing, "stopwatch", stopwatch)
    return counted


def test_a_shape_is_timed_once_and_remembered(
    timed: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lowmem.kernels.triton import timing

    first = timing.choose(Card(), torch.bfloat16)  # type: ignore[arg-type]
    assert first.decode.parts == 2 and timing.choose(Card(), torch.bfloat16) == first  # type: ignore[arg-type]
    monkeypatch.setattr(timing, "_chosen", {})  # the next process
    assert timing.choose(Card(), torch.bfloat16) == first and timed == [6400]  # type: ignore[arg-type]
    timing.choose(Card(), torch.float16)  # type: ignore[arg-type]
    assert len(timed) == 2
    assert len(json.loads((tmp_path / timing.FILE).read_text())) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"%s": {"decode": 3}}', '{"%s": null}'])
def test_a_damaged_file_is_timed_again(
    damage: str, timed: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lowmem.kernels.triton import timing

    right = timing.choose(Card(), torch.bfloat16)  # type: ignore[arg-type]
    file = tmp_path / timing.FILE
    key = next(iter(json.loads(file.read_text())))
    file.write_text(damage.replace("%s", key))
    monkeypatch.setattr(timing, "_chosen", {})
    assert timing.choose(Card(), torch.bfloat16) == right and len(timed) == 2  # type: ignore[arg-type]
    assert key in json.loads(file.read_text())


def test_on_a_cpu_nothing_is_timed() -> None:
    timing = pytest.importorskip("lowmem.kernels.triton.timing")
    linear = Card()
    linear.qweight = SimpleNamespace(device=CPU)  # type: ignore[misc]
    assert timing.choose(linear, torch.float32) == usual(replace(SPEC, out_features=6400, bias=False), 1)
