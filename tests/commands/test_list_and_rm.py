"""lowmem's cache of converted checkpoints: paths, `lowmem list` and `lowmem rm`."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lowmem.convert.calibration import CalibrationSpec
from lowmem.convert.pipeline import convert
from lowmem.convert.progress import Reporter
from lowmem.convert.recipe import ConvertOptions

from lowmem.checkpoint import cache
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.manifest import quantization_config_dict, write_manifest
from lowmem.config import QuantConfig
from lowmem.errors import InvalidRequestError, MemoryBudgetError, OutputError
from tests.convert.convert_helpers import calibration_file, digest_of
from tests.helpers import save_source, tiny_model

ROOT = Path(__file__).parent.parent.parent
ALPHA = "HuggingFaceH4/starchat-alpha"
# The modules of the commands.
DRIVER = (
    "import sys\nfrom lowmem import cli\nknown = {c.name for c in cli.COMMANDS}\n"
    "for name in ('list', 'rm'):\n"
    "    if name not in known:\n"
    "        cli.COMMANDS += (cli.Command(name, f'lowmem.{name}_command', name),)\n"
    "sys.exit(cli.main())"
)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def lowmem(root: Path, *arguments: str, cwd: Path | None = None, **options) -> subprocess.CompletedProcess:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOWMEM_CACHE": str(root)
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        capture_output=True, text=True, env=environment, cwd=cwd, **options,
    )  # fmt: skip


def finished(source: str, config: QuantConfig, size: int = 1000) -> Path:
    """A converted folder without weights."""
    folder = cache.claim(source, cache.label_of(config))
    folder.mkdir()
    quantization = quantization_config_dict(config, version="0")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    (folder / "model.safetensors").write_bytes(bytes(size))
    write_manifest(folder)
    return folder


def begun(source: str, config: QuantConfig, layers: int = 3) -> Path:
    """A job as left by an interruption."""
    folder = cache.claim(source, cache.label_of(config))
    job = folder.with_name(folder.name + ".partial")
    job.mkdir()
    (job / "lock").touch()
    recipe = {"bits": config.bits, "group_size": config.group_size}
    (job / "job.json").write_text(json.dumps({"version": 1, "recipe": recipe, "finished_layers": layers}))
    (job / "layer-00000.safetensors").write_bytes(bytes(500))
    return job


def names() -> list[str]:
    return [entry.name for entry in cache.entries()]


# ---- paths


def test_the_root_and_its_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LOWMEM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_root() == tmp_path / ".cache" / "lowmem"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "lowmem"
    monkeypatch.setenv("LOWMEM_CACHE", "~/own")
    assert cache.cache_root() == tmp_path / "own"


def test_keys_of_hub_ids_and_local_sources(root, tmp_path, monkeypatch):
    assert cache.entry_folder(ALPHA, "4bit-g128") == (
        root / "models" / "HuggingFaceH4--starchat-alpha" / "4bit-g128"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "model v2").mkdir(parents=True)
    (tmp_path / "b" / "model v2").mkdir(parents=True)
    one = cache.entry_folder("a/model v2", "4bit-g128").parent
    assert one.name.startswith("model_v2-") and len(one.name) == len("model_v2-") + 8
    assert one == cache.entry_folder(str(tmp_path / "a" / "model v2") + "/", "4bit-g128").parent
    (tmp_path / "link").symlink_to("a/model v2")
    assert one == cache.entry_folder("link", "4bit-g128").parent
    assert one != cache.entry_folder("b/model v2", "4bit-g128").parent
    # An existing folder is local, whatever its name.
    Path(ALPHA).mkdir(parents=True)
    assert "--" not in cache.entry_folder(ALPHA, "4bit-g128").parent.name
    assert not root.exists()


def test_an_invalid_source_has_no_entries(root):
    finished(ALPHA, QuantConfig(group_size=128))
    for source in ("", "a\0b", "~nobody/x", "../..", "/", "x" * 5000, "HuggingFaceH4--starchat-alpha"):
        assert cache.entries_for(source) == []


@pytest.mark.parametrize("label", ["", "..", ".", "a/b", "../x", "-x", "a b", "x.partial", "x" * 200, "a\n"])
def test_labels_are_plain_names(root, label):
    with pytest.raises(InvalidRequestError):
        cache.entry_folder(ALPHA, label)


def test_labels_tell_recipes_apart():
    recipes = [
        QuantConfig(
            bits=bits, group_size=group, sym=sym, desc_act=act, damp_percent=damp, true_sequential=seq
        )
        for bits in (4, 3)
        for group in (128, 32, -1)
        for sym in (True, False)
        for act in (True, False)
        for damp in (0.01, 0.05)
        for seq in (True, False)
    ]
    labels = {
        cache.label_of(recipe, others) for recipe in recipes for others in ({}, {"rows": 64}, {"rows": 9})
    }
    assert len(labels) == 3 * len(recipes)
    assert all(cache._is_label(label) for label in labels)
    assert cache.label_of(QuantConfig(bits=3, group_size=64)) == "3bit-g64"
    assert cache.label_of(QuantConfig(bits=8, group_size=-1, sym=False)) == "8bit-row-asym"
    with pytest.raises(ValueError, match="not chosen"):
        cache.label_of(QuantConfig())


# ---- listing


def test_entries_have_their_state(root):
    assert cache.entries() == []
    done = finished(ALPHA, QuantConfig(bits=8, group_size=128), size=12_345)
    job = begun("/somewhere/else", QuantConfig(bits=3, group_size=64), layers=7)
    eight, three = cache.entries()
    assert (eight.name, eight.path, eight.source) == ("HuggingFaceH4--starchat-alpha/8bit-g128", done, ALPHA)
    assert (eight.bits, eight.group_size, eight.complete, eight.state) == (8, 128, True, "ready")
    assert eight.nbytes == sum(path.stat().st_size for path in done.iterdir()) > 12_345
    assert (three.bits, three.group_size, three.complete) == (3, 64, False)
    assert (three.source, three.state) == ("/somewhere/else", "unfinished, 7 layers done")
    assert three.nbytes == sum(path.stat().st_size for path in job.iterdir())
    assert cache.entries_for(ALPHA) == [eight]
    assert cache.entries_for("/somewhere/else") == [three]
    assert cache.entries_for("HuggingFaceH4/starchat-beta") == []
    # An interrupted second conversion with --force.
    begun(ALPHA, QuantConfig(bits=8, group_size=128))
    (again,) = cache.entries_for(ALPHA)
    assert again.complete and again.state == "ready, and an unfinished job"


def test_use_is_recorded_in_the_cache_only(root, tmp_path):
    done = finished(ALPHA, QuantConfig(group_size=128))
    for folder in (done, tmp_path):
        os.utime(folder, (1000, 1000))
    assert cache.entries()[0].used == 1000
    for folder in (done, tmp_path, root, tmp_path / "nothing"):
        cache.mark_used(folder)
    assert cache.entries()[0].used > 1_000_000
    assert tmp_path.stat().st_mtime == 1000


def test_damage_in_the_cache_is_listed_and_never_raised(root):
    done = finished(ALPHA, QuantConfig(group_size=128))
    (done / "config.json").write_text("{")
    job = begun(ALPHA, QuantConfig(bits=3, group_size=128))
    (job / "job.json").write_text('{"recipe": [], "finished_layers": "many"}')
    half = cache.claim(ALPHA, "2bit-g32")
    half.mkdir()
    (done.parent / cache.ORIGIN_FILE).write_text("[]")
    (root / "models" / "a file").touch()
    (root / "models" / "stray").mkdir()
    (root / "models" / "stray" / ".hidden").mkdir()
    found = {entry.path.name: entry for entry in cache.entries()}
    assert {name: entry.state for name, entry in found.items()} == {
        "4bit-g128": "ready",
        "3bit-g128": "unfinished, 0 layers done",
        "2bit-g32": "damaged",
    }
    assert {entry.bits for entry in found.values()} == {0}
    assert found["2bit-g32"].source == "HuggingFaceH4--starchat-alpha"


# ---- names


def test_names_are_found_by_their_beginning(root):
    finished(ALPHA, QuantConfig(bits=8, group_size=128))
    finished(ALPHA, QuantConfig(bits=4, group_size=128))
    finished(ALPHA, QuantConfig(bits=4, group_size=128, sym=False))
    finished("bigcode/santacoder", QuantConfig(bits=4, group_size=64))
    key = "HuggingFaceH4--starchat-alpha"
    assert cache.find(f"{key}/8bit-g128").path.name == "8bit-g128"
    assert cache.find("8bit-g128").name == cache.find("8").name == f"{key}/8bit-g128"
    assert cache.find("4bit-g128").name == f"{key}/4bit-g128"  # an exact name, also the beginning of another
    assert cache.find("bigcode/santacoder").name == "bigcode--santacoder/4bit-g64"
    assert cache.find("bigcode").name == "bigcode--santacoder/4bit-g64"
    for text in ("4bit", key, "HuggingFaceH4", ALPHA):
        with pytest.raises(InvalidRequestError, match=r"matches .*4bit-g128"):
            cache.find(text)
    for text, near in (
        ("8bit-g12O", "8bit-g128"),
        ("bigcode/santacoda", "santacoder"),
        ("zzz", "lowmem list"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            cache.find(text)
        assert near in caught.value.hint
    for text in ("", "..", "../..", "/", f"{key}/../..", str(root)):
        with pytest.raises(InvalidRequestError):
            cache.find(text)


def test_a_label_of_two_models_is_ambiguous(root):
    for source in (ALPHA, "bigcode/santacoder"):
        finished(source, QuantConfig(group_size=128))
    with pytest.raises(InvalidRequestError, match=r"matches HuggingFaceH4--.*, bigcode--"):
        cache.find("4bit-g128")


# ---- removal


def test_remove_takes_the_entry_and_its_job_and_no_more(root):
    done = finished(ALPHA, QuantConfig(group_size=128))
    begun(ALPHA, QuantConfig(group_size=128))
    other = finished(ALPHA, QuantConfig(bits=8, group_size=128))
    (entry,) = [entry for entry in cache.entries() if entry.path == done]
    assert cache.remove(entry.name) == entry.nbytes
    assert sorted(path.name for path in done.parent.iterdir()) == ["8bit-g128", cache.ORIGIN_FILE]
    cache.remove(f"{other.parent.name}/{other.name}")
    assert list((root / "models").iterdir()) == []
    for name in (entry.name, "..", "../models", "HuggingFaceH4--starchat-alpha/..", ""):
        with pytest.raises(InvalidRequestError):
            cache.remove(name)


def test_an_interrupted_removal_can_be_finished(root):
    job = begun(ALPHA, QuantConfig(group_size=128))
    waste = job.with_name(job.name + ".done")
    job.rename(waste)
    assert names() == ["HuggingFaceH4--starchat-alpha/4bit-g128"]
    cache.remove(names()[0])
    assert list((root / "models").iterdir()) == []


def test_a_link_is_removed_and_never_followed(root, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep me")
    done = finished(ALPHA, QuantConfig(group_size=128))
    (done / "inside").symlink_to(precious)
    linked = cache.claim(ALPHA, "8bit-g128")
    linked.symlink_to(precious)
    for suffix in (".partial", ".partial.done"):
        linked.with_name(linked.name + suffix).symlink_to(precious)
    for name in names():
        cache.remove(name)
    assert list((root / "models").iterdir()) == []
    # A link to a whole model elsewhere.
    (tmp_path / "elsewhere" / "4bit-g128").mkdir(parents=True)
    (root / "models" / "moved").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="outside the cache"):
        cache.remove("moved/4bit-g128")
    assert (tmp_path / "elsewhere" / "4bit-g128").is_dir()
    assert [path.name for path in precious.iterdir()] == ["file"]


def test_nothing_is_removed_while_a_conversion_works_on_it(root):
    job = begun(ALPHA, QuantConfig(group_size=128))
    done = finished(ALPHA, QuantConfig(group_size=128))
    with (job / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="a conversion is working on"):
            cache.remove(names()[0])
        assert done.is_dir() and (job / "job.json").is_file()
    cache.remove(names()[0])
    assert names() == []


# ---- the commands


def test_list(root):
    empty = lowmem(root, "list")
    assert (empty.returncode, empty.stdout) == (0, "")
    assert len(empty.stderr.splitlines()) == 1
    assert "lowmem convert" in empty.stderr and str(root) in empty.stderr
    assert json.loads(lowmem(root, "list", "--json").stdout) == {"cache": str(root), "entries": []}
    finished(ALPHA, QuantConfig(bits=8, group_size=128), size=3 << 20)
    begun("/x", QuantConfig(bits=3, group_size=64))
    result = lowmem(root, "list")
    assert (result.returncode, result.stderr) == (0, "")
    heading, eight, three = result.stdout.splitlines()
    assert heading.split() == ["NAME", "SOURCE", "BITS", "SIZE", "LAST", "USED", "STATE"]
    assert eight.startswith("HuggingFaceH4--starchat-alpha/8bit-g128  " + ALPHA)
    assert "3 MiB" in eight and eight.endswith("ready")
    assert three.endswith("unfinished, 3 layers done")
    column = heading.index("BITS")
    assert (eight[column], three[column]) == ("8", "3")
    (first, _) = json.loads(lowmem(root, "list", "--json").stdout)["entries"]
    assert (first["bits"], first["group_size"], first["complete"], first["source"]) == (8, 128, True, ALPHA)


def test_list_shows_the_average_bits_of_a_mixed_entry(root):
    """As its report says; an unfinished job does not know them yet."""
    folder = finished(ALPHA, QuantConfig(bits=3, group_size=128))
    other = {"transformer.h.0.attn.c_attn": LinearFormat(5, 64)}
    settings = quantization_config_dict(QuantConfig(bits=3, group_size=128), version="0", linears=other)
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    (entry,) = cache.entries()
    assert (entry.bits, entry.mixed) == (0, True), "without a report"
    for text, bits in (("3.4994", 3.5), ("true", 0), ("NaN", 0), ('"3"', 0), ("[]", 0), ("1e99", 0)):
        (folder / "lowmem-report.json").write_text(f'{{"bits_per_weight": {text}}}')
        assert [e.bits for e in cache.entries()] == [bits]
    (folder / "lowmem-report.json").write_text('{"bits_per_weight": 3.4994}')
    heading, row = lowmem(root, "list").stdout.splitlines()
    assert row[heading.index("BITS") :].startswith("3.5, mixed ")
    job = begun(ALPHA, QuantConfig(bits=4, group_size=128))
    state = json.loads((job / "job.json").read_text())
    state["recipe"]["linears"] = {"transformer.h.0.attn.c_attn": [5, 64, True]}
    (job / "job.json").write_text(json.dumps(state))
    assert [(e.bits, e.mixed) for e in cache.entries() if not e.complete] == [(0, True)]


def test_list_and_rm_load_no_heavy_library(root):
    finished(ALPHA, QuantConfig(group_size=128))
    code = DRIVER.replace("sys.exit(cli.main())", "cli.main()") + (
        "\nheavy = {'torch', 'transformers', 'numpy', 'rich', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for arguments in (["list"], ["rm", "4bit", "--yes"]):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert result.returncode == 0, result.stderr
    assert cache.entries() == []


def test_rm(root):
    for bits in (8, 4, 3):
        finished(ALPHA, QuantConfig(bits=bits, group_size=128))
    for arguments, words in (
        (["rm"], "NAME"),
        (["rm", "8bit"], "--yes"),
        (["rm", "8bit", "nonsense", "--yes"], "'nonsense' is not in the cache"),
        (["rm", "../../x", "--yes"], "not in the cache"),
        (["rm", "HuggingFaceH4", "--yes"], "matches"),
    ):
        result = lowmem(root, *arguments, stdin=subprocess.DEVNULL)
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1 and words in result.stderr
    assert len(names()) == 3  # all or none
    result = lowmem(root, "rm", "8bit", "3bit-g128", "8", "-y")
    assert result.returncode == 0, result.stderr
    removed = [line.split(":")[0].rpartition("/")[2] for line in result.stdout.splitlines()]
    assert removed == ["8bit-g128", "3bit-g128"]
    assert names() == ["HuggingFaceH4--starchat-alpha/4bit-g128"]


@pytest.mark.parametrize(("answer", "left"), [("n", 1), ("", 1), ("y", 0), ("yes", 0)])
def test_rm_asks_on_a_terminal(root, answer, left):
    finished(ALPHA, QuantConfig(group_size=128))
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        result = lowmem(root, "rm", "4bit-g128", stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert "4bit-g128" in result.stdout and "Remove?" in result.stdout
    assert (result.returncode, len(names())) == (left, left)


# ---- convert without OUT


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """128 does not divide its 192 columns: the converter picks groups of 64."""
    folder = tmp_path_factory.mktemp("cached") / "source"
    return save_source(tiny_model("gpt_bigcode_mqa", layers=2, hidden=192, heads=6), folder)


def convert_arguments(source: Path) -> list[str]:
    text = calibration_file(source.parent)
    return ["convert", str(source), "--calibration", str(text), "--rows", "4", "--row-length", "64"]


def convert_here(
    source: Path, bits: int = 4, out: Path | None = None, reporter: Reporter | None = None, **options: Any
) -> Path:
    """Run the command with `convert_arguments` in this process."""
    calibration = CalibrationSpec(str(calibration_file(source.parent)), 4, 64)
    config = QuantConfig(bits=bits)
    summary = convert(
        source, out, config, calibration=calibration, options=ConvertOptions(**options), reporter=reporter
    )
    return Path(summary.out)


def test_convert_without_out_writes_into_the_cache(root, source, tmp_path):
    result = lowmem(root, *convert_arguments(source))
    assert result.returncode == 0, result.stderr
    (entry,) = cache.entries_for(str(source))
    assert entry.complete and entry.state == "ready"
    assert (entry.bits, entry.group_size, entry.source) == (4, 64, str(source))
    assert entry.path.name.startswith("4bit-g64-")  # the calibration was not the built-in one
    lines = result.stderr.splitlines()
    assert f"converting into {entry.path}" in lines
    assert lines[-1] == f"use it with: lowmem run {source}"
    # The same bytes as with an explicit folder.
    assert digest_of(entry.path) == digest_of(convert_here(source, out=tmp_path / "out"))
    # Again: nothing is converted; another width is another entry.
    with pytest.raises(OutputError, match="already converted") as caught:
        convert_here(source)
    assert str(entry.path) in caught.value.message and f"lowmem run {source}" in caught.value.hint
    convert_here(source, bits=3)
    assert [e.bits for e in cache.entries_for(str(source))] == [3, 4]
    before = entry.path.stat().st_ino
    assert convert_here(source, force=True) == entry.path
    assert entry.path.stat().st_ino != before
    assert [e.state for e in cache.entries_for(str(source))] == ["ready", "ready"]


def test_a_conversion_that_cannot_begin_leaves_nothing_in_the_cache(root, source):
    with pytest.raises(MemoryBudgetError):
        convert_here(source, memory=10 << 20)
    assert list((root / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written") as caught:
        cache.claim(ALPHA, "4bit-g128")
    assert "LOWMEM_CACHE" in caught.value.hint
    assert cache.entries() == []


class Listening(Reporter):
    """Records how many layers were already converted."""

    def started(self, plan: object, layers: int, finished: int, note: str) -> None:
        self.found = finished


def test_an_interrupted_conversion_is_listed_and_resumed(root, tmp_path):
    source = save_source(tiny_model("gpt_bigcode_mqa", layers=16), tmp_path / "long")
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *convert_arguments(source)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        # Background jobs of a shell ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("layer "):
            with pytest.raises(OutputError, match="a conversion is working on"):
                cache.remove(names()[0])
            process.send_signal(signal.SIGINT)
            break
    said += process.stderr.read()
    assert process.wait() == 130, said
    (entry,) = cache.entries_for(str(source))
    assert f"{entry.layers_done} layers are finished in {entry.path}.partial" in said
    assert not entry.complete and entry.unfinished and 0 < entry.layers_done < 16
    assert (entry.bits, entry.group_size) == (4, 64)
    listening = Listening()
    assert convert_here(source, reporter=listening) == entry.path
    assert listening.found == entry.layers_done
    (entry,) = cache.entries_for(str(source))
    assert entry.state == "ready"
