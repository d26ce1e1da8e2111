"""Failures that a kill, a full disk or a second process once caused; and the disk space that is planned."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest
from lowmem.benchmarks.experiments.endurance.faults import Disk, can_mount
from lowmem.convert import disk_plan
from lowmem.convert.job import ConversionJob
from lowmem.convert.recipe import ConvertOptions

from lowmem.chat import store
from lowmem.chat.conversation import ChatState, Conversation, Exchange
from lowmem.checkpoint import cache
from lowmem.checkpoint.files import lock
from lowmem.checkpoint.files import whole as whole_file
from lowmem.checkpoint.files.whole import DiskFullError, free_bytes, write_whole
from lowmem.config import QuantConfig, SamplingParams
from lowmem.errors import OutputError
from tests.convert.convert_helpers import digest_of, quick_convert
from tests.helpers import save_source, tiny_model

CONFIG = QuantConfig(bits=4, group_size=32, tune_steps=2)
FORCED = ConvertOptions(device="cpu", compute_dtype="float32", force=True)


class Killed(BaseException):
    """Simulates SIGKILL where nothing after it matters."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("crash") / "source"
    return save_source(tiny_model("gpt_bigcode_mqa", layers=3, hidden=64), folder)


@pytest.fixture(scope="module")
def whole(source) -> dict[str, str]:
    quick_convert(source, source.parent / "whole", CONFIG, rows=2)
    return digest_of(source.parent / "whole")


# --- locks and files ---------------------------------------------------------------------------------------


def test_a_lock_is_of_the_folder_that_has_the_name(tmp_path, monkeypatch):
    """A converter finishes, and removes its folder with the lock, just when the next one has opened that
    lock: what the next one held was a file without a name, and a third one could work in the same folder."""
    folder = tmp_path / "out.partial"
    folder.mkdir()
    flock = fcntl.flock

    def finished_meanwhile(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        folder.rename(tmp_path / "done")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", finished_meanwhile)
    with lock.take(folder / "lock", "busy"), pytest.raises(OutputError, match="busy"):
        lock.take(folder / "lock", "busy")
    lock.take(folder / "lock", "busy").close()
    with pytest.raises(FileNotFoundError):
        lock.take(tmp_path / "missing" / "lock", "busy", create=False)


def test_two_writers_of_one_file_take_turns(tmp_path):
    """They shared the part beside it: the second truncated what the first had written, and half of each was
    renamed into place."""
    path = tmp_path / "record.json"
    path.write_bytes(b"old")
    begun, go_on = threading.Event(), threading.Event()

    def slowly():
        yield b"a" * 100_000
        begun.set()
        go_on.wait(60)
        yield b"a" * 100_000

    first = threading.Thread(target=write_whole, args=(path, slowly()))
    second = threading.Thread(target=write_whole, args=(path, [b"b" * 50_000]))
    first.start()
    begun.wait(60)
    second.start()
    second.join(0.3)
    assert path.read_bytes() == b"old"
    go_on.set()
    first.join()
    second.join()
    assert path.read_bytes() == b"b" * 50_000
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_part_that_a_killed_process_left_is_used_again(tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 10_000)
    write_whole(tmp_path / "file", [b"new"])
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file.part").exists()


def test_a_full_disk_says_how_much_is_free(tmp_path):
    error = whole_file.as_output_error(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "file")
    free = free_bytes(tmp_path) / (1 << 20)
    assert isinstance(error, DiskFullError) and "MiB are free" in error.message
    assert float(error.message.split("; ")[1].split(" MiB")[0]) == pytest.approx(free, rel=0.2)
    assert free_bytes(tmp_path / "not" / "made" / "yet") > 0


# --- conversions -------------------------------------------------------------------------------------------


def killed_at_rename(monkeypatch, number: int) -> None:
    """The n-th call of os.rename from now on raises."""
    rename, calls = os.rename, []

    def counted(*args):
        calls.append(args)
        if len(calls) == number:
            raise Killed
        rename(*args)

    monkeypatch.setattr(os, "rename", counted)


def test_an_older_result_stays_until_there_is_a_new_one(source, whole, tmp_path, monkeypatch):
    """Killed between taking the older checkpoint away and putting the new one there, and then begun with
    another recipe: the older one was removed before the hours of work, not after them."""
    out = tmp_path / "out"
    quick_convert(source, out, CONFIG, rows=2)
    eight = QuantConfig(bits=8, group_size=32, tune_steps=2)
    with monkeypatch.context() as patch:
        killed_at_rename(patch, 2)
        with pytest.raises(Killed):
            quick_convert(source, out, eight, rows=2, options=FORCED)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(disk_plan, "check", lambda job, needed: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            quick_convert(source, out, QuantConfig(bits=3, group_size=32), rows=2, options=FORCED)
    assert digest_of(out) == whole


def test_a_job_is_not_taken_for_published_by_the_older_result(source, whole, tmp_path, monkeypatch):
    """job.json says "publishing", the result was being put together once more, and OUT is the older one: the
    same command threw the finished job away and said that all was done."""
    out = tmp_path / "out"
    quick_convert(source, out, QuantConfig(bits=8, group_size=32, tune_steps=2), rows=2)
    with monkeypatch.context() as patch:
        killed_at_rename(patch, 1)
        with pytest.raises(Killed):
            quick_convert(source, out, CONFIG, rows=2, options=FORCED)
    with monkeypatch.context() as patch:
        patch.setattr(
            "lowmem.convert.result.finish.stage_outside", lambda *_: (_ for _ in ()).throw(Killed())
        )
        with pytest.raises(Killed):
            quick_convert(source, out, CONFIG, rows=2, options=FORCED)
    shutil.rmtree(ConversionJob(out).result)
    quick_convert(source, out, CONFIG, rows=2, options=FORCED)
    assert digest_of(out) == whole


@pytest.mark.parametrize("commit", [2, 3])
def test_a_disk_that_is_full_at_the_commit_loses_no_layer(source, whole, tmp_path, monkeypatch, commit):
    """When job.json cannot be written, the hidden states that it names must stay."""
    out, commits, original = tmp_path / "out", [], ConversionJob.commit

    def full(job):
        commits.append(job)
        if len(commits) == commit:
            raise DiskFullError("the disk is full", "Free some space")
        original(job)

    with monkeypatch.context() as patch:
        patch.setattr(ConversionJob, "commit", full)
        patch.setattr(disk_plan, "free_bytes", lambda folder: 10**12 if len(commits) < commit else 10**3)
        with pytest.raises(DiskFullError) as caught:
            quick_convert(source, out, CONFIG, rows=2)
    assert f"{commit - 2} layers are finished and kept" in caught.value.hint
    assert caught.value.hint.startswith("Free ") and "the rest of the conversion needs" in str(caught.value)
    assert quick_convert(source, out, CONFIG, rows=2).resumed
    assert digest_of(out) == whole


def test_partial_files_of_a_killed_process_do_not_count(source, whole, tmp_path, monkeypatch):
    """A half-written result must not count against the free disk space of a resumed job."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("lowmem.convert.pipeline.assemble", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            quick_convert(source, out, CONFIG, rows=2)
    job = ConversionJob(out)
    job.result.mkdir()
    for name in ("result/model.safetensors.part", "hidden-00009.bin.part", "target-x", "replay-input-y"):
        (job.folder / name).write_bytes(bytes(1000))
    there: list[set[str]] = []
    monkeypatch.setattr(
        disk_plan, "check", lambda job, needed: there.append({p.name for p in job.folder.iterdir()})
    )
    quick_convert(source, out, CONFIG, rows=2)
    staged = {f"layer-{i:05d}.safetensors" for i in range(3)}
    assert there == [{"lock", "job.json", "hidden-00003.bin", "unquantized-00003.bin", *staged}]
    assert digest_of(out) == whole


# --- the room that is needed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "rows"),
    [
        ("gpt_bigcode_mqa", QuantConfig(bits=4, group_size=32, tune_steps=2), 64),
        ("llama", QuantConfig(bits=4, group_size=32), 64),
        ("qwen2", QuantConfig(bits=8, group_size=32, correction=0.0, passes=0), 32),
        ("llama", QuantConfig(bits=4, group_size=32, true_sequential=False), 4),
    ],
)
def test_the_planned_disk_space_is_what_is_used(kind, config, rows, tmp_path, monkeypatch):
    """Measured at every write: never more than planned, and not much less."""
    folder = save_source(tiny_model(kind, layers=2, hidden=128), tmp_path / "source")
    out, most, named = tmp_path / "out", [0], []
    replace = os.replace

    def look() -> None:
        files = [path for path in ConversionJob(out).folder.rglob("*") if path.is_file()]
        most[0] = max(most[0], sum(path.stat().st_size for path in files))

    def watched(one, other):
        look()
        replace(one, other)

    from lowmem.convert.stages.replay import RowsFile

    append = RowsFile.append

    def appended(self, chunk):
        append(self, chunk)
        look()

    monkeypatch.setattr(os, "replace", watched)
    monkeypatch.setattr(RowsFile, "append", appended)
    monkeypatch.setattr(disk_plan, "check", lambda job, needed: named.append(needed))
    quick_convert(folder, out, config, rows=rows)
    slack = disk_plan._SETTINGS + disk_plan._REPORT * 16 + disk_plan._FILE * 40
    assert most[0] <= named[0] <= 1.2 * most[0] + slack


@pytest.mark.skipif(not can_mount(), reason="no disk can be mounted here")
def test_a_small_disk_is_refused_before_anything_is_written(source, tmp_path):
    root = tmp_path / "disk"
    with Disk(root, 1 << 20):
        before = free_bytes(root)
        calibration = tmp_path / "text.txt"
        calibration.write_text("some words and more of them\n" * 200)
        with pytest.raises(
            OutputError, match=r"needs .* of disk in .*, which has 1 MiB free\. Free \d+ .iB more"
        ):
            quick_convert(source, root / "out", CONFIG, rows=2, calibration=str(calibration))
        assert list(root.iterdir()) == [] and free_bytes(root) == before


@pytest.mark.skipif(not can_mount(), reason="no disk can be mounted here")
def test_folders_that_can_only_be_read(source, tmp_path, monkeypatch):
    import subprocess

    from lowmem.benchmarks.common.output import exclusive

    with Disk(tmp_path / "disk", 1 << 20) as mounted:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(mounted.root)], check=True)
        text = tmp_path / "text.txt"
        text.write_text("some words and more of them\n" * 200)
        with pytest.raises(OutputError, match="Read-only file system"):
            quick_convert(source, mounted.root / "out", CONFIG, rows=2, calibration=str(text))
        monkeypatch.setenv("LOWMEM_CACHE", str(mounted.root / "cache"))
        with pytest.raises(OutputError, match=r"Read-only file system.*LOWMEM_CACHE"):
            cache.claim("owner/name", "4bit-g128")
        with (
            pytest.raises(OutputError, match=r"Read-only file system.*--out"),
            exclusive(mounted.root, "quality"),
        ):
            pass


# --- the cache ---------------------------------------------------------------------------------------------


def test_a_conversion_that_begins_during_rm_is_left_alone(tmp_path, monkeypatch):
    """rm found no job to lock, and must not rename one that another process began since."""
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    folder = cache.claim("owner/name", "4bit-g128")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    job, remove_tree = folder.with_name(folder.name + ".partial"), cache._remove_tree

    def begun_meanwhile(path):
        job.mkdir(exist_ok=True)
        (job / "job.json").write_text("{}")
        remove_tree(path)

    monkeypatch.setattr(cache, "_remove_tree", begun_meanwhile)
    cache.remove("owner--name/4bit-g128")
    assert not folder.exists() and (job / "job.json").is_file()


def test_what_a_killed_claim_leaves_goes_with_the_folder(tmp_path, monkeypatch):
    """The name of a partial file once contained the process id, and the file and its folder were never
    removed."""
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    replace = os.replace

    def killed(one, other):
        shutil.copy(one, tmp_path / "kept")  # what SIGKILL would leave; the exception removes it
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            cache.claim("owner/name", "4bit-g128")
    key = tmp_path / "cache" / "models" / "owner--name"
    shutil.copy(tmp_path / "kept", key / "origin.json.part")
    assert os.replace is replace
    cache.prune(cache.claim("owner/name", "4bit-g128"))
    assert not key.exists()


def test_an_empty_job_folder_can_be_removed(tmp_path, monkeypatch):
    """Killed after the folder was created, and before its lock."""
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    folder = cache.claim("owner/name", "4bit-g128")
    folder.with_name(folder.name + ".partial").mkdir()
    cache.remove("owner--name/4bit-g128")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


# --- conversations -----------------------------------------------------------------------------------------


def saving(path: str, step: int, report: str) -> None:
    """In a process of its own: save a longer conversation over the one that is there, and be killed."""
    import sys

    from lowmem.benchmarks.experiments.endurance import faults

    conversation = Conversation(None, (Exchange("one", "two"), Exchange("three", "four " * 2000)))
    sys.addaudithook(faults._Steps(str(Path(path).parent), faults.Fault("kill", step, 0.0, 0), report))
    store.save(path, ChatState(conversation))


def test_a_conversation_is_the_older_or_the_newer_one_at_every_kill(spawner, tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    for step in range(1, 20):
        path = folder / f"{step}.json"
        store.save(str(path), ChatState(Conversation(None, (Exchange("one", "two"),))))
        process = spawner.Process(target=saving, args=(str(path), step, str(tmp_path)))
        process.start()
        process.join(60)
        found = store.load(str(path), SamplingParams()).conversation.exchanges
        if process.exitcode == 0:
            assert len(found) == 2 and step > 3
            break
        assert process.exitcode == -9 and len(found) == 1
    else:
        raise AssertionError("it never came to its end")


@pytest.mark.skipif(not can_mount(), reason="no disk can be mounted here")
def test_a_conversation_stays_when_the_disk_is_full(tmp_path):
    with Disk(tmp_path / "disk", 64 << 10) as mounted:
        path = mounted.root / "chat.json"
        store.save(str(path), ChatState(Conversation(None, (Exchange("one", "two"),))))
        before = path.read_bytes()
        (mounted.root / "other").write_bytes(bytes(free_bytes(mounted.root)))
        longer = Conversation(None, (Exchange("one", "two " * 5000),))
        with pytest.raises(store.ConversationError, match="No space left on device"):
            store.save(str(path), ChatState(longer))
        assert path.read_bytes() == before
        assert sorted(p.name for p in mounted.root.iterdir()) == ["chat.json", "other"]
        (mounted.root / "other").unlink()
        store.save(str(path), ChatState(longer))


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("words", [["list"], ["convert", "model", "out"], ["bench", "quality", "model"]])
def test_memory_that_runs_out_is_one_line(words, error, monkeypatch, capsys):
    """Outside loading a model it once ended in a traceback."""
    from lowmem.cli import main

    def fails(*_, **__):
        raise error

    monkeypatch.setattr("lowmem.commands.list.run", fails)
    monkeypatch.setattr("lowmem.convert.pipeline.convert", fails)
    monkeypatch.setattr("lowmem.benchmarks.quality.command.run", fails)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"lowmem {words[0]}: out of memory: ")
    assert "Close other programs" in said


def test_other_memory_errors_are_not_taken_for_a_lack_of_memory(monkeypatch, capsys):
    from lowmem.cli import main

    def fails(*_):
        raise RuntimeError("shapes do not agree")

    monkeypatch.setattr("lowmem.commands.list.run", fails)
    assert main(["list"]) == 1
    said = capsys.readouterr().err
    assert "RuntimeError: shapes do not agree" in said and "out of memory" not in said
