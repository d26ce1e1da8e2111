"""The contract of `Source`, held by every kind of checkpoint that `open_source` opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import torch

from lowmem.checkpoint.files.reading import row_numbers
from lowmem.checkpoint.formats import QUANT_PARTS, LinearFormat
from lowmem.checkpoint.source.open import Source, open_source
from lowmem.errors import SourceError
from tests.checkpoint.test_source_gguf import write_gguf
from tests.helpers import save_source, tiny_model
from tests.rtn_helpers import layer_linears, write_rtn_checkpoint

DENSE = ("safetensors", "sharded", "one file", "bin", "bin shards", "gguf", "hub snapshot")
PACKED = (
    *("gptq", "gptq in one file", "gptq v2", "gptq, act-order", "gptq with dense linears"),
    *("gptq without g_idx", "gptq of auto-gptq", "gptq of auto-gptq in shards", "gptq in a pickle"),
    "gptq of auto-gptq, one of several files",
)


@dataclass(frozen=True)
class Case:
    """A checkpoint on disk, and the model that it stores."""

    kind: str
    path: str
    weights: dict[str, torch.Tensor]
    """Of the model, by its own names."""
    format: LinearFormat | None = None

    def open(self) -> Source:
        return open_source(self.path, offline=True)


def make(kind: str, folder: Path) -> Case:
    model = tiny_model("llama", vocab=4096, tied=False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind == "gguf":
        save_source(model, folder)
        (folder / "model.safetensors").unlink()
        write_gguf(model, folder / "model.gguf", (gguf.GGMLQuantizationType.F32,), "llama")
        return Case(kind, str(folder / "model.gguf"), weights)
    if kind in DENSE:
        format = "bin" if "bin" in kind else "safetensors"
        save_source(model, folder, format=format, shards=3 if "shard" in kind else 1)
        path = {"one file": str(folder / "model.safetensors"), "hub snapshot": "owner/name"}
        return Case(kind, path.get(kind, str(folder)), weights)
    layout = "gptq_v2" if "v2" in kind else "gptq"
    write_rtn_checkpoint(model, folder, layout=layout, act_order_seed=3 if "act-order" in kind else None)
    if "dense" in kind:
        leave_dense(folder, weights, "gate_proj")
    as_published_in_2023(kind, folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()} | (
        {name: tensor for name, tensor in weights.items() if "gate_proj" in name} if "dense" in kind else {}
    )
    stored = LinearFormat(4, 32, sym=False, desc_act="act-order" in kind, layout=layout)
    path = folder / "model.safetensors" if "one file" in kind else folder
    return Case(kind, str(path), weights, stored)


def as_published_in_2023(kind: str, folder: Path) -> None:
    """Give a GPTQ folder the files of an older tool."""
    from safetensors.torch import load_file, save_file

    if not any(word in kind for word in ("without", "auto-gptq", "pickle")):
        return
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if "without" in kind:
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
        return save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    old = {key: settings[key] for key in ("bits", "group_size", "desc_act", "sym", "damp_percent")}
    (folder / "quantize_config.json").write_text(json.dumps(old))
    if "pickle" in kind:
        return torch.save(tensors, folder / "gptq_model-4bit-32g.bin")
    if "several" in kind:
        (folder / "quantize_config.json").write_text(json.dumps(old | {"model_file_base_name": "first"}))
        save_file({"other": torch.zeros(1)}, folder / "second.safetensors")
        return save_file(tensors, folder / "first.safetensors", metadata={"format": "pt"})
    if "shards" not in kind:
        return save_file(tensors, folder / "gptq_model-4bit-32g.safetensors", metadata={"format": "pt"})
    names = list(tensors)
    index = {}
    for shard in range(2):
        file = f"gptq_model-4bit-32g-{shard + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[shard::2]}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names[shard::2], file))
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "gptq_model-4bit-32g.safetensors.index.json").write_text(text)
    return None


def leave_dense(folder: Path, weights: dict[str, torch.Tensor], leaf: str) -> None:
    """Store the linears called `leaf` in 16 bits, and say so in `dynamic`."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if leaf not in n}
    kept |= {n: t for n, t in weights.items() if leaf in n}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {f"-:.*{leaf}.*": {}}
    (folder / "config.json").write_text(json.dumps(config))


def is_stored(case: Case, tensor: str) -> bool:
    """Whether the files hold a tensor of `Source.infos`."""
    return "without g_idx" not in case.kind or not tensor.endswith("g_idx")


def into_hub_cache(folder: Path, cache: Path) -> None:
    """The files of `folder` as the hub's library keeps them: links from a snapshot to blobs."""
    base = cache / "models--owner--name"
    snapshot = base / "snapshots" / ("a" * 40)
    for made in (snapshot, base / "blobs", base / "refs"):
        made.mkdir(parents=True)
    (base / "refs" / "main").write_text("a" * 40)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = base / "blobs" / f"{number:064x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)


@pytest.fixture(scope="module", params=[*DENSE, *PACKED])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("source") / "model"
    with pytest.MonkeyPatch.context() as patch:
        made = make(request.param, folder)
        if request.param == "hub snapshot":
            into_hub_cache(folder, folder.parent / "cache")
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent / "cache"))
        yield made


def test_opening_reads_no_weights(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: object, **_options: object) -> None:
        raise AssertionError("data was read")

    for name in ("safetensors.read_tensor", "mapped.MappedFiles._storage", "gguf.read_exact"):
        monkeypatch.setattr(f"lowmem.checkpoint.source.{name}", never)
    source = case.open()
    assert source.resolve(case.weights) and source.config() and source.infos


def test_every_tensor_of_the_model_comes_back(case: Case) -> None:
    source = case.open()
    names = source.resolve(case.weights)
    assert set(names) == set(case.weights)
    for name, expected in case.weights.items():
        info = source.dense_infos[names[name]]
        read = source.dense(names[name])
        assert (tuple(read.shape), str(read.dtype)) == (info.shape, f"torch.{info.dtype}")
        assert read.is_contiguous() and torch.equal(read.float(), expected.float()), name
    source.release()


def test_rows_are_rows_of_the_whole(case: Case) -> None:
    source = case.open()
    for rows in (slice(3, 9), slice(None, None, 2), torch.tensor([5, 0, 5])):
        for name, stored in source.resolve(n for n, t in case.weights.items() if t.dim() == 2).items():
            count = case.weights[name].shape[0]
            whole = source.dense(stored)
            assert torch.equal(source.dense(stored, rows), whole[list(row_numbers(rows, count))]), name
    norm = source.resolve(n for n, t in case.weights.items() if t.dim() == 1)
    with pytest.raises(ValueError, match="rows"):
        source.read(next(iter(norm.values())), slice(0, 1))


def test_a_map_is_what_a_read_is(case: Case) -> None:
    source = case.open()
    for name, info in source.infos.items():
        view = source.map(name)
        assert (view is not None) == (info.file.endswith(".safetensors") and is_stored(case, name))
        if view is not None:
            assert torch.equal(view, source.read(name)), name


def test_formats_of_linears(case: Case) -> None:
    source = case.open()
    assert (source.format is None) == (case.format is None)
    if source.format is None:
        assert source.quantized == {} and source.dense_infos == source.infos
        return
    linears = [name.removesuffix(".weight") for name in case.weights if "_proj.weight" in name]
    packed = [n for n in linears if "dense" not in case.kind or "gate_proj" not in n]
    assert source.quantized == dict.fromkeys(packed, case.format)
    for linear in linears:
        assert source.format.of(linear) == source.quantized.get(linear)
        assert (f"{linear}.qweight" in source.infos) == (linear in source.quantized)
    for linear in packed:
        assert all(f"{linear}.{part}" in source.infos for part in QUANT_PARTS)
    with pytest.raises(SourceError, match="already quantized"):
        open_source(case.path, offline=True, quantized=False)


def test_byte_ranges_cover_the_data(case: Case) -> None:
    source = case.open()
    for name, stored in source.resolve(case.weights).items():
        ranges = source.byte_ranges([stored])
        expected = (
            [stored]
            if stored in source.infos
            else [f"{stored.removesuffix('.weight')}.{part}" for part in QUANT_PARTS]
        )
        expected = [tensor for tensor in expected if is_stored(case, tensor)]
        assert len(ranges) == len(expected), name
        for part, tensor in zip(ranges, expected, strict=True):
            data = part.path.read_bytes()[part.begin : part.begin + part.size]
            assert 0 < part.size == len(data), name
            if "gguf" not in case.kind:  # there the rows of some tensors are permuted
                assert source.read(tensor).view(torch.uint8).numpy().tobytes() in data, tensor


def test_config_has_no_quantization_and_is_a_copy(case: Case) -> None:
    source = case.open()
    config = source.config()
    assert config.num_hidden_layers == 2 and not hasattr(config, "quantization_config")
    config.num_hidden_layers = 3
    assert source.config().num_hidden_layers == 2
    assert source.config_json["num_hidden_layers"] == 2
    assert isinstance(source.generation_config(), dict)


def test_the_tokenizer_and_the_files_beside_the_weights(case: Case) -> None:
    source = case.open()
    tokenizer = source.tokenizer()
    assert tokenizer.is_fast and tokenizer("def f").input_ids
    assert all(file.parent == source.path and file.suffix != ".safetensors" for file in source.side_files())


def test_the_fingerprint_is_of_the_content(case: Case, tmp_path: Path) -> None:
    source = case.open()
    first = source.fingerprint()
    assert len(first) == 64 and case.open().fingerprint() == first
    copy = tmp_path / "copy"
    shutil.copytree(source.path, copy)
    path = copy / Path(case.path).name if Path(case.path).is_file() else copy
    assert open_source(path).fingerprint() == first
    weights = sorted(f for f in copy.iterdir() if f.suffix in (".safetensors", ".bin", ".gguf"))[0]
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    if weights.suffix != ".bin":  # the end of a zip is its directory
        assert open_source(path).fingerprint() != first


def test_an_unknown_name_is_a_key_error(case: Case) -> None:
    source = case.open()
    with pytest.raises(KeyError):
        source.read("nothing")
    with pytest.raises(SourceError, match="nothing"):
        source.resolve([*case.weights, "nothing"])


def test_layer_linears_are_the_quantized_ones() -> None:
    """The oracle above names linears by their suffix; this checks that it names all of them."""
    model = tiny_model("llama", vocab=4096, tied=False)
    named = {name.removesuffix(".weight") for name in model.state_dict() if "_proj.weight" in name}
    assert set(layer_linears(model)) == named
