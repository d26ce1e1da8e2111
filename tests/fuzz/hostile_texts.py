"""Hostile folders: links, indexes, configs, bundled code, tokenizers, quantization_config."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.hostile import (
    ALL,
    DEEP,
    INDEX,
    MANY,
    add,
    case,
    config,
    edit_json,
    first_shard,
    index_entry,
    move_outside,
    outside_of,
    quantization,
    text,
    tokenizer_config,
)

# ---- links

for _name in ("config.json", INDEX, "tokenizer.json", "tokenizer_config.json"):
    add(f"{_name} is a link that leads outside", "source", lambda f, n=_name: move_outside(f, n))
    if _name == "config.json" or _name == INDEX:
        add(f"packed: {_name} leads outside", "packed", lambda f, n=_name: move_outside(f, n))
for _kind in ("source", "packed", "bin", "gguf"):
    add(f"{_kind}: weights are a link to a pipe", _kind, lambda f: link_to_pipe(f, weights_of(f)))


def weights_of(folder: Path) -> str:
    """The name of a weight file."""
    gguf = folder / "model.gguf"
    return gguf.name if gguf.exists() else first_shard(folder).name


def link_to_pipe(folder: Path, name: str) -> None:
    """Replace a file by a link to a pipe in the folder outside."""
    (folder / name).unlink()
    os.mkfifo(outside_of(folder) / name)
    (folder / name).symlink_to(outside_of(folder) / name)


@case("a shard is a link to a device", "source")
def _(folder: Path) -> None:
    first_shard(folder).unlink()
    (folder / "model-00001-of-00002.safetensors").symlink_to("/dev/zero")


@case("a shard is a link to itself", "packed")
def _(folder: Path) -> None:
    path = first_shard(folder)
    path.unlink()
    path.symlink_to(path.name)


@case("config.json is a pipe", "source")
def _(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@case("tokenizer.json is a pipe", "source")
def _(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


@case("generation_config.json is a link that leads outside", "packed", ())
def _(folder: Path) -> None:
    move_outside(folder, "generation_config.json")


@case("config.json is a folder", "source")
def _(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


# ---- the index

for _target in ("../../outside/x.safetensors", "/etc/passwd", "..", "a/b", "a\\b", "a\x00b", 7, None, [], {}):
    add(
        f"the index names {_target!r}",
        "source",
        lambda f, t=_target: index_entry(f, **{"transformer.wte.weight": t}),
    )
add(
    "packed: the index names a path",
    "packed",
    lambda f: index_entry(f, **{"model.norm.weight": "../../outside/x.safetensors"}),
)
add(
    "the index names tensors with control characters",
    "source",
    lambda f: index_entry(f, **{"a\x1b]0;x\x07\nb": "gone.safetensors"}),
)
add(
    "packed: the index names a lone surrogate",
    "packed",
    lambda f: index_entry(f, **{"a\ud800\x1b[2J\nb": "model-00001-of-00002.safetensors"}),
)
text("the index is deeply nested", "source", INDEX, DEEP)
text("packed: the index is deeply nested", "packed", INDEX, DEEP)
text(
    "the index is many nested lists",
    "source",
    INDEX,
    '{"weight_map": [' + "[]," * 3_000_000 + "[]]}",
)

# ---- config.json

text("config.json is empty", "source", "config.json", "")
text("config.json is deep", "source", "config.json", DEEP)
text("config.json is huge", "source", "config.json", '{"a": [' + MANY + "{}]}")
text("config.json is not UTF-8", "packed", "config.json", b"\xff\xfe{}")
text("config.json has a number of 5000 digits", "source", "config.json", '{"n_layer": ' + "9" * 5000 + "}")
config("the model type is a list", "source", ("plan",), model_type=["gpt_bigcode"])
config("an unknown model type", "source", ("plan",), model_type="evil\x1b[2J\n")
config("the model type of a vision model", "source", ("plan",), model_type="vit")
config("the model type is a path", "source", ("plan",), model_type="../../outside/evil")
for _number in (
    0,
    -1,
    10**5,
    10**9,
    10**18,
    2**63,
    10**400,
    1.5,
    "2",
    None,
    True,
    [2],
    float("nan"),
    float("inf"),
):
    for _key in ("n_layer", "n_embd", "n_head", "n_inner", "vocab_size", "n_positions"):
        config(f"source: {_key} {str(_number)[:20]!r}", "source", ALL, **{_key: _number})
    for _key in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "head_dim",
    ):
        config(f"packed: {_key} {str(_number)[:20]!r}", "packed", ALL, **{_key: _number})
config("the heads do not divide the width", "source", ("plan",), n_head=7)
config("an unknown activation", "source", ("plan",), activation_function="os.system")
config("the activation is an object", "source", ("plan",), activation_function={"a": 1})
config(
    "an attention implementation from the hub", "source", ALL, attn_implementation="kernels-community/evil"
)
config(
    "an attention implementation from the hub, in a nested config",
    "source",
    ALL,
    _attn_implementation="kernels-community/evil",
    _attn_implementation_internal="kernels-community/evil",
)
config(
    "packed: an attention implementation from the hub",
    "packed",
    ALL,
    _attn_implementation="kernels-community/evil",
    attn_implementation="kernels-community/evil",
)
config(
    "an unknown rope type",
    "packed",
    ("plan",),
    rope_parameters={"rope_type": "evil", "rope_theta": 1},
)
config("rope with zeros", "packed", ALL, rope_parameters={"rope_type": "yarn", "rope_theta": 0, "factor": 0})
config("rope is a list", "packed", ALL, rope_parameters=[1, 2], rope_scaling="x")
config("an invalid dtype", "packed", ALL, dtype="../evil", torch_dtype=7)
config("a nested text config", "source", text_config={"n_embd": -1, "model_type": "llama"})
config("the text config is a list", "source", ALL, text_config=[1])
config("tie_word_embeddings is a text", "source", ALL, tie_word_embeddings="maybe")
config("eos is not a number", "packed", ALL, eos_token_id=["a", {"b": 1}, -5, 10**30])
config("packed: an unknown activation", "packed", ("plan",), hidden_act="evil")
config("another library's quantization", "source", quantization_config={"quant_method": "awq", "bits": 4})
config("quantization_config is a list", "source", quantization_config=[1])
config(
    "quantization_config without packed tensors",
    "source",
    ("plan",),
    quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32},
)
config("an encoder-decoder", "source", ("plan",), model_type="t5")
config("per layer lists", "packed", ALL, layer_types=["evil"], num_hidden_layers=2)
config("pruned heads", "source", ALL, pruned_heads={"0": [1, 2]})
config(
    "attributes of Python",
    "source",
    ("plan",),
    __class__="x",
    from_pretrained="x",
    to_dict="x",
    get_text_config=1,
)
config("num_labels", "source", id2label={"a": 1}, num_labels=10**12)
config("subconfig", "packed", ALL, pretraining_tp=10**9, attention_dropout="x", rms_norm_eps="x")

# ---- bundled code

EVIL = (
    "from pathlib import Path\nPath(r'{}').touch()\nclass Evil:\n    pass\nEvilConfig = EvilTokenizer = Evil"
)


def with_code(folder: Path) -> None:
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "__init__.py", "transformers.py"):
        (folder / name).write_text(EVIL.format(outside_of(folder) / "was-run"))


AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


def auto_map(base: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with_code(folder)
        edit_json(folder / "config.json", auto_map=AUTO_MAP, **changes)
        edit_json(folder / "tokenizer_config.json", auto_map=AUTO_MAP, trust_remote_code=True)

    return change


for _base in ("source", "packed"):
    add(f"{_base}: auto_map of a known model", _base, auto_map(_base), ALL)
    add(f"{_base}: auto_map of an unknown model", _base, auto_map(_base, model_type="evil"), ("plan",))
    add(f"{_base}: auto_map of a vision model", _base, auto_map(_base, model_type="vit"), ("plan",))
    add(
        f"{_base}: auto_map, trusted by the config itself",
        _base,
        auto_map(_base, model_type="evil", trust_remote_code=True),
        ("plan",),
    )


@case("auto_map of the tokenizer alone", "source", ALL)
def _(folder: Path) -> None:
    with_code(folder)
    edit_json(
        folder / "tokenizer_config.json",
        auto_map=AUTO_MAP,
        tokenizer_class="EvilTokenizer",
        trust_remote_code=True,
    )


@case("a pickle in the weights runs code", "bin")
def _(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (outside_of(folder) / "was-run",)

    torch.save({"x": torch.zeros(3), "evil": Evil()}, first_shard(folder))


@case("a bare pickle runs code", "bin")
def _(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (outside_of(folder) / "was-run",)

    first_shard(folder).write_bytes(pickle.dumps(Evil()))


# ---- tokenizers

text("tokenizer.json is empty", "source", "tokenizer.json", "", ("plan", "verify"))
text("tokenizer.json is deep", "source", "tokenizer.json", DEEP, ("plan", "verify"))
text(
    "tokenizer.json is not a tokenizer", "source", "tokenizer.json", '{"version": "1.0"}', ("plan", "verify")
)
text("tokenizer.json is not UTF-8", "source", "tokenizer.json", b"\xff\xff", ("plan", "verify"))
text(
    "tokenizer.json is a long list",
    "source",
    "tokenizer.json",
    "[" + "[]," * 3_000_000 + "[]]",
    ("plan", "verify"),
)
text("tokenizer_config.json is deep", "source", "tokenizer_config.json", DEEP, ("plan", "verify"))
text("tokenizer_config.json is a list", "source", "tokenizer_config.json", "[1]", ("plan", "verify"))
text(
    "tokenizer_config.json is huge",
    "source",
    "tokenizer_config.json",
    '{"a": [' + MANY + "{}]}",
    ("plan", "verify"),
)
text(
    "special_tokens_map.json is a list",
    "source",
    "special_tokens_map.json",
    "[1]",
    ("plan", "verify", "run", "convert"),
)
text("added_tokens.json contains lists", "source", "added_tokens.json", '{"a": [], "b": {"c": 1}}', ALL)
text("generation_config.json is a list", "packed", "generation_config.json", "[1]", ("plan", "verify"))
text(
    "generation_config.json says nonsense",
    "packed",
    "generation_config.json",
    '{"eos_token_id": {"a": [1, -5, 1e400]}, "temperature": "hot"}',
    ALL,
)
text(
    "generation_config.json names tokens out of range",
    "packed",
    "generation_config.json",
    '{"eos_token_id": [-1, 99999999999999999999, 3]}',
    ALL,
)
tokenizer_config(
    "an invalid tokenizer class", ("plan", "verify", "run", "convert"), tokenizer_class="os.system"
)
tokenizer_config("the tokenizer class is a number", ("plan", "verify", "run", "convert"), tokenizer_class=7)
tokenizer_config("a tokenizer file outside", ALL, tokenizer_file="/etc/hostname")
tokenizer_config(
    "vocabulary files elsewhere",
    ALL,
    vocab_file="../../outside/vocab.json",
    merges_file="/etc/passwd",
    spm_file="/etc/passwd",
)


@case("fast_tokenizer_files elsewhere", "source", ("plan", "verify"))
def _(folder: Path) -> None:
    (folder / "tokenizer.json").rename(outside_of(folder) / "tokenizer.1.0.json")
    (folder / "vocab.json").write_text("{}")
    edit_json(folder / "tokenizer_config.json", fast_tokenizer_files=["../../outside/tokenizer.1.0.json"])


tokenizer_config(
    "the name of a tokenizer on the hub", ALL, name_or_path="owner/name", _name_or_path="owner/name"
)
tokenizer_config("model_max_length is a text", ("plan", "verify"), model_max_length="")
tokenizer_config("special tokens are not texts", ALL, eos_token=7, bos_token=["a"], pad_token={"a": 1})
tokenizer_config(
    "model_max_length, padding and truncation are invalid",
    ALL,
    model_max_length="long",
    padding_side="up",
    truncation_side=7,
)
tokenizer_config("invalid added tokens", ALL, added_tokens_decoder={"a": 1, "99999999999": {"content": 7}})
tokenizer_config(
    "added tokens out of range", ALL, added_tokens_decoder={"9999999999": {"content": "x", "special": True}}
)
tokenizer_config("the chat template is an object", ALL, chat_template={"a": 1})
tokenizer_config("the chat template is a list", ALL, chat_template=[{"name": 1}])


@case("more tokens than embedding rows", "packed", ("plan", "verify", "run"))
def _(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["id"] += 10**6
    (folder / "tokenizer.json").write_text(json.dumps(data))


@case("the vocabulary is outside", "source", ("plan", "verify"))
def _(folder: Path) -> None:
    outside = outside_of(folder)
    (folder / "tokenizer.json").rename(outside / "tokenizer.json")
    (folder / "vocab.json").write_text("{}")
    edit_json(folder / "tokenizer_config.json", tokenizer_file=str(outside / "tokenizer.json"))


@case("the folder of templates is a link that leads outside", "source")
def _(folder: Path) -> None:
    outside = outside_of(folder) / "templates"
    outside.mkdir()
    (outside / "default.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(outside)


# ---- quantization_config

quantization("bits is a float", (), bits=4.0)
quantization("bits disagrees with the shapes", ("plan",), bits=8)
quantization("bits 3 of 4", ("plan",), bits=3)
quantization("bits 2 of 4", ("plan",), bits=2)
quantization("bits without end", (), bits=10**400)
quantization("bits a list", (), bits=[4])
quantization("group_size disagrees with the shapes", ("plan",), group_size=64)
quantization("one group", ("plan",), group_size=-1)
quantization("groups of one", ("plan",), group_size=1)
quantization("group_size does not fit in 64 bits", group_size=10**30)
quantization("groups of 2**62", group_size=2**62)
quantization("groups of zero", (), group_size=0)
quantization("bits for single modules", (), dynamic={"+:x": {"bits": 8}})
quantization("a regular expression with catastrophic backtracking", ALL, dynamic={"-:(a+)+$": {}})
quantization("a quantizer with control characters", ALL, meta={"quantizer": ["a\x1b[2J\nb", 7, {}]})
quantization("the other format", ALL, checkpoint_format="gptq_v2")
quantization("desc_act", ALL, desc_act=True)
add(
    "quantization_config is a text",
    "packed",
    lambda f: edit_json(f / "config.json", quantization_config="gptq"),
)


@case("packed tensors without quantization_config", "packed")
def _(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config=None)
