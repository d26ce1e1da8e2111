"""Limits against hostile files: links, sizes, memory, tokenizers, templates, messages."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from lowmem.checkpoint.files.links import check_file, check_folder, leads_outside
from lowmem.checkpoint.files.reading import MAX_VALUES, parse_json, read_json
from lowmem.checkpoint.headers import gguf as gguf_file
from lowmem.checkpoint.headers.config import MAX_COUNT, read_config
from lowmem.checkpoint.headers.folder import read_config_json, tensor_headers
from lowmem.checkpoint.headers.safetensors import read_header
from lowmem.checkpoint.headers.tokenizer import MAX_TOKEN_ID, check_tokenizer_files
from lowmem.checkpoint.manifest import parse_quantization
from lowmem.checkpoint.source.card import license_of_card
from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.source.safetensors import read_tensor
from lowmem.errors import MAX_MESSAGE, LowmemError, OutOfMemoryError, SourceError
from lowmem.models.architecture import build_model
from lowmem.models.dialogue import CHAT_TEMPLATE
from lowmem.models.template import apply_template
from tests.fuzz.seeds import copy_seed
from tests.helpers import TINY_STARCHAT, tiny_config

# ---- links


def link(path: Path, target: Path | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def test_links_are_followed_only_within_the_folder_or_the_hub_cache(tmp_path: Path) -> None:
    folder, digest = tmp_path / "model", "a" * 64
    blobs = tmp_path / "hub" / "models--owner--name" / "blobs"
    snapshot = blobs.parent / "snapshots" / "abc"
    for place in (
        blobs / digest,
        folder / "real.json",
        tmp_path / "secret.json",
        tmp_path / "evil" / "blobs" / "x",
    ):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("{}")
    honest = [
        folder / "real.json",
        link(folder / "inside.json", "real.json"),
        link(snapshot / "config.json", f"../../blobs/{digest}"),
        link(folder / "of_an_older_hub.json", blobs / digest),  # the layout of local_dir in older versions
        folder / "missing.json",
    ]
    hostile = [
        link(folder / "outside.json", tmp_path / "secret.json"),
        link(folder / "relative.json", "../secret.json"),
        link(folder / "twice.json", "outside.json"),
        link(folder / "device.json", "/dev/zero"),
        link(folder / "dangling.json", "/nowhere/at/all"),
        link(folder / "blobs.json", tmp_path / "evil" / "blobs" / "x"),
        link(snapshot / "tokenizer.json", tmp_path / "secret.json"),
    ]
    assert [path.name for path in honest if leads_outside(path)] == []
    assert [path.name for path in hostile if not leads_outside(path)] == []
    for path in hostile:
        with pytest.raises(SourceError, match="leads out of its folder"):
            read_json(path)
    with pytest.raises(SourceError, match=r"blobs\.json"):
        check_folder(folder)
    check_folder(snapshot.parent)
    # The folder or file that the user names may itself be a link.
    alias = link(tmp_path / "alias", snapshot)
    assert read_json(alias / "config.json") == {}


def test_pipes_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SourceError, match="not a plain file"):
        check_file(tmp_path / "config.json")
    with pytest.raises(SourceError, match="not a plain file"):
        read_json(tmp_path / "config.json")


def test_a_folder_and_a_file_that_the_user_names_may_be_links(tmp_path: Path) -> None:
    folder = copy_seed("source", tmp_path / "real")
    link(tmp_path / "alias", folder)
    assert tensor_headers(tmp_path / "alias") == tensor_headers(folder)
    assert open_source(str(tmp_path / "alias")).config().n_layer == 2


# ---- JSON


def test_json_that_expands_in_memory_is_refused() -> None:
    with pytest.raises(SourceError, match="more than"):
        parse_json(b"[" + b"[]," * MAX_VALUES + b"[]]", "x")
    assert len(parse_json(b"[" + b"1," * 1000 + b"1]", "x")) == 1001


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": MAX_COUNT + 1},
        {"n_layer": 0},
        {"n_layer": -3},
        {"num_hidden_layers": 10**9},
        {"n_embd": 0},
        {"vocab_size": 2**41},
        {"vocab_size": float("inf")},
        {"num_local_experts": 10**6},
        {"num_labels": 10**12},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"text_config": {"hidden_size": 0}},
        {"vision_config": {"depth": {"num_hidden_layers": 10**9}}},
        {"encoder_layers": 10**7},
        {"pretraining_tp": 10**9},
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A config with a billion layers once used up all memory."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_bigcode", **change}))
    for read in (lambda: read_config(tmp_path / "config.json"), lambda: read_config_json(tmp_path)):
        with pytest.raises(SourceError, match="which no model has"):
            read()


def test_sizes_of_real_models_are_accepted(tmp_path: Path) -> None:
    kept = {
        "n_layer": 126,
        "n_inner": None,
        "hidden_size": 16384,
        "max_position_embeddings": 10_485_760,
        "pretraining_tp": 1,
        "num_experts": 16384,
        "num_key_value_heads": [1, 2],
        "text_config": {"num_experts": 512},
        "vision_config": {"hidden_size": 0},
        "num_nextn_predict_layers": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert read_config(tmp_path / "config.json") == kept


def test_a_config_that_cannot_be_built_is_refused() -> None:
    """KeyError, ZeroDivisionError and RuntimeError from the model's own code become a one-line error."""
    for change in ({"activation_function": "evil"}, {"n_head": 0}, {"n_embd": -64}, {"get_text_config": 7}):
        config = tiny_config("gpt_bigcode_mqa")
        for key, value in change.items():
            setattr(config, key, value)
        for buffers in (False, True):
            with pytest.raises(LowmemError, match=r"config\.json") as caught:
                import torch

                build_model(config, torch.float32, buffers=buffers)
            assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change", [{"bits": 4.5}, {"bits": 10**400}, {"group_size": 10**30}, {"group_size": 2**31}]
)
def test_invalid_numbers_in_quantization_config_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SourceError) as caught:
        parse_quantization({"quant_method": "gptq", "bits": 4, "group_size": 128, **change})
    assert len(str(caught.value)) < 400


def test_a_whole_number_written_as_a_float_is_an_integer() -> None:
    """4.0 is in (8, 4, 3, 2), so it was once accepted as a width until a shift by it failed."""
    found = parse_quantization({"quant_method": "gptq", "bits": 4.0, "group_size": 128})
    assert found is not None and found.default.bits == 4 and type(found.default.bits) is int


def test_licence_in_a_card_with_a_megabyte_of_results(tmp_path: Path) -> None:
    """Parsing all of the front matter once took half a minute."""
    results = "model-index:\n" + "- name: x\n  results:\n" + "  - {a: [1, 2, {b: c}]}\n" * 40_000
    for text, licence in (
        (f"---\n{results}license: mit\ntags: [a]\n---\n", "mit"),
        (f"---\nlicense:\n  - mit\n{results}---\n", "mit"),
        ("---\nlicense: [" + "[" * 100_000 + "\n---\n", None),
        ("---\na: &a [x]\nlicense: *a\n---\n", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert license_of_card(tmp_path / "README.md") == licence


# ---- weights


def test_a_tensor_larger_than_memory(tmp_path: Path) -> None:
    """`lowmem verify` once printed a traceback of torch's RuntimeError. The loader sees it as out of
    memory."""
    path, nbytes = tmp_path / "x.safetensors", 1 << 50
    header = json.dumps({"x": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    try:
        os.truncate(path, 8 + len(header) + nbytes)
    except OSError:  # the file system does not allow files of this size
        nbytes = 1 << 43
        header = json.dumps(
            {"x": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}
        ).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(path, 8 + len(header) + nbytes)
    stored = read_header(path).tensors["x"]
    with pytest.raises(OutOfMemoryError, match=f"needs {nbytes} bytes") as caught:
        read_tensor(path, "x", stored)
    assert isinstance(caught.value, LowmemError) and isinstance(caught.value, MemoryError)


def gguf_bytes(tensors: int, keys: int, body: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (
            gguf_bytes(0, gguf_file.MAX_KEYS + 1, bytes(13 * gguf_file.MAX_KEYS + 100)),
            "keys, which no model has",
        ),
        (
            gguf_bytes(gguf_file.MAX_TENSORS + 1, 0, bytes(24 * gguf_file.MAX_TENSORS + 100)),
            "which no model has",
        ),
        (gguf_bytes(0, 1, struct.pack("<Q", 5000) + b"k" * 5000), "a key of 5000 characters"),
        (
            gguf_bytes(
                0,
                3,
                b"".join(
                    struct.pack("<Q", 1) + k + struct.pack("<IIQ", 9, 0, 900_000) + bytes(900_000)
                    for k in (b"a", b"b", b"c")
                ),
            ),
            "more than 2500000 elements in all",
        ),
    ],
    ids=["keys", "tensors", "a long key", "elements"],
)
def test_gguf_counts_beyond_any_model_are_refused(tmp_path: Path, blob: bytes, message: str) -> None:
    """Each entry took hundreds of bytes of memory, or the next readers took minutes."""
    (tmp_path / "x.gguf").write_bytes(blob)
    with pytest.raises(SourceError, match=message) as caught:
        gguf_file.read_gguf_header(tmp_path / "x.gguf")
    assert len(str(caught.value)) < 400


# ---- tokenizers


@pytest.mark.parametrize(
    "settings",
    [
        {"fast_tokenizer_files": ["../secret.1.0.json"]},
        {"vocab": "../secret.1.0.json"},
        {"gguf_file": "/etc/hostname"},
        {"init_inputs": ["/etc/hostname"]},
        {"vocab_file": "../secret.1.0.json"},
        {"added_tokens_decoder": {str(MAX_TOKEN_ID + 1): {"content": "x"}}},
        {"added_tokens_decoder": {"-1": {"content": "x"}}},
    ],
    ids=str,
)
def test_tokenizer_settings_that_name_other_files_are_refused(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    (tmp_path / "secret.1.0.json").write_text("{}")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match=r"tokenizer_config\.json"):
        check_tokenizer_files(folder)


def test_tokenizer_settings_of_published_models_are_accepted(tmp_path: Path) -> None:
    """They contain paths of the author's machine, which do not exist here or are not opened."""
    settings = {
        "tokenizer_file": "/etc/hostname",
        "vocab_file": "/home/somebody/vocab.json",
        "merges_file": "merges.txt",
        "name_or_path": "/etc",
        "special_tokens_map_file": "/etc/hostname",
        "init_inputs": [],
        "added_tokens_decoder": {"0": {"content": "x"}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    check_tokenizer_files(tmp_path)


# ---- chat templates

MESSAGES = [{"role": "user", "content": "Hello"}]


def rendered(template: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_STARCHAT)
    tokenizer.chat_template = template
    return apply_template(tokenizer, MESSAGES, add_generation_prompt=True, sanitize_control_tokens=True)


def test_templates_of_published_models_render() -> None:
    assert len(rendered(CHAT_TEMPLATE)) > 5
    inside = "{%- generation -%}{{ m.content }}{%- endgeneration -%}"
    marked = "{% for m in messages %}" + inside + "{{ '-' * 3 }}{% endfor %}"
    assert rendered(marked) == rendered("{% for m in messages %}{{ m.content }}---{% endfor %}")


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            ValueError,
            "steps",
        ),
        (
            "{% macro f(n) %}{{ f(n-1) }}{{ f(n-1) }}{% endmacro %}{{ f(90) }}",
            (ValueError, RecursionError),
            "",
        ),
        ("{{ 10 ** 10 ** 10 }}", ValueError, r"uses the \*\* operator"),
        ("{% set x = 99 %}{{ x * x }}", ValueError, "multiplies"),
        ("{% set loop = namespace(index=99) %}{{ loop.index * loop.index }}", ValueError, "multiplies"),
        ("{% for m in messages %}{{ loop.first * loop.last * m }}{% endfor %}", ValueError, "multiplies"),
        ("{% for i in range(60000) %}{{ 'a' * 100 }}{% endfor %}", ValueError, "6000000 characters"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", Exception, "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", Exception, "unsafe"),
        ("{% include '/etc/passwd' %}", Exception, "loader"),
        ("{{" + "(" * 9000 + "1" + ")" * 9000 + "}}", RecursionError, ""),
        ("x" * 2**21, ValueError, "characters long"),
    ],
)
def test_templates_that_loop_or_read_files_are_stopped(template: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message or None):
        rendered(template)
    assert sys.gettrace() is None or "test_limits" not in repr(sys.gettrace())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10000000000 }}".replace("10000000000", "1000") + "{{ 'a'.center(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    ],
)
def test_templates_cannot_use_all_memory(template: str) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises((MemoryError, ValueError, OverflowError)):
        rendered(template)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


# ---- messages


def test_a_message_is_one_line_without_control_characters() -> None:
    error = SourceError("a\x1b]0;x\x07\nb\u202e\ud800 ü 中", "c\rd")
    assert str(error) == r"a\x1b]0;x\x07\nb\u202e\ud800 ü 中. c\rd"
    assert len(str(SourceError("x" * 10**6))) == MAX_MESSAGE
