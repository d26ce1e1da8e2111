"""Small models and source checkpoints that many tests share.

Each checkpoint is a real transformers model in the layout of a hub repository, so that transformers itself
can read it and serve as the oracle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.benchmarks.experiments.starchat.dimensions import VOCAB as STARCHAT_VOCAB
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions

from lowmem.checkpoint.source.open import open_source
from lowmem.errors import SourceError

REPO = Path(__file__).resolve().parent.parent
TINY_STARCHAT = REPO / "lowmem" / "data" / "tiny-starchat"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
DIALOGUE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
KINDS = ("gpt_bigcode_mqa", "gpt_bigcode_mha", "llama", "starcoder2", "qwen2")


def tiny_model(
    kind: str,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    vocab: int = 4096,
    positions: int = 256,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tied: bool | None = None,
) -> Any:
    """A random transformers model of `kind` (see `tiny_config`), in eval mode, on the CPU.

    If `hidden` is a multiple of 32, so is the input of every linear. llama and qwen2 use grouped-query
    attention (heads // 2 KV heads) and an untied head unless `tied` is given; the others tie the head.
    Token 0 is bos and eos.
    """
    config = tiny_config(
        kind, layers=layers, hidden=hidden, heads=heads, vocab=vocab, positions=positions, tied=tied
    )
    return random_model(config, dtype=dtype, seed=seed)


def random_model(config: Any, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random transformers model, in eval mode, on the CPU.

    All parameters are random, biases and norms included, and the logits spread over a few nats, so a
    swapped, transposed or missing tensor changes the output.
    """
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            embedding = any(part in name for part in ("wte", "wpe", "embed_tokens"))
            values = noise * (0.2 if embedding else 0.7 * parameter.shape[1] ** -0.5)
        else:
            values = noise * 0.1 + (0.0 if name.endswith("bias") else 1.0)
        parameter.data.copy_(values)
    return model.to(dtype).eval()


def tiny_config(
    kind: str,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    vocab: int = 4096,
    positions: int = 256,
    tied: bool | None = None,
) -> Any:
    """The transformers config of `tiny_model`: one of KINDS, or mistral, qwen3 or granite."""
    import transformers

    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    if kind in ("gpt_bigcode_mqa", "gpt_bigcode_mha"):
        return transformers.GPTBigCodeConfig(
            n_layer=layers,
            n_embd=hidden,
            n_head=heads,
            n_inner=4 * hidden,
            n_positions=positions,
            vocab_size=vocab,
            multi_query=kind.endswith("mqa"),
            activation_function="gelu",
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            tie_word_embeddings=True if tied is None else tied,
            **ids,
        )
    shared: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": positions,
        "vocab_size": vocab,
        **ids,
    }
    if kind == "llama":
        return transformers.LlamaConfig(tie_word_embeddings=bool(tied), **shared)
    if kind == "qwen2":
        return transformers.Qwen2Config(tie_word_embeddings=bool(tied), **shared)
    if kind == "starcoder2":
        tied = True if tied is None else tied
        return transformers.Starcoder2Config(tie_word_embeddings=tied, sliding_window=None, **shared)
    if kind == "mistral":
        return transformers.MistralConfig(tie_word_embeddings=bool(tied), **shared)
    if kind == "qwen3":
        return transformers.Qwen3Config(
            tie_word_embeddings=bool(tied), head_dim=2 * hidden // heads, **shared
        )
    if kind == "granite":
        scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 1.5}
        return transformers.GraniteConfig(
            tie_word_embeddings=bool(tied), attention_multiplier=0.4, **scales, **shared
        )
    raise ValueError(f"unknown kind {kind!r}")


def save_source(
    model: Any,
    folder: Path,
    *,
    format: str = "safetensors",
    shards: int = 1,
    dtype: torch.dtype | None = None,
    duplicate_head: bool = False,
    tokenizer: bool = True,
) -> Path:
    """Write `model` in the layout of a hub repository; returns `folder`.

    format: "safetensors" or "bin" (torch.save, as StarChat Alpha is published). dtype: of the stored
    tensors; the default is the model's own. duplicate_head: store a tied head a second time.
    The tokenizer is tiny-starchat's, so the model needs a vocabulary of at least 4096 tokens.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
        if duplicate_head:
            tensors["lm_head.weight"] = tensors[embedding_name(model)].clone()
    # The config's save_pretrained writes the architectures and the dtype, as upstream files do.
    stored = next(iter(tensors.values())).dtype
    model.config.architectures = [type(model).__name__]
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["dtype"] = str(stored).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    write_weights(tensors, folder, format=format, shards=shards)
    if tokenizer:
        for name in TOKENIZER_FILES:
            shutil.copyfile(TINY_STARCHAT / name, folder / name)
    return folder


def embedding_name(model: Any) -> str:
    """The state-dict name of the input embedding."""
    table = model.get_input_embeddings().weight
    return str(next(name for name, parameter in model.named_parameters() if parameter is table))


def write_weights(
    tensors: Mapping[str, torch.Tensor], folder: Path, *, format: str = "safetensors", shards: int = 1
) -> None:
    """Write shards of about equal size in the given order, with an index if there are several."""
    from safetensors.torch import save_file

    stem, suffix = ("model", "safetensors") if format == "safetensors" else ("pytorch_model", "bin")
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    groups: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    done, shard = 0, -1
    for position, (name, tensor) in enumerate(tensors.items()):
        # Split by bytes, but leave no shard empty: one table may be larger than all other tensors.
        left = len(tensors) - position
        shard = max(min(done * shards // max(total, 1), shard + 1, shards - 1), shards - left)
        groups[shard][name] = tensor.contiguous()
        done += tensor.numel() * tensor.element_size()
    filled = [group for group in groups if group]
    weight_map = {}
    for number, group in enumerate(filled, 1):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number:05}-of-{len(filled):05}.{suffix}"
        if format == "safetensors":
            save_file(group, folder / file, metadata={"format": "pt"})
        else:
            torch.save(group, folder / file)
        weight_map.update(dict.fromkeys(group, file))
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / f"{stem}.{suffix}.index.json", index)


def starchat_replica(
    folder: Path, *, layers: int = 2, n_embd: int = 64, heads: int = 4, n_positions: int = 8192, seed: int = 0
) -> Path:
    """A random checkpoint in StarChat Alpha's exact layout at small dimensions; returns `folder`.

    Four float16 pickle shards with an index, a stored copy of the tied head, 49156 tokens with the
    dialogue tokens last, a config with the old keys (`torch_dtype`, inference fields), a
    generation_config with only token 0, and a model card with the licence.
    """
    model = tiny_model(
        "gpt_bigcode_mqa",
        layers=layers,
        hidden=n_embd,
        heads=heads,
        vocab=STARCHAT_VOCAB,
        positions=n_positions,
        seed=seed,
    )
    folder = Path(folder)
    save_source(
        model, folder, format="bin", shards=4, dtype=torch.float16, duplicate_head=True, tokenizer=False
    )
    config = Dimensions(layers, n_embd, heads, n_positions).config()
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "transformers_version": "4.28.1",
        },
    )
    write_starchat_tokenizer(folder)
    (folder / "README.md").write_text(
        "---\nlicense: bigcode-openrail-m\ntags:\n- generated_from_trainer\nmodel-index:\n- name: starchat\n"
        "  results: []\n---\n\n# Model Card for StarChat Alpha (a replica at small dimensions)\n",
        encoding="utf-8",
    )
    return folder


def write_starchat_tokenizer(folder: Path) -> None:
    """tiny-starchat's tokenizer with filler tokens up to 49152 and the dialogue tokens after them.

    Text is encoded to the same ids as tiny-starchat's; only the dialogue tokens move.
    """
    data = json.loads((TINY_STARCHAT / "tokenizer.json").read_text(encoding="utf-8"))
    first = STARCHAT_VOCAB - len(DIALOGUE_TOKENS)
    vocab: dict[str, int] = data["model"]["vocab"]
    ids = {name: first + i for i, name in enumerate(DIALOGUE_TOKENS)}
    for number in range(len(vocab), first):
        vocab[f"<filler_{number}>"] = number  # no merge produces it, so no text encodes to it
    for token in data["added_tokens"]:
        token["id"] = ids.get(token["content"], token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((TINY_STARCHAT / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_max_length"] = 8192
    _write_json(folder / "tokenizer_config.json", settings)


def fails(match: str, *args: Any, **options: Any) -> SourceError:
    """Return the SourceError that open_source must raise: a single line that matches `match`."""
    with pytest.raises(SourceError, match=match) as caught:
        open_source(*args, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
