"""A conversion that is killed at any moment resumes, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from lowmem.convert.job import ConversionJob
from lowmem.convert.recipe import ConvertOptions

from lowmem.config import QuantConfig
from lowmem.errors import OutputError, RecipeError
from tests.convert.convert_helpers import digest_of, quick_convert
from tests.helpers import save_source, tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "source"
    return save_source(tiny_model("gpt_bigcode_mqa", layers=4, hidden=64), folder)


@pytest.fixture(scope="module")
def whole(source) -> dict[str, str]:
    """The bytes of an uninterrupted run."""
    out = source.parent / "whole"
    quick_convert(source, out, shards())
    return digest_of(out)


def shards() -> QuantConfig:
    return QuantConfig(bits=4, group_size=32, tune_steps=4)


def child(source: str, out: str) -> None:
    import torch

    torch.set_num_threads(1)
    quick_convert(Path(source), Path(out), shards())


def start(spawner, source: Path, out: Path):
    process = spawner.Process(target=child, args=(str(source), str(out)))
    process.start()
    return process


@pytest.mark.parametrize("least", [16, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_random_moments_gives_the_same_bytes(least, source, spawner, tmp_path):
    reference = tmp_path / "reference"
    process = start(spawner, source, reference)
    wait_for_work(process)
    started = time.monotonic()
    process.join()
    assert process.exitcode == 0
    duration = time.monotonic() - started
    expected = digest_of(reference)
    random_moment = random.Random(os.environ.get("LOWMEM_TEST_SEED", "7"))
    kills, moments = 0, set()
    attempt = 0
    while kills < least:
        attempt += 1
        assert attempt < 4 * least, "the conversion is never caught alive"
        out = tmp_path / f"out{attempt}"
        while not out.exists():
            process = start(spawner, source, out)
            wait_for_work(process)
            # Enough kills: let it finish.
            process.join(random_moment.uniform(0, 1.2 * duration) if kills < least else None)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
                moments.add(moment(out))
            else:
                assert process.exitcode == 0
        # A kill between the last renames: the same command finishes the job.
        process = start(spawner, source, out) if ConversionJob(out).folder.exists() else None
        if process is not None:
            process.join()
            assert process.exitcode == 0
        assert digest_of(out) == expected
        assert not ConversionJob(out).folder.exists()
    assert len(moments) >= 4, f"the kills all fell into {moments}"


def wait_for_work(process) -> None:
    """Wait until the process holds its job's lock, which ends its start-up."""
    while process.is_alive():
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        if any(fields[1] == "FLOCK" and fields[4] == str(process.pid) for fields in locks):
            return
        time.sleep(0.001)


def moment(out: Path) -> str:
    """The progress of a killed conversion."""
    folder = ConversionJob(out).folder
    if not folder.is_dir():
        return "before or after the work"
    parts = sum(1 for p in folder.rglob("*.part"))
    state = folder / "job.json"
    finished = json.loads(state.read_text())["finished_layers"] if state.exists() else -1
    return f"{finished} layers, {parts} unfinished files"


class Interrupted(BaseException):
    """Simulates anything that stops a process."""


def interrupt_after(layers: int):
    from lowmem.convert.progress import Reporter

    class Stopper(Reporter):
        def layer(self, layer, reports, seconds):
            if layer + 1 == layers:
                raise Interrupted

    return Stopper()


def begin(source: Path, out: Path, config: QuantConfig, layers: int = 2) -> None:
    from lowmem.convert.calibration import CalibrationSpec
    from lowmem.convert.pipeline import convert

    from tests.convert.convert_helpers import calibration_file

    with pytest.raises(Interrupted):
        convert(
            source,
            out,
            config,
            calibration=CalibrationSpec(str(calibration_file(out.parent)), 8, 64, 0),
            options=ConvertOptions(device="cpu", compute_dtype="float32"),
            reporter=interrupt_after(layers),
        )


def test_killed_while_the_finished_job_is_removed(source, whole, tmp_path, monkeypatch):
    """A job folder without job.json made the same command refuse the finished OUT, so it is renamed first."""
    import lowmem.convert.job as job_module

    out = tmp_path / "out"

    def killed(folder, ignore_errors=False):
        if Path(folder).exists():
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(job_module.shutil, "rmtree", killed)
        with pytest.raises(Interrupted):
            quick_convert(source, out, shards())
    assert digest_of(out) == whole
    assert not ConversionJob(out).folder.exists()
    # The renamed remainder is removed by the next conversion into the same folder.
    options = ConvertOptions(device="cpu", compute_dtype="float32", force=True)
    quick_convert(source, out, shards(), options=options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.txt", "out"]


def test_finished_layers_are_not_converted_again(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(source, out, shards(), layers=3)
    import lowmem.convert.pipeline as pipeline

    done = []
    original = pipeline.run_stages
    monkeypatch.setattr(
        pipeline,
        "run_stages",
        lambda stages, context, *a: done.append(context.spec.name) or original(stages, context, *a),
    )
    summary = quick_convert(source, out, shards())
    assert done == ["transformer.h.3"]
    assert summary.resumed
    assert digest_of(out) == whole


def test_files_of_an_unfinished_layer_are_written_again(source, whole, tmp_path):
    out = tmp_path / "out"
    begin(source, out, shards(), layers=2)
    job = ConversionJob(out)
    job.staged(2).write_bytes(b"half a file")
    job.hidden(3).write_bytes(b"half a file")
    (job.folder / "layer-00002.safetensors.part").write_bytes(b"x")
    quick_convert(source, out, shards())
    assert digest_of(out) == whole


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (QuantConfig(bits=8, group_size=32), "bits"),
        (QuantConfig(bits=4, group_size=64), "group_size"),
        (QuantConfig(bits=4, group_size=32, sym=False), "sym"),
        (QuantConfig(bits=4, group_size=32, damp_percent=0.1), "damp_percent"),
    ],
)
def test_a_changed_recipe_is_refused_by_name(source, whole, tmp_path, changed, name):
    out = tmp_path / "out"
    begin(source, out, shards())
    with pytest.raises(RecipeError, match=rf"\b{name}\b"):
        quick_convert(source, out, changed)
    quick_convert(source, out, shards())  # the refusal has harmed nothing
    assert digest_of(out) == whole


def test_a_changed_calibration_is_refused_by_name(source, tmp_path):
    out = tmp_path / "out"
    begin(source, out, shards())
    with pytest.raises(RecipeError, match="calibration"):
        quick_convert(source, out, shards(), rows=4)


def test_a_changed_source_is_refused_by_name(source, tmp_path):
    """Equal shapes, different weights: the shards' contents differ, not their names or times."""
    out = tmp_path / "out"
    begin(source, out, shards())
    other = save_source(tiny_model("gpt_bigcode_mqa", layers=4, hidden=64, seed=9), tmp_path / "other")
    with pytest.raises(RecipeError, match="source"):
        quick_convert(other, out, shards())


def test_force_discards_another_job(source, tmp_path):
    out = tmp_path / "out"
    begin(source, out, QuantConfig(bits=8, group_size=32))
    options = ConvertOptions(device="cpu", compute_dtype="float32", force=True)
    summary = quick_convert(source, out, shards(), options=options)
    assert not summary.resumed
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 4


def test_force_replaces_only_checkpoints_of_lowmem(source, whole, tmp_path):
    precious = tmp_path / "out"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    options = ConvertOptions(device="cpu", compute_dtype="float32", force=True)
    with pytest.raises(OutputError, match="not a checkpoint written by lowmem"):
        quick_convert(source, precious, shards(), options=options)
    assert (precious / "thesis.txt").read_text() == "years of work"
    out = tmp_path / "converted"
    quick_convert(source, out, QuantConfig(bits=8, group_size=32))
    with pytest.raises(OutputError, match="exists"):
        quick_convert(source, out, shards())
    quick_convert(source, out, shards(), options=options)
    assert digest_of(out) == whole


def test_two_processes_do_not_share_a_job(source, tmp_path):
    out = tmp_path / "out"
    with ConversionJob(out).working(), pytest.raises(OutputError, match="another process"):
        quick_convert(source, out, shards())


def test_a_full_disk_leaves_a_job_that_resumes(source, whole, tmp_path):
    """Writes fail for real: the kernel limits the size of files."""
    import resource

    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
        with pytest.raises(OutputError, match="disk is full"):
            quick_convert(source, out, shards())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    assert not list(ConversionJob(out).folder.rglob("*.part"))
    quick_convert(source, out, shards())
    assert digest_of(out) == whole
