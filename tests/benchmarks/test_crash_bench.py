"""What a kill or a full disk once broke in measurements, step by step; and the room that they need."""

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
    """In the place of SIGKILL, where what comes after it is of no interest."""


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
def test_a_reference_that_is_killed_at_its_last_step_is_not_computed_again(model, monkeypatch, last):
    """With one text noted and the other not, the pass was of other texts than the next run asked for: it was
    done again, and its folder of hidden states stayed for good. After the last note it only stayed."""
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


def test_the_room_that_a_reference_is_told_to_need_is_what_it_takes(model, monkeypatch):
    replace, most = os.replace, [0]

    def watched(one, other):
        files = [path for path in cache_folder(model).rglob("*") if path.is_file()]
        most[0] = max(most[0], sum(path.stat().st_size for path in files))
        replace(one, other)

    monkeypatch.setattr(os, "replace", watched)
    needed = disk_needed(model, TEXTS)
    reference_states(model, TEXTS, cache_folder(model))
    assert needed <= most[0] <= needed + 4096  # and a few hundred bytes of JSON


def test_a_measurement_that_has_no_room_is_refused_before_it(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(whole_file, "free_bytes", lambda _: 10_000)
    with pytest.raises(
        OutputError, match=r"needs \d+ KiB of disk in .*quality.*10 KiB free\. Free \d+ KiB more"
    ):
        run(folder, "model")
    assert not (folder.parent / "cache").exists() and not list((folder / "out").iterdir())


def test_what_is_left_of_other_settings_is_never_taken_for_this_measurement(folder, monkeypatch):  # noqa: F811
    """A record of 2 rows, left by a process that was killed after it wrote its record, is replaced."""
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


def test_a_result_does_not_become_younger_with_every_run(tmp_path):
    now = [1000.0]

    def work() -> WorkFile[Attempt]:
        return WorkFile(tmp_path / "work.jsonl", Attempt, "key", 24 * 3600, lambda: now[0])

    work().add(("task", 0), ATTEMPT, 1.0)
    now[0] += 23 * 3600
    assert work().read() == {("task", 0): (ATTEMPT, 1.0)}
    now[0] += 2 * 3600
    assert work().read() == {}


def test_a_full_disk_is_one_line():
    """/dev/full takes no byte."""
    with pytest.raises(OutputError, match="the disk is full"):
        WorkFile(Path("/dev/full"), Attempt, "key").add(("task", 0), ATTEMPT, 1.0)


def test_two_measurements_of_a_kind_do_not_share_a_folder(tmp_path):
    """Each wrote the record that it knew over the other's."""
    with output.exclusive(tmp_path / "out", "quality"):
        with (
            pytest.raises(OutputError, match="another lowmem bench quality"),
            output.exclusive(tmp_path / "out", "quality"),
        ):
            pass
        with output.exclusive(tmp_path / "out", "latency"):
            pass
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / "quality.lock").touch()  # of a killed process
    with output.exclusive(tmp_path / "out", "quality"):
        pass
    assert list((tmp_path / "out").iterdir()) == []
