"""Sound checkpoints by their real writers, of which all that is hostile is made; none is committed."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import gguf
import numpy as np
import torch
from safetensors.torch import save

from lowmem.models.dialogue import CHAT_TEMPLATE
from tests.checkpoint.test_source_gguf import write_gguf
from tests.helpers import TINY_STARCHAT, save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

KINDS = ("source", "bin", "packed", "gguf")


@cache
def seed_folder(kind: str) -> Path:
    """A small sound checkpoint: do not change it, `copy_seed` it.

    source: gpt_bigcode in two safetensors shards. bin: the same in two of torch.save's. packed: a llama of 4
    bits in groups of 32, in two shards. gguf: a llama of mixed types.
    """
    folder = Path(mkdtemp(prefix=f"lowmem-seed-{kind}-")) / kind
    if kind in ("source", "bin"):
        format = "safetensors" if kind == "source" else "bin"
        save_source(tiny_model("gpt_bigcode_mqa"), folder, format=format, shards=2, dtype=torch.float16)
    elif kind == "packed":
        write_rtn_checkpoint(tiny_model("llama"), folder, bits=4, shards=2)
    else:
        folder.mkdir()
        kinds = (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0)
        write_gguf(tiny_model("llama", tied=True), folder / "model.gguf", kinds, "llama")
    return folder


def copy_seed(kind: str, folder: Path) -> Path:
    """A copy that may be changed; returns `folder`."""
    return Path(shutil.copytree(seed_folder(kind), folder))


def safetensors_files() -> list[bytes]:
    """Two small files: every shape of shape, and with metadata."""
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros(0, 3), "c": torch.tensor(1, dtype=torch.int64)}
    return [save(tensors, {"format": "pt"}), save({"x": torch.ones(4, dtype=torch.bfloat16)})]


def bin_files() -> list[bytes]:
    """What torch.save writes of a few tensors."""
    files = []
    for value in (
        {"x": torch.arange(4.0).reshape(2, 2)},
        OrderedDict(y=torch.ones(3, dtype=torch.float16), z=torch.nn.Parameter(torch.ones(2, 3).T)),
        {"f": torch.ones(3).to(torch.float8_e4m3fn)},
    ):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        files.append(buffer.getvalue())
    return files


def pickles() -> list[bytes]:
    """The pickles in them."""
    found = []
    for file in bin_files():
        with zipfile.ZipFile(io.BytesIO(file)) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            found.append(archive.read(name))
    return found


def gguf_files() -> list[bytes]:
    """A GGUF of every kind of key and two tensors."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_embedding_length(32)
        writer.add_head_count(2)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(3)
        writer.add_token_list(["a", "b", "c"])
        writer.add_token_types([1, 1, 3])
        writer.add_bool("llama.some", True)
        writer.add_tensor("token_embd.weight", np.zeros((3, 32), dtype=np.float16))
        packed = gguf.quantize(np.zeros((32, 32), dtype=np.float32), gguf.GGMLQuantizationType.Q4_0)
        writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [path.read_bytes()]


def templates() -> list[bytes]:
    """StarChat's chat template, and one with what other models' have."""
    other = (
        "{% set ns = namespace(n=0) %}{% macro turn(m)%}<{{ m.role }}>{{ m['content'] | trim }}{% endmacro %}"
        "{% for m in messages if m.role != 'system' %}{% set ns.n = ns.n + 1 %}{{ turn(m) ~ eos_token }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' * 1 }}{% endif %}{% endfor %}"
    )
    return [CHAT_TEMPLATE.encode(), other.encode()]


def small_tokenizer(splits: str | None = None) -> bytes:
    """tiny-starchat's tokenizer.json with the first tokens alone, so that mutations hit what matters.

    splits: a regular expression that cuts a text before anything else does.
    """
    data = json.loads((TINY_STARCHAT / "tokenizer.json").read_text(encoding="utf-8"))
    model, added = data["model"], data["added_tokens"]
    special = {token["content"] for token in added}
    vocab = {text: n for text, n in model["vocab"].items() if n < 300 or text in special}
    merges = [pair for pair in model["merges"] if "".join(pair) in vocab and all(p in vocab for p in pair)]
    for token in added:
        token["id"] = vocab.setdefault(token["content"], len(vocab))
    data["model"] = {**model, "vocab": {text: n for n, text in enumerate(vocab)}, "merges": merges}
    for token in added:
        token["id"] = data["model"]["vocab"][token["content"]]
    if splits is not None:
        cut = {"type": "Split", "pattern": {"Regex": splits}, "behavior": "Isolated", "invert": False}
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, data["pre_tokenizer"]]}
    return json.dumps(data).encode()
