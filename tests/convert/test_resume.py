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
            # Enough kills: let it end now.
            process.join(random_moment.uniform(0, 1.2 * duration) if kills < least else None)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
                moments.add(moment(out))
            else:
                assert process.exitcode == 0
        # A kill may have fallen between the last renames: the same command ends that too.
        process = start(spawner, source, out) if ConversionJob(out).folder.exists() else None
        if process is not None:
            process.join()
            assert process.exitcode == 0
        assert digest_of(out) == expected
        assert not ConversionJob(out).folder.exists()
    assert len(moments) >= 4, f"the kills all fell into {moments}"


def wait_for_work(process) -> None:
    """Until the process holds its job's lock (the kernel lists it): what comes before is start-up."""
    while process.is_alive():
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        if any(fields[1] == "FLOCK" and fields[4] == str(process.pid) for fields in locks):
            return
        time.sleep(0.001)


def moment(out: Path) -> str:
    """Where a killed conversion stood."""
    folder = ConversionJob(out).folder
    if not folder.is_dir():
        return "before or after the work"
    parts = sum(1 for p in folder.rglob("*.part"))
    state = folder / "job.json"
    finished = json.loads(state.read_text())["finished_layers"] if state.exists() else -1
    return f"{finished} layers, {parts} unfinished files"


class Interrupted(BaseException):
    """Stands for whatever stops a process."""


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


def test_killed_while_the_finished_job_is_cleared_away(source, whole, tmp_path, monkeypatch):
    """Once the job's folder lost job.json before the rest of it: the same command then said that OUT
    exists, with OUT whole and a useless folder beside it."""
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
    # What is left has another name, and goes with the next conversion into the same place.
    options = ConvertOptions(device="cpu", compute_dtype="float32", force=True)
    quick_convert(source, out, shards(), options=options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.txt", "out"]


def test_finished_layers_are_not_done_again(source, whole, tmp_path, monkeypatch):
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


def test_rubbish_of_an_unfinished_layer_is_written_again(source, whole, tmp_path):
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
    """Same shapes, other weights: noticed by what the shards hold, not by their names or times."""
    out = tmp_path / "out"
    begin(source, out, shards())
    other = save_source(tiny_model("gpt_bigcode_mqa", layers=4, hidden=64, seed=9), tmp_path / "other")
    with pytest.raises(RecipeError, match="source"):
        quick_convert(other, out, shards())


def test_force_drops_another_job(source, tmp_path):
    out = tmp_path / "out"
    begin(source, out, QuantConfig(bits=8, group_size=32))
    options = ConvertOptions(device="cpu", compute_dtype="float32", force=True)
    summary = quick_convert(source, out, shards(), options=options)
    assert not summary.resumed
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 4


def test_force_replaces_only_what_lowmem_wrote(source, whole, tmp_path):
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


def test_a_full_disk_leaves_a_job_that_goes_on(source, whole, tmp_path):
    """A real failing write: the kernel refuses to let files grow past a limit."""
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
