"""Checks of a load: values, tokenizers, truncated files, and digests with --check."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.checkpoint.files.shards import SINGLE_FILE
from lowmem.checkpoint.headers.safetensors import read_header
from lowmem.checkpoint.manifest import MANIFEST_FILE, write_manifest
from lowmem.checkpoint.source import mapped
from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.verify.converted import verify
from lowmem.checkpoint.verify.digests import check_all, known_digests
from lowmem.cli import main
from lowmem.errors import InvalidRequestError, SourceError
from lowmem.kernels.native import library as native
from lowmem.kernels.native import linear as native_linear
from lowmem.loading import loader
from lowmem.loading.loader import load
from lowmem.loading.opening import open_model
from lowmem.plan.request import ModelRequest
from tests.helpers import save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

DOWN = "model.layers.1.mlp.down_proj"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the converter writes it: two shards, and a manifest."""
    folder = tmp_path_factory.mktemp("converted")
    write_rtn_checkpoint(tiny_model("llama"), folder, bits=4, shards=2)
    write_manifest(folder)
    return folder


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def refusal(folder: Path) -> str:
    """The message, of one line, of a refused load."""
    with pytest.raises(SourceError) as caught:
        load(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


def flip(file: Path, at: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 1 << bit
    file.write_bytes(data)


# ---- values ----------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors of a checkpoint of one file."""
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{DOWN}.scales", float("nan")),
        (f"{DOWN}.scales", float("-inf")),
        ("model.norm.weight", float("inf")),
    ],
)
def test_a_value_that_is_not_finite_is_refused_by_name(name: str, value: float, tmp_path: Path) -> None:
    """Otherwise every answer fails later, or a whole column is silently zero."""
    write_rtn_checkpoint(tiny_model("llama"), tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    rewrite(tmp_path, spoil)
    text = refusal(tmp_path)
    assert f"tensor {name!r} has values that are not finite" in text and "lowmem verify" in text


def test_a_bias_and_scales_of_strange_kinds_are_refused(tmp_path: Path) -> None:
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path)
    whole = load_file(tmp_path / SINGLE_FILE)
    name = next(n for n in whole if n.endswith("c_fc.bias"))
    for key, tensor, words in (
        (name, whole[name].clone().index_fill_(0, torch.tensor([1]), torch.inf), "not finite"),
        (
            name.replace("bias", "scales"),
            whole[name.replace("bias", "scales")].to(torch.float8_e4m3fn),
            "float8",
        ),
    ):
        save_file({**whole, key: tensor}, tmp_path / SINGLE_FILE)
        text = refusal(tmp_path)
        assert key in text and words in text


@pytest.mark.parametrize("packed", [False, True])
def test_a_tensor_without_values_is_refused_before_a_kernel_divides_by_nothing(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear from no inputs is a shape on which all tensors can agree, whatever config.json says."""
    model = tiny_model("gpt_bigcode_mqa").to(torch.bfloat16)
    for block in model.transformer.h:
        block.mlp.c_fc = torch.nn.Linear(64, 0).bfloat16()
        block.mlp.c_proj = torch.nn.Linear(0, 64).bfloat16()
    save_source(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = dict(load_file(tmp_path / SINGLE_FILE))
    if packed:
        stem = "transformer.h.0.mlp.c_proj"
        del whole[f"{stem}.weight"]
        whole |= {
            f"{stem}.qweight": torch.empty(0, 64, dtype=torch.int32),
            f"{stem}.qzeros": torch.empty(0, 8, dtype=torch.int32),
            f"{stem}.scales": torch.empty(0, 64, dtype=torch.float16),
            f"{stem}.g_idx": torch.empty(0, dtype=torch.int32),
        }
        save_file(whole, tmp_path / SINGLE_FILE)
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
        (tmp_path / "config.json").write_text(json.dumps(config))

    def build(*args: Any, **options: Any) -> Any:
        return model.to("meta")

    monkeypatch.setattr(loader, "build_model", build)
    assert "is empty" in refusal(tmp_path)


@pytest.mark.skipif(not native.available(), reason=native.why_not())
def test_shapes_that_overflow_cs_integers_are_refused() -> None:
    """Shapes of tensors that a sparse file can hold: nothing is allocated for them here either."""
    for inputs, outputs in ((1 << 31, 8), (64, 1 << 31)):
        words = torch.zeros((), dtype=torch.int32).expand(inputs // 8, outputs)
        with pytest.raises(native_linear.Unsuitable, match="features"):
            native_linear.Packed(words, torch.empty(1, outputs, device="meta"), None, None, 4, inputs)
    with pytest.raises(native_linear.Unsuitable, match="64 to 0 features"):
        native_linear.Packed(torch.empty(8, 0, dtype=torch.int32), torch.empty(2, 0), None, None, 4, 32)


# ---- another tokenizer -----------------------------------------------------------------------------------


def edit_json(file: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def swap_two_tokens(folder: Path) -> None:
    """The same size and markers, but another vocabulary: counting tokens cannot detect it."""

    def change(data: Any) -> None:
        vocabulary = data["model"]["vocab"]
        first, second = (token for token, number in vocabulary.items() if number in (300, 301))
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit_json(folder / "tokenizer.json", change)


def test_a_tokenizer_that_was_swapped_after_the_conversion_is_refused(copy: Path) -> None:
    swap_two_tokens(copy)
    text = refusal(copy)
    assert "tokenizer.json is not the tokenizer that this checkpoint was converted with" in text
    assert "the manifest" in text and "convert again" in text
    (copy / MANIFEST_FILE).unlink()  # its conversion settings are now unknown
    load(copy)


def test_changed_settings_are_told_and_nothing_else_is_said(copy: Path) -> None:
    heard: list[str] = []
    (copy / "README.md").write_text("mine")
    load(copy, notify=heard.append)
    assert heard == []
    edit_json(copy / "generation_config.json", lambda data: data.update(max_length=9))
    (copy / "tokenizer_config.json").unlink()
    load(copy, notify=heard.append)
    assert [line.split()[0] for line in heard] == ["generation_config.json", "tokenizer_config.json"]
    assert "manifest" in heard[0] and heard[1].endswith("is missing")
    (copy / MANIFEST_FILE).write_text("{")
    load(copy, notify=heard.append)
    assert len(heard) == 3 and "nothing could be compared" in heard[2]


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path: Path) -> None:
    save_source(tiny_model("llama", vocab=2000), tmp_path)
    text = refusal(tmp_path)
    assert "gives tokens up to 4095, and the model has 2000: it is another model's" in text


def test_markers_that_the_model_does_not_have_are_refused_and_others_told(tmp_path: Path) -> None:
    """The dialogue tokens are needed in every question; a [PAD] that was added later is harmless."""
    save_source(tiny_model("llama", vocab=4096), tmp_path)
    added = {"content": "[PAD]", "special": True, "lstrip": False, "rstrip": False}
    added |= {"single_word": False, "normalized": False}
    edit_json(tmp_path / "tokenizer.json", lambda d: d["added_tokens"].append({**added, "id": 4096}))
    heard: list[str] = []
    load(tmp_path, notify=heard.append)
    assert heard == ["the model of 4096 tokens does not have the tokenizer's '[PAD]'"]
    # The markers come last: StarCoder's weights beside StarChat's tokenizer, made small.
    save_source(tiny_model("llama", vocab=4095), tmp_path / "base")
    assert "gives tokens up to 4095, and the model has 4095" in refusal(tmp_path / "base")


def test_a_tokenizer_of_far_fewer_tokens_is_told(tmp_path: Path) -> None:
    heard: list[str] = []
    load(save_source(tiny_model("llama", vocab=6000), tmp_path), notify=heard.append)
    assert heard == ["the tokenizer has 4096 tokens, and the model 6000: it may be another model's"]


# ---- files cut short -------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"5" * 64 + b"\nsize 4411111\n"


def largest(folder: Path) -> Path:
    return max(
        (p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")), key=lambda p: p.stat().st_size
    )


def cut(share: float) -> Change:
    def change(folder: Path) -> None:
        file = largest(folder)
        with file.open("r+b") as stream:
            stream.truncate(int(file.stat().st_size * share))

    return change


def cut_by_one(folder: Path) -> None:
    file = largest(folder)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)


def pointer(folder: Path) -> None:
    largest(folder).write_bytes(POINTER)


def unfinished(folder: Path) -> None:
    file = largest(folder)
    file.rename(file.with_name(file.name + ".incomplete"))


def missing(folder: Path) -> None:
    largest(folder).unlink()


CUTS = {
    "nothing": cut(0),
    "a tenth": cut(0.1),
    "half": cut(0.5),
    "all but a byte": cut_by_one,
    "a pointer of git-LFS": pointer,
    "unfinished": unfinished,
    "missing": missing,
}


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize(
    "kind", ["converted", "safetensors", "safetensors in shards", "bin", "bin in shards"]
)
def test_truncated_files_are_refused_before_anything_is_allocated(
    kind: str, how: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "it"
    if kind == "converted":
        shutil.copytree(converted, folder)
    else:
        form, shards = kind.split()[0], 3 if "shards" in kind else 1
        save_source(tiny_model("llama", vocab=4096, hidden=32), folder, format=form, shards=shards)
    name = largest(folder).name
    CUTS[how](folder)

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("something was built or mapped")

    monkeypatch.setattr(loader, "build_model", never)
    monkeypatch.setattr(mapped.MappedFiles, "_storage", never)
    text = refusal(folder)
    assert name in text or ("weights" in text and kind in ("safetensors", "bin"))
    assert "ownload" in text or "verify" in text or "Convert" in text or "git lfs pull" in text
    assert ("git-LFS" in text) == (how == "a pointer of git-LFS")


def test_a_shard_that_became_longer_or_shorter_is_refused_by_its_size(copy: Path) -> None:
    """A shard of another conversion, consistent with its own header."""
    shard = largest(copy)
    save_file(load_file(shard), shard, metadata={"format": "pt", "another": "conversion"})
    assert f"{shard.name} has" in refusal(copy)


# ---- digests when asked ----------------------------------------------------------------------------------


def test_every_flipped_bit_is_found_by_verify_and_by_a_check(converted: Path, tmp_path: Path) -> None:
    """One bit in every part of every file that the manifest lists."""
    assert check_all(converted) == len(known_digests(converted).files)
    files = sorted(known_digests(converted).files)
    assert sum(name.endswith(".safetensors") for name in files) == 2
    for name in files:
        size = (converted / name).stat().st_size
        for share in (0, 0.3, 0.7, 0.999):
            folder = tmp_path / "copy"
            shutil.copytree(converted, folder)
            flip(folder / name, int(size * share), bit=int(share * 10) % 8)
            with pytest.raises(SourceError, match=f"{name} was changed: its sha256 is not the manifest's"):
                check_all(folder)
            shutil.rmtree(folder)
    shutil.copytree(converted, tmp_path / "copy")
    shards = [read_header(path) for path in (tmp_path / "copy").glob("*.safetensors")]
    shard, packed = next((s.path, t) for s in shards for name, t in s.tensors.items() if ".qweight" in name)
    flip(shard, packed.begin + 8)  # a weight: nothing else could tell
    load(tmp_path / "copy")
    assert shard.name in str(verify(tmp_path / "copy").problems[0])


def request(folder: Path) -> ModelRequest:
    return ModelRequest(model=str(folder), device="cpu", context=32, check=True)


def test_a_check_reads_all_and_tells_how_far_it_is(copy: Path) -> None:
    heard: list[str] = []
    steps: list[tuple[int, int]] = []
    open_model(request(copy), heard.append, lambda done, total: steps.append((done, total)))
    whole = sum(path.stat().st_size for path in copy.iterdir() if path.name != MANIFEST_FILE)
    assert (whole, whole) in steps
    assert any("comparing the files" in line for line in heard) and any(
        "match their digests" in h for h in heard
    )
    flip(largest(copy), -1)
    with pytest.raises(SourceError, match="was changed"):
        open_model(request(copy))


def test_the_command_line_names_the_file_in_one_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", str(copy), "--device", "cpu", "-p", "x", "--context", "32", "--max-new-tokens", "1"]
    flip(largest(copy), -1)
    assert main([*words, "--check", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{largest(copy).name} was changed" in err
    swap_two_tokens(copy)
    assert main([*words, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "not the tokenizer that this checkpoint was converted with" in err


def test_a_check_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    save_source(tiny_model("llama"), tmp_path)
    with pytest.raises(InvalidRequestError, match="so it cannot be compared"):
        open_model(request(tmp_path))
    write_manifest(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    with pytest.raises(SourceError, match=f"{SINGLE_FILE} is missing, and the manifest lists it"):
        check_all(tmp_path)


def test_pickle_shards_have_checksums_of_their_own(tmp_path: Path) -> None:
    save_source(tiny_model("llama", hidden=32), tmp_path, format="bin", shards=2)
    assert check_all(tmp_path) == 2
    file = largest(tmp_path)
    flip(file, file.stat().st_size // 2)
    with pytest.raises(
        SourceError, match=f"{file.name}: model.* was changed: its bytes do not have"
    ) as caught:
        check_all(tmp_path)
    assert "\n" not in str(caught.value)


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def in_hub_cache(source: Path, root: Path) -> Path:
    """As the hub's library lays a download out: links into blobs that are called by their digests."""
    snapshot, blobs = root / "snapshots" / "0123", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in source.iterdir():
        data = file.read_bytes()
        large = file.suffix in (".safetensors", ".bin")
        digest = hashlib.sha256(data).hexdigest() if large else git_digest(data)
        (blobs / digest).write_bytes(data)
        (snapshot / file.name).symlink_to(Path("../../blobs") / digest)
    return snapshot


def as_download(source: Path, folder: Path) -> Path:
    """As `hf download --local-dir` leaves a folder: the digests in notes beside it."""
    shutil.copytree(source, folder)
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for file in source.iterdir():
        data = file.read_bytes()
        large = file.suffix in (".safetensors", ".bin")
        digest = hashlib.sha256(data).hexdigest() if large else git_digest(data)
        (notes / f"{file.name}.metadata").write_text(f"0123abc\n{digest}\n1700000000.0\n")
    return folder


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("lay_out", [in_hub_cache, as_download])
def test_what_the_hub_gave_is_compared_with_the_hubs_digests(
    lay_out: Callable[[Path, Path], Path], format: str, tmp_path: Path
) -> None:
    source = save_source(tiny_model("llama", hidden=32), tmp_path / "source", format=format)
    folder = lay_out(source, tmp_path / "models--a--b")
    count = len(list(source.iterdir()))
    assert check_all(folder) == count
    report = verify(folder)
    assert report.ok and f"{count} of {count} files were compared with the hub's digests" in report.notes[0]
    for name in ("config.json", "tokenizer.json", largest(source).name):
        before = (folder / name).read_bytes()
        flip(folder / name, len(before) // 2 if name == "config.json" else -5, bit=3)
        with pytest.raises(SourceError, match=f"{name} was changed"):
            check_all(folder)
        assert any(name in str(problem) for problem in verify(folder).problems)
        (folder / name).write_bytes(before)
    assert check_all(folder) == count


def test_a_pointer_in_the_place_of_a_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(POINTER)
    with pytest.raises(SourceError, match=r"model\.gguf is a git-LFS pointer, not the file itself"):
        open_source(str(tmp_path))
