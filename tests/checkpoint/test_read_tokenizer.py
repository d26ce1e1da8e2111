"""Tokenizers from other files than tokenizer.json, and what is said where they cannot be read."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import lowmem.checkpoint.source.read_tokenizer as module
from lowmem.checkpoint.source.read_tokenizer import read_folder_tokenizer
from lowmem.errors import SourceError
from tests.helpers import TINY_STARCHAT

TEXTS = ("def main(argv):\n    return  'é€ x'", "Hello, world!", "a b")
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
needs_sentencepiece = pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is None, reason="sentencepiece is not installed"
)
needs_tiktoken = pytest.mark.skipif(
    importlib.util.find_spec("tiktoken") is None, reason="tiktoken is not installed"
)


def folder_of(tmp_path: Path, settings: dict[str, Any], kind: str) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


def train(file: Path, **options: Any) -> None:
    """A small sentencepiece model, trained on tiny-starchat's documents."""
    from sentencepiece import SentencePieceTrainer

    text = file.with_name("text.txt")
    source = Path(module.__file__).read_text(encoding="utf-8")
    text.write_text(source)
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(file.with_suffix("")), vocab_size=350, minloglevel=2, **options
    )
    text.unlink()
    file.with_suffix(".vocab").unlink()


BPE: dict[str, Any] = {
    **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "remove_extra_whitespaces": False,
}
SENTENCEPIECE: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("tokenizer.model", "llama", LLAMA, BPE),
    "mistral": ("tokenizer.model", "mistral", LLAMA, BPE),
    "mistral without a class": ("tokenizer.model", "mistral", {"bos_token": "<s>", "eos_token": "</s>"}, BPE),
    "gemma": (
        "tokenizer.model",
        "gemma",
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>"},
        {**BPE, "add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
    ),
    "t5": (
        "spiece.model",
        "t5",
        {"tokenizer_class": "T5Tokenizer", "extra_ids": 0},
        {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    ),
}


@needs_sentencepiece
@pytest.mark.parametrize("family", SENTENCEPIECE)
def test_sentencepiece_models_give_their_own_ids(tmp_path: Path, family: str) -> None:
    from sentencepiece import SentencePieceProcessor

    name, kind, settings, options = SENTENCEPIECE[family]
    folder = folder_of(tmp_path, settings, kind)
    train(folder / name, **options)
    tokenizer = read_folder_tokenizer(folder)
    reference = SentencePieceProcessor(model_file=str(folder / name))
    tokenizer.save_pretrained(tmp_path / "converted")  # as a conversion does
    again = AutoTokenizer.from_pretrained(tmp_path / "converted")
    for text in TEXTS:
        expected = reference.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
        assert again(text, add_special_tokens=False)["input_ids"] == expected


def ranks() -> list[tuple[bytes, int]]:
    """Tokens of tiny-starchat without its special ones, in tiktoken's terms."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    data = json.loads((TINY_STARCHAT / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in data["added_tokens"]}
    number_of = {letter: number for number, letter in bytes_to_unicode().items()}
    tokens = [t for t, _ in sorted(data["model"]["vocab"].items(), key=lambda item: item[1])]
    plain = [bytes(number_of[letter] for letter in token) for token in tokens if token not in special]
    return [(token, at) for at, token in enumerate(plain)]


def write_tiktoken(file: Path) -> None:
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % at for token, at in ranks()))


def write_tekken(file: Path) -> None:
    vocabulary = [
        {"rank": at, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, at in ranks()
    ]
    special = [
        {"rank": at, "token_str": token, "is_control": True} for at, token in enumerate(("<unk>", "<s>"))
    ]
    config = {
        **{"pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", "version": "v3"},
        **{"num_vocab_tokens": len(vocabulary), "default_vocab_size": len(vocabulary) + 2},
        "default_num_special_tokens": 2,
    }
    file.write_text(json.dumps({"config": config, "vocab": vocabulary, "special_tokens": special}))


def write_vocabulary(file: Path) -> None:
    data = json.loads((TINY_STARCHAT / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    file.write_text(json.dumps(data["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["merges"]]
    file.with_name("merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


GPT2 = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}


@pytest.mark.parametrize(
    ("name", "write", "settings"),
    [
        pytest.param("tokenizer.model", write_tiktoken, {"eos_token": "<|e|>"}, marks=needs_tiktoken),
        pytest.param("tiktoken.model", write_tiktoken, {"eos_token": "<|e|>"}, marks=needs_tiktoken),
        ("tekken.json", write_tekken, {}),
        ("vocab.json", write_vocabulary, GPT2),
    ],
)
def test_other_files_are_read(
    tmp_path: Path, name: str, write: Callable[[Path], None], settings: dict[str, Any]
) -> None:
    folder = folder_of(tmp_path, settings, "llama")
    write(folder / name)
    tokenizer = read_folder_tokenizer(folder)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text.encode())


@pytest.mark.parametrize(
    ("write", "missing", "advice"),
    [
        (lambda file: file.write_bytes(b"\n\x0b\n\x05<unk>"), "sentencepiece", "pip install sentencepiece"),
        (write_tiktoken, "tiktoken", "pip install tiktoken"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, missing: str, advice: str
) -> None:
    folder = folder_of(tmp_path, LLAMA, "llama")
    write(folder / "tokenizer.model")
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(SourceError) as caught:
        read_folder_tokenizer(folder)
    assert f"the package {missing} is not installed" in caught.value.message
    assert caught.value.hint == f"Install it: {advice}"


def test_what_a_refusal_advises_is_enough(tmp_path: Path) -> None:
    """vocab.json does not tell how its model splits text, so no class is guessed."""
    folder = folder_of(tmp_path, {}, "gpt_bigcode")
    write_vocabulary(folder / "vocab.json")
    with pytest.raises(SourceError, match="cannot tell its kind") as caught:
        read_folder_tokenizer(folder)
    assert caught.value.hint == "Put the model's tokenizer.json beside its weights"
    (folder / "tokenizer.json").write_bytes((TINY_STARCHAT / "tokenizer.json").read_bytes())
    ids = read_folder_tokenizer(folder)("a b")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(TINY_STARCHAT)("a b")["input_ids"]


@needs_sentencepiece
def test_a_versioned_name_is_to_be_copied(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, LLAMA, "mistral")
    train(folder / "tokenizer.model", **BPE)
    (folder / "tokenizer.model").rename(folder / "tokenizer.model.v3")
    with pytest.raises(SourceError, match=r"has tokenizer\.model\.v3") as caught:
        read_folder_tokenizer(folder)
    assert caught.value.hint == "Copy it to tokenizer.model in the same folder"
    (folder / "tokenizer.model").write_bytes((folder / "tokenizer.model.v3").read_bytes())
    assert read_folder_tokenizer(folder)("a")["input_ids"]


def test_files_of_a_checkpoints_own_code_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {}, "qwen2")
    write_tiktoken(folder / "qwen.tiktoken")
    with pytest.raises(SourceError, match=r"qwen\.tiktoken, which only the checkpoint's own code reads"):
        read_folder_tokenizer(folder)
