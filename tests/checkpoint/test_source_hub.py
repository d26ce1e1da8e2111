"""Hub ids: the files that are downloaded, and the messages when that fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lowmem.checkpoint.files.whole import DiskFullError
from lowmem.checkpoint.source import hub
from lowmem.checkpoint.source.open import Source, open_source
from lowmem.cli import main
from lowmem.errors import SourceError
from tests.helpers import (
    fails,
    save_source,
    starchat_replica,
    tiny_model,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt_bigcode_mqa", vocab=4096)


@pytest.fixture(scope="module")
def replica(tmp_path_factory) -> Path:
    return starchat_replica(tmp_path_factory.mktemp("starchat") / "replica", n_positions=512)


class Answer:
    """A response of model_info."""

    def __init__(self, *names: str) -> None:
        self.sha = "abc"
        self.siblings = [type("Sibling", (), {"rfilename": name}) for name in names]


def hub_error(kind: str) -> Exception:
    """One of huggingface_hub's own exceptions, as it raises them."""
    import inspect

    from huggingface_hub import errors

    error = getattr(errors, kind)
    if "response" not in inspect.signature(error.__init__).parameters:
        return error("no\nway")  # type: ignore[no-any-return]
    response = type("R", (), {"headers": {}, "status_code": 404, "request": None})()
    return error("no\nway", response=response)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "message", "hint"),
    [
        ("RepositoryNotFoundError", "nor a repository on the hub", "log in"),
        ("GatedRepoError", "is gated", "Accept its terms at https://huggingface.co/owner/name and log in"),
        ("RevisionNotFoundError", "has no revision 'v1'", ""),
        ("OfflineModeIsEnabled", "cannot be reached", "local copy"),
        ("HfHubHTTPError", "cannot be reached", "local copy"),
    ],
)
def test_hub_errors_are_one_line(monkeypatch, tmp_path, kind, message, hint):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _raiser(hub_error(kind)))
    monkeypatch.setattr("huggingface_hub.snapshot_download", _raiser(hub_error("LocalEntryNotFoundError")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert hint in fails(message, "owner/name", revision="v1").hint
    fails("cannot be reached .offline.", "owner/name", offline=True)


def test_no_network(monkeypatch):
    from huggingface_hub import errors

    transport = errors.HfHubHTTPError.__bases__[0]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _raiser(transport("Name or service not known")))
    monkeypatch.setattr("huggingface_hub.snapshot_download", _raiser(hub_error("LocalEntryNotFoundError")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    error = fails("cannot be reached .Name or service not known", "HuggingFaceH4/starchat-alpha")
    assert "local copy" in error.hint


def _raiser(error: Exception):
    def raise_it(*args: object, **options: object) -> None:
        raise error

    return raise_it


def test_a_download_asks_for_what_is_needed_and_opens_it(replica, monkeypatch):
    """StarChat Alpha's file list: no code, no training state, and .bin because it has no safetensors."""
    names = [
        "README.md",
        "config.json",
        "handler.py",
        "tokenizer.json",
        "training_args.bin",
        "dialogue_template.json",
    ]
    names += [path.name for path in replica.iterdir()] + ["runs/events.out", "../up.json"]
    asked: dict[str, object] = {}

    def snapshot_download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(replica)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: Answer(*names))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    lines: list[str] = []
    source = open_source("HuggingFaceH4/starchat-alpha", progress=lines.append)
    assert isinstance(source, Source) and source.display == "HuggingFaceH4/starchat-alpha"
    assert asked["repo"] == "HuggingFaceH4/starchat-alpha" and asked["revision"] == "abc"
    wanted = set(asked["allow_patterns"])  # type: ignore[call-overload]
    assert {f"pytorch_model-0000{i}-of-00004.bin" for i in range(1, 5)} < wanted
    assert {
        "pytorch_model.bin.index.json",
        "config.json",
        "tokenizer.json",
        "dialogue_template.json",
    } < wanted
    assert not wanted & {"handler.py", "training_args.bin", "runs/events.out", "../up.json"}
    assert "fetching" in lines[0]


def test_what_does_not_fit_the_disk_is_not_fetched(replica, tmp_path, monkeypatch):
    """Sizes come from the hub; files in the cache, whole or partial, need no more space."""
    from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling

    gib = 1 << 30
    siblings = [
        RepoSibling(
            rfilename=f"pytorch_model-0000{n}-of-00002.bin",
            size=3 * gib,
            blob_id=f"{n}",
            lfs=BlobLfsInfo(size=3 * gib, sha256=f"{n}a", pointer_size=1),
        )
        for n in (1, 2)
    ]
    siblings += [RepoSibling(rfilename="config.json", size=gib, blob_id="small")]
    siblings += [RepoSibling(rfilename="optimizer.pt", size=100 * gib, blob_id="never")]
    answer = Answer()
    answer.siblings = siblings
    fetched: list[list[str]] = []

    def snapshot_download(repo: str, **options: object) -> str:
        fetched.append(sorted(options["allow_patterns"]))  # type: ignore[call-overload]
        return str(replica)

    free = [7 * gib - 1]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: answer)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("lowmem.checkpoint.files.whole.free_bytes", lambda folder: free[0])
    with pytest.raises(DiskFullError, match=r"needs 7.00 GiB of disk in .*, which has 7") as caught:
        hub.download("owner/name")
    assert "HF_HOME" in caught.value.hint and not fetched
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    with (blobs / "1a").open("wb") as whole, (blobs / "2a.incomplete").open("wb") as part:
        whole.truncate(3 * gib)
        part.truncate(gib)
    free[0] = 3 * gib - 1
    with pytest.raises(DiskFullError, match=r"needs 3.00 GiB"):
        hub.download("owner/name")
    assert not fetched
    free[0] = 3 * gib
    assert hub.download("owner/name") == replica
    assert fetched == [["config.json"], ["config.json", *(s.rfilename for s in siblings[:2])]]


ODD: dict[str, tuple[dict[str, object], str]] = {
    "another method": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "owner/name: .* in AWQ"),
    "another state": ({"model_type": "mamba"}, "keep other state than keys and values"),
    "an encoder": ({"model_type": "bert"}, "is an encoder"),
    "experts": ({}, "owner/name is a mixture of experts"),
    "already quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_kind_that_cannot_be_used_is_refused_before_its_weights_are_fetched(
    kind: str, tmp_path, monkeypatch, capsys
):
    settings, match = ODD[kind]
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    published = {
        "config.json": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, **settings},
        "model.safetensors.index.json": {
            "weight_map": dict.fromkeys([expert] if kind == "experts" else ["a"], shards[0])
        },
    }
    fetched: list[str] = []

    def snapshot_download(repo: str, **options: object) -> str:
        if options.get("local_files_only"):
            raise hub_error("LocalEntryNotFoundError")
        for name in options["allow_patterns"]:  # type: ignore[attr-defined]
            fetched.append(name)
            assert name not in shards, "weights were fetched"
            (tmp_path / name).write_text(json.dumps(published[name]))
        return str(tmp_path)

    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *args, **options: Answer(*published, *shards)
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path / "home"))
    commands = [["convert", "owner/name", str(tmp_path / "out")]]
    if kind not in ("experts", "already quantized"):  # these can be run
        commands.append(["run", "owner/name", "-p", "x"])
    for command in commands:
        fetched.clear()
        assert main(command) == 2
        assert re.search(match, " ".join(capsys.readouterr().err.split()))
        assert sorted(fetched) == sorted(published)


def test_choosing_files_of_a_repository():
    both = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "x.safetensors",
    ]
    assert hub.choose_files(both, "o/n") == both[:2]
    assert hub.choose_files(["odd.safetensors", "pytorch_model.bin"], "o/n") == ["odd.safetensors"]
    named = ["additional_chat_templates/tool_use.jinja", "model.safetensors", "processor_config.json"]
    others = ["additional_chat_templates/x.py", "additional_chat_templates/a/b.jinja", "other/x.jinja"]
    assert hub.choose_files([*named, *others], "o/n") == named
    for old in ("gptq_model-4bit-128g.safetensors", "gptq_model-4bit-128g.bin"):
        published = ["config.json", old, "quantize_config.json"]
        assert hub.choose_files([*published, "huggingface-metadata.txt"], "o/n") == published
    with pytest.raises(SourceError, match="no safetensors") as caught:
        hub.choose_files(["config.json", "a.Q4.gguf"], "o/n")
    assert "gguf" in caught.value.hint


def test_the_cached_copy_serves_without_a_network(model, tmp_path, monkeypatch):
    """The real snapshot_download on a cache that holds only the files that we fetch."""
    import huggingface_hub

    root = tmp_path / "models--owner--name"
    snapshot = save_source(model, root / "snapshots" / ("a" * 40), format="bin")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", _raiser(hub_error("OfflineModeIsEnabled")))
    # hub 2.x remembers what the repository holds, and would miss the files that we never fetch.
    tree = pytest.importorskip("huggingface_hub._tree_cache")
    names = [path.name for path in snapshot.iterdir()] + ["original/x.tiktoken", "LICENSE.py"]
    entry = tree.TreeCacheEntry(size=1, blob_id="b", lfs_sha256=None, lfs_size=None, xet_hash=None)
    tree.write_tree_cache(str(root), "a" * 40, dict.fromkeys(names, entry))
    lines: list[str] = []
    source = open_source("owner/name", progress=lines.append)
    assert source.path == snapshot and "cached" in lines[0]
    assert open_source("owner/name", offline=True).path == snapshot
