"""Several answers at once in `lowmem bench latency`: planned, timed, recorded and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from lowmem.benchmarks.common.lineup import LineupRequest, line_up
from lowmem.benchmarks.common.origin import origin_of
from lowmem.benchmarks.common.record_file import from_json, to_json
from lowmem.benchmarks.common.records import LatencyRecord
from lowmem.benchmarks.common.work_file import WorkFile
from lowmem.benchmarks.latency import timing
from lowmem.benchmarks.latency.planning import Budget, PlannedVersion, choose_lengths, plan_version
from lowmem.benchmarks.latency.rounds import Rounds
from lowmem.benchmarks.latency.summary import make_record
from lowmem.benchmarks.latency.tasks import BatchTime, Timings, TimingTask
from lowmem.benchmarks.latency.together import step_seconds
from lowmem.benchmarks.report.latency_sections import batch_table, decode_section

from lowmem.generate.engine import Engine
from lowmem.plan.memory import need_on_device
from tests.benchmarks.latency_helpers import LENGTHS, timings, write_model
from tests.helpers import tiny_model

MACHINE = TimingTask("cpu", "bfloat16", 0, seconds=0.0)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> PlannedVersion:
    lineup = line_up(LineupRequest((str(write_model(tmp_path_factory.mktemp("latency"))),)))
    return PlannedVersion(lineup.entrants[0], LENGTHS, 1 << 20)


def test_they_are_planned_with_all_their_tokens(planned: PlannedVersion) -> None:
    """Four answers of 6 + 3 tokens and one to spare take as much as a context of 40."""
    entrant, asked = planned.entrant, replace(LENGTHS, together=4)
    assert choose_lengths(None, None, 64, 8192, 4).together == 4
    need = need_on_device(entrant.candidate.shape, entrant.candidate.form, 40, cuda=False).total
    fits = plan_version(entrant, asked, Budget("cpu", need, "", 0))
    assert fits.lengths == asked and fits.needed_bytes == need
    short = plan_version(entrant, asked, Budget("cpu", need - 1, "", 0))
    assert short.lengths.together == 1 and short.lengths.contexts == (6, 20)
    assert "4 answers at once need too much memory" in short.lengths.notes[0]


def test_a_real_task(planned: PlannedVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a short context, and behind the longest that the model has positions for."""
    monkeypatch.setattr("lowmem.benchmarks.latency.roofline.LARGE_READ", 8 << 20)
    monkeypatch.setattr("lowmem.benchmarks.latency.roofline._CPU_SIZES", (64,))
    positions = planned.entrant.candidate.shape.positions
    lengths = choose_lengths((4,), None, 4, positions, 3)
    for asked in (lengths, replace(lengths, contexts=lengths.contexts[-1:])):
        found = timing.measure(replace(planned, lengths=asked).task(MACHINE), lambda step: None)
        assert found.batch is not None
        assert (found.batch.sequences, found.batch.context) == (3, asked.contexts[0])
        assert len(found.batch.steps) == 3 and min(found.batch.steps) > 0
        assert from_json(Timings, json.loads(json.dumps(to_json(found)))) == found


def test_a_step_without_a_token_is_an_error() -> None:
    engine = Engine(tiny_model("llama", vocab=512), context=12, slots=2, speculate=False)
    assert len(step_seconds(engine, [[1, 2, 3], [4, 5, 6]], 4)) == 4
    with pytest.raises(RuntimeError, match="not every sequence"):
        step_seconds(engine, [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]], 8)
    assert engine.free == 2


def record_of(planned: PlannedVersion, found: list[Timings], tmp_path: Path) -> LatencyRecord:
    rounds = Rounds([planned], 3, WorkFile(tmp_path / "w", Timings, "x", 60), lambda one, step: "")
    rounds.timings = {planned.label: found}
    return make_record(origin_of((), "m", "0"), rounds, timings(), ())


def test_the_record_compares_with_one_answer_of_the_same_round(
    planned: PlannedVersion, tmp_path: Path
) -> None:
    """One answer takes 0.2, 0.1 and 0.05 s a token after 6 tokens; four take 0.3, 0.1 and 0.1 s a step."""
    steps = ((0.2, 0.4), (0.1, 0.1), (0.1, 0.1))
    found = [
        replace(timings(speed), batch=BatchTime(4, 6, of)) for speed, of in zip((1, 2, 4), steps, strict=True)
    ]
    record = record_of(planned, found, tmp_path)
    batch = record.subjects[0].batch
    assert batch is not None and batch.step.values == pytest.approx((0.3, 0.1, 0.1))
    assert batch.of_one.values == pytest.approx((8 / 3, 4.0, 2.0))
    (row,) = batch_table(record).rows
    assert row[1:] == ("4", "6", "40.0 (13.3–40.0)", "2.67 ×", "100 (100–300)")
    assert batch_table(record) in decode_section(record).tables
    assert from_json(LatencyRecord, json.loads(json.dumps(to_json(record)))) == record


def test_a_record_without_them_has_no_table(planned: PlannedVersion, tmp_path: Path) -> None:
    record = record_of(planned, [timings()], tmp_path)
    assert record.subjects[0].batch is None and not batch_table(record).rows
    assert len(decode_section(record).tables) == 1
