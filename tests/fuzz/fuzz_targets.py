"""Fuzz targets, one function for each format. A target takes bytes and may raise only a one-line
`LowmemError`.

Hypothesis (test_formats.py) and libFuzzer (coverage_guided.py) both call these functions. Any other exception
is a bug. All files are in one folder of the process, and a target restores the folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from lowmem.checkpoint.headers.bin import read_bin_header
from lowmem.checkpoint.headers.folder import gguf_metadata, read_config_json, tensor_headers
from lowmem.checkpoint.headers.gguf import check_whole_model, read_gguf_header
from lowmem.checkpoint.headers.safetensors import read_header
from lowmem.checkpoint.headers.tokenizer import check_tokenizer_files
from lowmem.checkpoint.manifest import find_quantization, read_manifest
from lowmem.checkpoint.packing import stored_shapes
from lowmem.checkpoint.source.bin import load_shard
from lowmem.checkpoint.source.card import license_of_card
from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.source.safetensors import read_tensor
from lowmem.errors import MAX_MESSAGE, LowmemError
from lowmem.models.architecture import inspect
from lowmem.models.dialogue import Dialogue, encode_plain, end_token_ids, fim_tokens
from lowmem.models.template import apply_template
from lowmem.plan.shape import read_shape
from lowmem.text.tokenizing import decode
from tests.helpers import TINY_STARCHAT

TEXT = "def f(a):\n    return a  # <|end|> <fim_prefix> ÿ€😀 " + "a" * 40 + "b"
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hello <|end|>"}]
INDEX = "model.safetensors.index.json"


@cache
def workspace() -> Path:
    """This process' folder."""
    return Path(mkdtemp(prefix="lowmem-fuzz-"))


@cache
def sound(kind: str) -> Path:
    """A valid checkpoint of `kind`, in which a target replaces one file; see seeds.py."""
    from tests.fuzz.seeds import copy_seed

    return copy_seed(kind, workspace() / kind)


@contextlib.contextmanager
def one_line_at_most() -> Iterator[None]:
    """Ignore a LowmemError whose message is one printable line."""
    try:
        yield
    except LowmemError as error:
        text = str(error)
        assert text.isprintable() and 0 < len(text) <= MAX_MESSAGE, text[:MAX_MESSAGE]


@contextlib.contextmanager
def replaced(path: Path, data: bytes) -> Iterator[Path]:
    """Replace the contents of the file, and restore them afterwards."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        yield path
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


# ---- the targets


def safetensors(data: bytes) -> None:
    """A whole safetensors file: all tensors must be inside the file."""
    with replaced(workspace() / "x.safetensors", data) as path, one_line_at_most():
        header = read_header(path)
        assert sum(stored.end - stored.begin for stored in header.tensors.values()) <= len(data)
        for name, stored in header.tensors.items():
            assert read_tensor(path, name, stored).shape == stored.shape


def bin_file(data: bytes) -> None:
    """A whole file of torch.save: our description must agree with torch, or the file is refused."""
    with replaced(workspace() / "pytorch_model.bin", data) as path, one_line_at_most():
        _both_readers(path, len(data))


def bin_pickle(data: bytes) -> None:
    """The pickle inside such a file, with correct checksums and one storage of 64 bytes."""
    bin_file(shard_of(data))


def shard_of(pickled: bytes) -> bytes:
    """Build the file that contains the pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (
            ("data.pkl", pickled),
            ("byteorder", b"little"),
            ("data/0", bytes(64)),
            ("version", b"3\n"),
        ):
            archive.writestr(f"x/{name}", content)
    return buffer.getvalue()


def _both_readers(path: Path, size: int) -> None:
    found = read_bin_header(path)
    assert all(tensor.nbytes <= size for tensor in found.values())
    loaded = load_shard(path)
    assert {n: (tuple(t.shape), str(t.dtype)[6:]) for n, t in loaded.items()} == {
        n: (t.shape, t.dtype) for n, t in found.items()
    }


def gguf(data: bytes) -> None:
    """A whole GGUF file, through our own checks before transformers reads it."""
    with replaced(workspace() / "x.gguf", data) as path, one_line_at_most():
        header = read_gguf_header(path)
        assert all(
            t.begin + t.nbytes <= len(data) and math.prod(t.shape) <= 4 * len(data)
            for t in header.tensors.values()
        )
        check_whole_model(header)
        gguf_metadata(path)
        read_shape(path)


def gguf_model(data: bytes) -> None:
    """A GGUF file through transformers' GGUF support: config, names, tokenizer and every tensor."""
    with replaced(workspace() / "model.gguf", data) as path, one_line_at_most():
        source = open_source(str(path))
        for name in source.infos:
            source.read(name)
        source.tokenizer()


def config(data: bytes) -> None:
    """config.json beside valid weights: the plan's shape, transformers' config, and a model on the meta
    device."""
    folder = sound("source")
    with replaced(folder / "config.json", data), one_line_at_most():
        read_config_json(folder)
        with one_line_at_most():
            read_shape(folder)
        inspect(open_source(str(folder)).config())


def quantization(data: bytes) -> None:
    """quantization_config in the config.json of packed weights, and in a separate file as auto-gptq writes
    it."""
    folder = sound("packed")
    try:
        value = json.loads(data)
        text = json.dumps(
            {**json.loads((folder / "config.json").read_text()), "quantization_config": value}
        ).encode()
    except (ValueError, RecursionError):
        text = data
    for name, content in (("config.json", text), ("quantize_config.json", data)):
        with replaced(folder / name, content), one_line_at_most():
            found = find_quantization(folder)
            if found is not None:
                bits, group_size = found.default.bits, found.default.group_size
                assert type(bits) is int and type(group_size) is int and len(found.label) < 40
                stored_shapes(64, 128, bits, group_size)
            read_shape(folder)


def index(data: bytes) -> None:
    """The index of shards: both readers must agree."""
    folder = sound("source")
    with replaced(folder / INDEX, data), one_line_at_most():
        found = tensor_headers(folder)
        assert {n: h.file for n, h in found.items()} == {
            n: i.file for n, i in open_source(str(folder)).infos.items()
        }


def tokenizer(data: bytes) -> None:
    """tokenizer.json, and every use of the tokenizer, including the text stream of an answer."""
    _tokenizer("tokenizer.json", data)


def tokenizer_config(data: bytes) -> None:
    """tokenizer_config.json."""
    _tokenizer("tokenizer_config.json", data)


def _tokenizer(name: str, data: bytes) -> None:
    folder = sound("source")
    with replaced(folder / name, data), one_line_at_most():
        check_tokenizer_files(folder)
        made = open_source(str(folder)).tokenizer()
        dialogue = Dialogue.detect(made)
        end_token_ids(made, dialogue)
        fim_tokens(made)
        ids = encode_plain(made, TEXT)
        decode(made, ids, skip_special_tokens=True)


@cache
def _tokenizer_of_ours() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_STARCHAT)


def template(data: bytes) -> None:
    """A chat template: it may raise any Exception, but must stay within its limits of time and memory."""
    made = _tokenizer_of_ours()
    made.chat_template = data.decode("utf-8", "replace")
    # Callers catch every Exception. This looks for crashes and endless loops.
    with contextlib.suppress(Exception):
        apply_template(made, MESSAGES, add_generation_prompt=True, sanitize_control_tokens=True)


def manifest(data: bytes) -> None:
    """lowmem-manifest.json: every name in it must be the plain name of a file in the folder."""
    with replaced(workspace() / "lowmem-manifest.json", data), one_line_at_most():
        for name in read_manifest(workspace()) or ():
            assert (workspace() / name).parent == workspace() and "/" not in name


def card(data: bytes) -> None:
    """The licence in a model card."""
    with replaced(workspace() / "README.md", data) as path:
        found = license_of_card(path)
        assert found is None or (found.isprintable() and len(found) <= 100)


def broken(data: bytes) -> None:
    """Not a real target: it fails on purpose, to test the fuzzer itself."""
    if data[:1] == b"x":
        raise RuntimeError("broken on purpose")


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        safetensors,
        bin_file,
        bin_pickle,
        gguf,
        gguf_model,
        config,
        quantization,
        index,
        tokenizer,
        tokenizer_config,
        template,
        manifest,
        card,
    )
}

# ---- seeds


def seeds_of(target: str) -> list[bytes]:
    """Valid inputs of a target, written by the usual libraries."""
    from tests.fuzz import seeds

    if target == "broken":
        return [b"a", b"x"]
    if target in ("safetensors", "bin_file", "bin_pickle", "gguf"):
        return {
            "safetensors": seeds.safetensors_files,
            "bin_file": seeds.bin_files,
            "bin_pickle": seeds.pickles,
            "gguf": seeds.gguf_files,
        }[target]()
    if target == "gguf_model":
        return [(seeds.seed_folder("gguf") / "model.gguf").read_bytes()]
    if target == "template":
        return seeds.templates()
    if target == "manifest":
        return [
            json.dumps({"version": 1, "files": {"config.json": {"sha256": "0" * 64, "bytes": 12}}}).encode()
        ]
    if target == "card":
        return [
            b"---\nlicense: other\nlicense_name: llama3\ntags: [a]\n---\n# x\n",
            b"---\nlicense:\n- mit\n---\n",
        ]
    if target == "quantization":
        kept = json.loads((seeds.seed_folder("packed") / "config.json").read_text())["quantization_config"]
        return [json.dumps(kept).encode(), b'{"bits": 4, "group_size": 128, "desc_act": true}']
    names = {"config": "config.json", "index": INDEX, "tokenizer_config": "tokenizer_config.json"}
    if target in names:
        return [(seeds.seed_folder("source") / names[target]).read_bytes()]
    return [seeds.small_tokenizer(), seeds.small_tokenizer(splits="(a|a)*$")]


def clean_up() -> None:
    """Remove the folder of this process."""
    shutil.rmtree(workspace(), ignore_errors=True)
    for cached in (workspace, sound):
        cached.cache_clear()
