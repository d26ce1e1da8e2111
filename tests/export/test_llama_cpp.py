"""Exported files in llama.cpp itself; skipped where llama-cpp-python is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowmem.checkpoint.source.open import open_source
from lowmem.export.export import export
from tests.export.test_vocabulary import SPLITS, TEXTS, sentencepiece_folder
from tests.helpers import KINDS, TINY_STARCHAT, save_source, tiny_config, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python==0.3.36")

ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ROPE},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE},
}


def opened(file: Path, context: int = 256) -> Any:
    """llama.cpp with a KV cache in float32 and logits of every token."""
    return llama_cpp.Llama(
        str(file),
        n_ctx=context,
        n_batch=context,
        logits_all=True,
        type_k=0,
        type_v=0,
        n_threads=1,
        verbose=False,
    )


def logits_in_llama(file: Path, ids: list[int]) -> torch.Tensor:
    """float32 [tokens, vocabulary]."""
    model = opened(file)
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


def divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence of logits [tokens, vocabulary]."""
    p, q = reference.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def token_ids(count: int = 200) -> list[int]:
    return torch.randint(5, 4000, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def built(kind: str, rope: str | None) -> Any:
    """A tiny model in float32; mistral and qwen3 besides the kinds of all tests."""
    import transformers

    if kind in KINDS and rope is None:
        return tiny_model(kind)
    config = tiny_config("llama" if kind not in KINDS else kind).to_dict()
    for key in ("model_type", "architectures", "rope_parameters"):
        config.pop(key, None)
    if rope:
        config["rope_parameters"] = ROPES[rope]
    if kind == "qwen3":
        config["head_dim"] = 32
    names = {
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen3": "Qwen3",
        "qwen2": "Qwen2",
        "starcoder2": "Starcoder2",
    }
    own = getattr(transformers, f"{names[kind]}Config")(**config)
    own.sliding_window = None
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(own, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 2:
                tensor.normal_(std=0.2 if "embed" in name else 0.7 * tensor.shape[1] ** -0.5)
            else:
                tensor.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    return model


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        *((kind, None) for kind in (*KINDS, "mistral", "qwen3")),
        *(("llama", rope) for rope in ROPES),
        ("qwen2", "yarn"),
        ("qwen3", "linear"),
        ("starcoder2", "linear"),
    ],
)
def test_llama_cpp_computes_what_transformers_does(tmp_path, kind, rope):
    """In float32: names, dimensions, positions, biases, the order of q and k."""
    model = built(kind, rope)
    file = export(str(save_source(model, tmp_path / "m")), tmp_path / "m.gguf").path
    ids = token_ids()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0].float()
    assert divergence(expected, logits_in_llama(file, ids)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (5, True), (8, True)])
def test_quantized_linears_in_llama_cpp(tmp_path, kind, bits, sym):
    """The rest of the difference is llama.cpp's rounding of activations to 8 bits."""
    model = write_rtn_checkpoint(tiny_model(kind), tmp_path / "m", bits=bits, sym=sym)
    file = export(str(tmp_path / "m"), tmp_path / "m.gguf").path
    ids = token_ids()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0].float()
    assert divergence(expected, logits_in_llama(file, ids)) < 2e-3


def in_llama(file: Path, text: str) -> list[int]:
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    found: list[int] = model.tokenize(text.encode(), add_bos=True, special=True)
    return found


def same_tokens(folder: Path, file: Path) -> None:
    """llama.cpp splits every text as the folder's tokenizer does."""
    tokenizer = open_source(str(folder)).tokenizer()
    export(str(folder), file)
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("name", ["starcoder", *SPLITS])
def test_byte_level_tokens(tmp_path, name):
    folder = save_source(tiny_model("llama", layers=1), tmp_path / "m")
    if name in SPLITS:
        split, ignore_merges = SPLITS[name]
        data = json.loads((folder / "tokenizer.json").read_text())
        data["model"]["ignore_merges"] = ignore_merges
        own = Tokenizer.from_str(json.dumps(data))
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split]
        own.pre_tokenizer = pre_tokenizers.Sequence(
            [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        own.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<|endoftext|>").save_pretrained(folder)
    same_tokens(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens(tmp_path, prefix):
    same_tokens(sentencepiece_folder(tmp_path / "m", prefix=prefix), tmp_path / "m.gguf")


def test_an_answer_ends_where_starchats_dialogue_ends_a_turn(tmp_path):
    model = opened(export(str(TINY_STARCHAT), tmp_path / "m.gguf").path, 512)
    assert model.token_eos() == 0
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    assert llama_cpp.llama_vocab_is_eog(vocabulary, 4095) and not llama_cpp.llama_vocab_is_eog(
        vocabulary, 4094
    )
    answer = model.create_chat_completion(
        [{"role": "user", "content": "How do I sort a list in Python?"}], max_tokens=200, temperature=0.0
    )
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["prompt_tokens"] == 19
    text = answer["choices"][0]["message"]["content"]
    assert text.strip() and "<|" not in text
