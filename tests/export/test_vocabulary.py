"""Tokenizers in llama.cpp's keys: its names for splits, sentencepiece's scores, and what it would misread."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lowmem.checkpoint.source.open import open_source
from lowmem.errors import SourceError
from lowmem.export.export import export
from lowmem.export.metadata import StopTokens
from lowmem.export.vocabulary import read_vocabulary
from tests.export.gguf_files import fields_of
from tests.helpers import REPO, TINY_STARCHAT, save_source, tiny_model

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{end}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{end}"
)
SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: dict[str, tuple[list[str], bool]] = {
    # As in tokenizer.json of Meta-Llama-3, Qwen2, Mistral-Nemo, gpt-oss and deepseek-coder.
    "llama-bpe": ([WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"], True),
    "qwen2": ([WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"], False),
    "tekken": ([CASED.replace("{end}", "") + r"|\p{N}|" + SLASH], True),
    "gpt-4o": ([CASED.replace("{end}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}|" + SLASH], False),
    "deepseek-coder": (["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"], False),
}
TEXTS = (
    "def main(argv: list[str]) -> int:\n    return sum(int(x) for x in argv[1:])  # 12345 items\n",
    "Hello,  world! It's the 1st of 3 tests;\tDON'T PANIC.\r\n\r\n  done   ",
    "Grüße aus Köln — 東京 und 서울, ещё раз: naïve façade 😀 x²",
    "\n\n\n    if a//b != c: pass\n",
)


@pytest.mark.parametrize("name", SPLITS)
def test_splits_by_llama_cpps_names(name):
    tokenizer = open_source(str(TINY_STARCHAT)).tokenizer()
    patterns, ignore_merges = SPLITS[name]
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["ignore_merges"] = ignore_merges
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, level]}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    assert read_vocabulary(tokenizer, 4096).pre == name
    data["model"]["ignore_merges"] = not ignore_merges
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    if name == "llama-bpe":
        assert read_vocabulary(tokenizer, 4096).pre == "smaug-bpe"
    else:
        with pytest.raises(SourceError, match="splits texts by other rules"):
            read_vocabulary(tokenizer, 4096)


def test_digits_then_gpt2_has_a_name_for_each_family():
    tokenizer = open_source(str(TINY_STARCHAT)).tokenizer()
    assert read_vocabulary(tokenizer, 4096, "smollm").pre == "smollm"
    assert read_vocabulary(tokenizer, 4096, "starcoder").pre == "starcoder"


def sentencepiece_folder(folder: Path, *, prefix: bool = True) -> Path:
    """A llama with a sentencepiece tokenizer trained here, byte fallback and all."""
    save_source(tiny_model("llama", layers=1, vocab=600), folder, tokenizer=False)
    sentencepiece.SentencePieceTrainer.train(
        input=str(REPO / "README.md"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        split_digits=True,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "legacy": True,
        "add_prefix_space": prefix,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_sentencepiece_comes_back_through_transformers(tmp_path):
    """Its own reader of GGUF makes merges of the scores, and encodes as before."""
    folder = sentencepiece_folder(tmp_path / "m")
    tokenizer = open_source(str(folder)).tokenizer()
    file = export(str(folder), tmp_path / "m.gguf").path
    fields = fields_of(file)
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    types = fields["tokenizer.ggml.token_type"]
    assert types[:3] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    assert types.count(gguf.TokenType.BYTE) == 256
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"], text


def test_merges_that_no_scores_give_are_refused(tmp_path):
    folder = sentencepiece_folder(tmp_path / "m")
    tokenizer = open_source(str(folder)).tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = data["model"]["merges"]
    again = next(
        i for i in range(len(merges) - 1) if "".join(merges[i]) == "".join(merges[i + 1])
    )  # two ways to one token
    merges.append(merges.pop(again))
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    with pytest.raises(SourceError, match="do not follow from scores"):
        read_vocabulary(tokenizer, 600)


def stops(tokenizer: Any, *eos: int) -> StopTokens:
    config = SimpleNamespace(eos_token_id=list(eos))
    source: Any = SimpleNamespace(config=lambda: config, generation_config=dict)
    return StopTokens.of(source, tokenizer)


def test_stop_tokens():
    """As Llama 3's: the end of the text, of a turn by the template, and another one of the config."""
    tokenizer = open_source(str(TINY_STARCHAT)).tokenizer()
    assert stops(tokenizer) == StopTokens(0, 4095)
    tokenizer = open_source(str(TINY_STARCHAT)).tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|eom_id|>"]})
    eot, eom = (tokenizer.get_vocab()[t] for t in ("<|eot_id|>", "<|eom_id|>"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    tokenizer.get_vocab = lambda: {"<|eot_id|>": eot, "<|eom_id|>": eom}  # StarChat's tokens are not there
    assert stops(tokenizer, 0, eom, eot) == StopTokens(0, eot, eom)
