"""The efforts' record: which commands make it, and that a finished version is not made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lowmem.benchmarks.experiments import efforts
from lowmem.benchmarks.experiments.common import RESULTS

from lowmem.config import EFFORTS


def test_each_version_is_made_once_with_its_effort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    example = json.loads((RESULTS / "tiny-starchat" / "quality.json").read_bytes())
    subject = next(one for one in example["subjects"] if one["subject"]["label"] == "2-bit g32")
    subject["texts"].append(subject["texts"][0] | {"text": "humaneval"})
    example["subjects"] = [subject]

    def lowmem(folder: Path, *words: str) -> None:
        said.append(" ".join(words))
        if words[0] == "bench":
            (folder / efforts.FOLDER).mkdir()
            (folder / efforts.FOLDER / "quality.json").write_text(json.dumps(example))

    monkeypatch.setattr(efforts, "lowmem", lowmem)
    out = tmp_path / "efforts.json"
    for _ in range(2):
        words = ["--work", str(tmp_path / "work"), "--only", "2bit-g32", "--out", str(out)]
        assert efforts.main(words) == 0
    made = [line.split("--effort ")[1].split()[0] for line in said if line.startswith("convert")]
    assert made == list(EFFORTS)
    assert sum(line.startswith("bench quality version --reference") for line in said) == len(EFFORTS)
    record = efforts.Experiment("efforts", efforts.Efforts, out, efforts.render).read()
    assert [one.effort for one in record.versions] == list(EFFORTS)
    assert efforts.render(record).count("2-bit g32") == len(EFFORTS)
