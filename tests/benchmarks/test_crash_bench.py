"""Regression tests for measurements that are killed or run out of disk space."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lowmem.benchmarks.common import output
from lowmem.benchmarks.common.records import Attempt
from lowmem.benchmarks.common.work_file import WorkFile
from lowmem.benchmarks.quality import measure as quality_module
from lowmem.benchmarks.quality import reference_states as reference_module
from lowmem.benchmarks.quality.measure import Settings
from lowmem.benchmarks.quality.reference_states import cache_folder, disk_needed, reference_states
from lowmem.benchmarks.quality.texts import Text, digest_of

from lowmem.checkpoint.files import whole as whole_file
from lowmem.checkpoint.source.open import open_source
from lowmem.errors import OutputError
from lowmem.streaming.forward import StreamedModel
from tests.benchmarks.test_quality import SETTINGS, Heard, folder, run  # noqa: F401  (a fixture)
from tests.helpers import save_source, tiny_model

ATTEMPT = Attempt("HumanEval/0", 0, True, "passed", "", "x")


class Killed(BaseException):
    """Raised in place of SIGKILL where only the state at that moment matters."""


def text(name: str, seed: int) -> Text:
    ids = torch.randint(0, 4096, (2, 20), generator=torch.Generator().manual_seed(seed))
    return Text(name, ids, digest_of(ids))


TEXTS = (text("one", 1), text("two", 2))


@pytest.fixture
def model(tmp_path: Path, monkeypatch) -> StreamedModel:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "model")
    return StreamedModel(open_source(tmp_path / "model"), torch.float32)


@pytest.mark.parametrize("last", ["one", "two"])
def test_a_reference_killed_at_its_last_step_is_not_recomputed(model, monkeypatch, last):
    """If only one text had been noted, the next run once repeated the pass and never removed the old folder
    of hidden states. After the last note, the folder also stayed."""
    write, noted = reference_module.write_json, []

    def killed(path, value):
        if path.name == "ready.json":
            return write(path, value)
        if len(noted) == (1 if last == "one" else 2):
            raise Killed
        noted.append(path)
        return write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(reference_module, "write_json", killed)
        if last == "two":
            patch.setattr("lowmem.streaming.pass_folder.remove_waste", lambda _: None)
            patch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            reference_states(model, TEXTS, cache_folder(model))
    assert len(noted) == (1 if last == "one" else 2)
    layers: list[int] = []
    found = reference_states(model, TEXTS, cache_folder(model), lambda done, _: layers.append(done))
    assert not layers and not found.seconds
    assert len(list(cache_folder(model).iterdir())) == 4


def test_the_stated_disk_space_of_a_reference_is_what_it_uses(model, monkeypatch):
    replace, most = os.replace, [0]

    def watched(one, other):
        files = [path for path in cache_folder(model).rglob("*") if path.is_file()]
        most[0] = max(most[0], sum(path.stat().st_size for path in files))
        replace(one, other)

    monkeypatch.setattr(os, "replace", watched)
    needed = disk_needed(model, TEXTS)
    reference_states(model, TEXTS, cache_folder(model))
    assert needed <= most[0] <= needed + 4096  # a few hundred bytes of JSON


def test_a_measurement_without_disk_space_is_refused_before_it_starts(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(whole_file, "free_bytes", lambda _: 10_000)
    with pytest.raises(
        OutputError, match=r"needs \d+ KiB of disk in .*quality.*10 KiB free\. Free \d+ KiB more"
    ):
        run(folder, "model")
    assert not (folder.parent / "cache").exists() and not list((folder / "out").iterdir())


def test_results_of_other_settings_are_not_used(folder, monkeypatch):  # noqa: F811
    """Results for 2 rows, left by a process that was killed after writing its record, are replaced."""
    run(folder, "model", versions=("int8",))
    two = Settings(**{**vars(SETTINGS), "rows": 2})

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(quality_module, "_record_divergence", killed)
        with pytest.raises(Killed):
            run(folder, "model", versions=("int8",), settings=two)
    heard = Heard()
    record = run(folder, "model", versions=("int8",), heard=heard)
    assert heard.begun[1:] == [], "the results of 3 rows are kept beside those of 2"
    assert {t.tokens for s in record.subjects for t in s.texts} == {3 * 40}


def test_resuming_keeps_the_age_of_a_result(tmp_path):
    now = [1000.0]

    def work() -> WorkFile[Attempt]:
        return WorkFile(tmp_path / "work.jsonl", Attempt, "key", 24 * 3600, lambda: now[0])

    work().add(("task", 0), ATTEMPT, 1.0)
    now[0] += 23 * 3600
    assert work().read() == {("task", 0): (ATTEMPT, 1.0)}
    now[0] += 2 * 3600
    assert work().read() == {}


def test_a_full_disk_gives_one_line():
    """Writing to /dev/full always fails with ENOSPC."""
    with pytest.raises(OutputError, match="the disk is full"):
        WorkFile(Path("/dev/full"), Attempt, "key").add(("task", 0), ATTEMPT, 1.0)


def test_two_measurements_of_one_kind_cannot_share_a_folder(tmp_path):
    """Otherwise each would overwrite the record of the other."""
    with output.exclusive(tmp_path / "out", "quality"):
        with (
            pytest.raises(OutputError, match="another lowmem bench quality"),
            output.exclusive(tmp_path / "out", "quality"),
        ):
            pass
        with output.exclusive(tmp_path / "out", "latency"):
            pass
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / "quality.lock").touch()  # left by a killed process
    with output.exclusive(tmp_path / "out", "quality"):
        pass
    assert list((tmp_path / "out").iterdir()) == []
