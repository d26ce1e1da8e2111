"""Links to another disk: weights are followed, and no file's text is shown that the user did not mean."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowmem.checkpoint.files.links import check_folder, leads_outside
from lowmem.checkpoint.headers.folder import tensor_headers
from lowmem.checkpoint.source.open import open_source
from lowmem.errors import SourceError
from tests.fuzz.seeds import copy_seed

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


def secret(folder: Path, name: str = "id_rsa") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(SECRET)
    return folder / name


def move(file: Path, folder: Path, name: str = "") -> Path:
    """Move a file to another folder, and leave a link."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / (name or file.name)
    file.rename(target)
    file.symlink_to(target)
    return target


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("source", "*.safetensors"), ("packed", "*.safetensors"), ("bin", "*.bin"), ("gguf", "*.gguf")],
)
def test_weights_may_lie_on_another_disk(kind: str, pattern: str, tmp_path: Path) -> None:
    whole = tensor_headers(copy_seed(kind, tmp_path / "whole"))
    folder = copy_seed(kind, tmp_path / "model")
    for file in folder.glob(pattern):
        move(file, tmp_path / "disk", f"blob-of-{file.name}")  # under any name, as ollama's
    assert tensor_headers(folder) == whole
    first, second = open_source(str(folder)), open_source(str(tmp_path / "whole"))
    assert first.fingerprint() == second.fingerprint()
    name = next(iter(first.infos))
    assert (first.read(name) == second.read(name)).all()


def test_a_folder_of_links_to_a_model_is_that_model(tmp_path: Path) -> None:
    """`ln -s /nas/model/* .`, with a folder of templates."""
    nas, folder = copy_seed("source", tmp_path / "nas"), tmp_path / "model"
    (nas / "additional_chat_templates").mkdir()
    (nas / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    folder.mkdir()
    for path in nas.iterdir():
        (folder / path.name).symlink_to(path)
    linked, real = open_source(str(folder)), open_source(str(nas))
    assert [path.name for path in linked.side_files()] == [path.name for path in real.side_files()]
    assert linked.fingerprint() == real.fingerprint()


@pytest.mark.parametrize("cache", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_the_blobs_of_the_users_hub_cache_may_lie_on_another_disk(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv(cache, str(home))
    below = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}
    hub = home / below.get(cache, ".cache/huggingface/hub")
    repo, disk = hub / "models--owner--name", tmp_path / "disk"
    files = copy_seed("source", tmp_path / "files")
    disk.mkdir()
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "blobs").symlink_to(disk)
    for number, file in enumerate(sorted(files.iterdir())):
        file.rename(disk / str(number))
        (repo / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
    assert open_source(str(repo / "snapshots" / "abc")).side_files()
    monkeypatch.setenv(cache, str(tmp_path / "another"))  # a downloaded folder of that shape is not a cache
    with pytest.raises(SourceError, match="leads out of its folder"):
        check_folder(repo / "snapshots" / "abc")
    # A repository's folder that was moved as a whole keeps its blobs.
    (repo / "blobs").unlink()
    disk.rename(repo / "blobs")
    repo.rename(tmp_path / "moved")
    (hub / "models--owner--name").symlink_to(tmp_path / "moved")
    check_folder(repo / "snapshots" / "abc")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja", "LICENSE"])
def test_a_text_is_not_read_from_another_folder_unless_asked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_seed("source", tmp_path / "model")
    key = secret(tmp_path / "ssh")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(key)
    # Weights that lead to the same folder do not make it a model's folder.
    shard = next(folder.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(secret(key.parent, "known_hosts"))
    assert leads_outside(folder / name)
    if name != "LICENSE":  # which is only left out of copies
        with pytest.raises(SourceError, match="LOWMEM_FOLLOW_LINKS=1") as refused:
            check_folder(folder)
        assert SECRET not in str(refused.value)
    monkeypatch.setenv("LOWMEM_FOLLOW_LINKS", "1")
    assert not leads_outside(folder / name)


def test_weights_that_are_no_weights_are_refused_without_their_text(tmp_path: Path) -> None:
    for kind in ("source", "bin", "gguf"):
        folder = copy_seed(kind, tmp_path / kind)
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.gguf")]:
            file.unlink()
            file.symlink_to(secret(tmp_path / "ssh"))
        with pytest.raises(SourceError) as refused:
            tensor_headers(folder)
        assert not any(word in str(refused.value) for word in SECRET.strip("-").split())


@pytest.mark.parametrize("follow", ["", "1"])
def test_devices_pipes_and_unmounted_disks_are_refused(
    follow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWMEM_FOLLOW_LINKS", follow)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for target, reason in [("/dev/zero", "plain file"), (pipe, "plain file"), ("/gone/x", "does not exist")]:
        folder = copy_seed("packed", tmp_path / reason.split()[0] / Path(target).name)
        shard = next(folder.glob("*.safetensors"))
        shard.unlink()
        shard.symlink_to(target)
        with pytest.raises(SourceError, match=reason):
            check_folder(folder)
