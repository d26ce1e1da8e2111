"""lm-evaluation-harness against a live `lowmem serve`, and the committed figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lowmem.benchmarks.experiments.harness import (
    EXPERIMENT,
    TASKS,
    Figure,
    agree,
    compare,
    measure,
    write_tasks,
)


def test_the_committed_figures_are_equal_to_rounding() -> None:
    record = EXPERIMENT.read()
    assert [entry.model for entry in record.models] == ["tiny-starchat", "smollm2"]
    for entry in record.models:
        assert agree(entry) and entry.texts > 0 and {figure.task for figure in entry.figures} == set(TASKS)
        assert any(0 < figure.own < 1 for figure in entry.figures if figure.metric.startswith("acc"))
    assert all(entry.model in EXPERIMENT.render(record) for entry in record.models)


def test_documents_are_the_same_every_time(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        write_tasks(folder, 5)
    texts = [(folder / "documents.jsonl").read_text() for folder in folders]
    assert texts[0] == texts[1]
    rows = [json.loads(line) for line in texts[0].splitlines()]
    assert len(rows) == 5
    for row in rows:
        assert row["begun"] + row["rest"] == row["before"] + row["lines"][row["right"]]


def test_what_differs_is_seen() -> None:
    def run(nats: float, greedy: str, text: str, acc: float) -> dict[str, object]:
        one = {"doc_id": 0, "filtered_resps": [[str(nats), greedy]]}
        return {
            "results": {task: {"acc,none": acc, "acc_stderr,none": acc} for task in TASKS},
            "samples": {
                "next_line": [one],
                "lines": [{"doc_id": 0, "filtered_resps": [str(nats)]}],
                "finish_line": [{"doc_id": 0, "filtered_resps": [text]}],
            },
        }

    same = run(-1.5, "False", "x", 0.5)
    assert agree(compare("m", same, run(-1.50001, "False", "x", 0.5)))
    worse = compare("m", same, run(-1.7, "False", "x", 0.5))
    assert worse.worst_nats == pytest.approx(0.2) and worse.requests == 3
    assert not agree(compare("m", same, run(-1.5, "True", "x", 0.5)))
    assert not agree(compare("m", same, run(-1.5, "False", "y", 0.5)))
    assert not agree(compare("m", same, run(-1.5, "False", "x", 0.6)))
    assert Figure("t", "m", 1000.0, 1000.05).equal and not Figure("t", "m", 1000.0, 1000.2).equal


@pytest.mark.slow
def test_the_harness_finds_the_same_through_the_server(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    (entry,) = measure(("tiny-starchat",), 4, tmp_path).models
    assert agree(entry), entry
    assert entry.worst_nats < 1e-3
