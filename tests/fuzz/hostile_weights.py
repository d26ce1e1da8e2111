"""Hostile folders: headers, tensors, GGUF, and the files that lowmem writes."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.hostile import (
    ALL,
    DEEP,
    add,
    case,
    edit_json,
    edit_tensors,
    first_shard,
    grow,
    tensors,
    text,
)

# ---- headers and tensors


# Layers beyond those of the config are not loaded: verify reports them, convert leaves them out.
for _number, _harmless in (("9" * 9, ("verify", "convert")), ("9" * 14, ALL), ("9" * 900, ALL)):
    tensors(
        f"a layer number of {len(_number)} digits",
        "source",
        lambda t, n=_number: {f"transformer.h.{n}.attn.c_proj.weight": torch.zeros(64, 64)},
        _harmless,
    )
tensors(
    "a layer number in other digits",
    "source",
    lambda t: {"transformer.h.²٣.attn.c_proj.weight": torch.zeros(64, 64)},
    ALL,
)
tensors("zero-size embeddings", "source", lambda t: {"transformer.wte.weight": torch.zeros(0, 64)}, ("plan",))
tensors(
    "zero-size linears",
    "source",
    lambda t: {n: torch.zeros(0, 0) for n in t if n.endswith("c_fc.weight")},
    ("plan",),
)
tensors(
    "every tensor has zero rows",
    "source",
    lambda t: {n: torch.zeros(0, *x.shape[1:]) for n, x in t.items()},
    ("plan",),
)
tensors("every tensor is a scalar", "source", lambda t: {n: torch.tensor(1.0) for n, x in t.items()})
tensors("integers as weights", "source", lambda t: {n: x.to(torch.int32) for n, x in t.items()}, ("plan",))
tensors(
    "weights are 8-bit floats",
    "source",
    lambda t: {n: x.to(torch.float8_e4m3fn) for n, x in t.items()},
    ("plan",),
)
tensors("complex weights", "source", lambda t: {n: x.to(torch.complex64) for n, x in t.items()}, ("plan",))
add("no tensors", "source", lambda f: edit_tensors(f, lambda t: t.clear()))
tensors(
    "tensor names with control characters",
    "source",
    lambda t: {"a\x1b]0;x\x07\n\u202eb": torch.zeros(3)},
    ALL,
)
tensors(
    "packed: tensor names with control characters",
    "packed",
    lambda t: {"a\x1b]0;x\x07\n\u202eb.qweight": torch.zeros(3)},
)
add(
    "a huge sparse embedding",
    "source",
    lambda f: grow(f, "transformer.wte.weight", [1 << 32, 64], "F16", 2),
)
add(
    "packed: a huge sparse embedding",
    "packed",
    lambda f: grow(f, "model.embed_tokens.weight", [1 << 32, 64], "F32", 4),
)


@case("packed: a huge sparse embedding, as in the config", "packed")
def _(folder: Path) -> None:
    grow(folder, "model.embed_tokens.weight", [1 << 32, 64], "F32", 4)
    edit_json(folder / "config.json", vocab_size=1 << 32, tie_word_embeddings=True)


@case("a huge sparse embedding, as in the config", "source")
def _(folder: Path) -> None:
    grow(folder, "transformer.wte.weight", [1 << 32, 64], "F16", 2)
    edit_json(folder / "config.json", vocab_size=1 << 32)


@case("a huge tensor that the model does not have", "packed", ("verify",))
def _(folder: Path) -> None:
    grow(folder, "extra.weight", [1 << 40], "F32", 4)


@case("a header longer than its file", "source")
def _(folder: Path) -> None:
    first_shard(folder).write_bytes(struct.pack("<Q", 2**63) + b"{}")


@case("a header of many nested lists", "source")
def _(folder: Path) -> None:
    data = b'{"x":[' + b"[]," * 3_000_000 + b"[]]}"
    first_shard(folder).write_bytes(struct.pack("<Q", len(data)) + data)


@case("a header of many empty tensors", "source")
def _(folder: Path) -> None:
    entry = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    data = json.dumps({f"t{i}": entry for i in range(700_000)}).encode()
    first_shard(folder).write_bytes(struct.pack("<Q", len(data)) + data)


tensors(
    "g_idx of another length",
    "packed",
    lambda t: {n: torch.zeros(7, dtype=torch.int32) for n in t if n.endswith("g_idx")},
    ("plan",),
)
tensors(
    "g_idx out of range",
    "packed",
    lambda t: {n: torch.full_like(x, 2**31 - 1) for n, x in t.items() if n.endswith("g_idx")},
    ("plan",),
)
tensors(
    "g_idx below zero",
    "packed",
    lambda t: {n: torch.full_like(x, -1) for n, x in t.items() if n.endswith("g_idx")},
    ("plan",),
)
tensors("empty g_idx", "packed", lambda t: {n: x[:0] for n, x in t.items() if n.endswith("g_idx")}, ("plan",))
tensors(
    "scales that are not finite",
    "packed",
    lambda t: {n: torch.full_like(x, float("nan")) for n, x in t.items() if n.endswith("scales")},
    ("plan",),
)
tensors(
    "qweight has one dimension",
    "packed",
    lambda t: {n: x.reshape(-1) for n, x in t.items() if n.endswith("qweight")},
)
tensors(
    "qweight is a scalar",
    "packed",
    lambda t: {n: torch.tensor(1, dtype=torch.int32) for n, x in t.items() if n.endswith("qweight")},
)
tensors(
    "qweight of floats",
    "packed",
    lambda t: {n: x.float() for n, x in t.items() if n.endswith("qweight")},
    ("plan",),
)
tensors(
    "scales of integers",
    "packed",
    lambda t: {n: x.to(torch.int32) for n, x in t.items() if n.endswith("scales")},
    ("plan",),
)
tensors(
    "packed: tensors of a linear that the model does not have",
    "packed",
    lambda t: {"model.norm.qweight": torch.zeros(4, 4, dtype=torch.int32)},
    ("plan",),
)
tensors(
    "packed: the embedding is packed",
    "packed",
    lambda t: {
        f"model.embed_tokens.{p}": torch.zeros(4, 4, dtype=torch.int32)
        for p in ("qweight", "qzeros", "g_idx", "scales")
    },
    ("plan",),
)
tensors(
    "packed: a linear both packed and not",
    "packed",
    lambda t: {n.replace("qweight", "weight"): torch.zeros(64, 64) for n in list(t) if n.endswith("qweight")},
    ("plan", "verify", "run"),  # the packed one is used; verify reports that the other is unused
)
# ---- lowmem's own files

text("a deeply nested manifest", "packed", "lowmem-manifest.json", DEEP, ("plan", "run"))
text(
    "a manifest that names paths",
    "packed",
    "lowmem-manifest.json",
    '{"version": 1, "files": {"../../outside/x": {"sha256": "00", "bytes": 1}}}',
    ("plan", "run"),
)
text(
    "a manifest of large numbers",
    "packed",
    "lowmem-manifest.json",
    '{"version": 1, "files": {"config.json": {"sha256": "00", "bytes": 1' + "0" * 4000 + "}}}",
    ("plan", "run"),
)
text(
    "a report with invalid values",
    "packed",
    "lowmem-report.json",
    '{"kld": 1' + "0" * 400 + ', "base_model": [1]}',
    ALL,
)
text("a report with NaN", "packed", "lowmem-report.json", '{"kld": NaN, "base_model": {}}', ALL)
text("a deeply nested report", "packed", "lowmem-report.json", DEEP, ALL)
text(
    "a card with a YAML bomb",
    "source",
    "README.md",
    "---\n"
    + "\n".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [" + ",".join([f"*{chr(97 + i)}" if i else "x"] * 9) + "]"
        for i in range(12)
    )
    + "\nlicense: *m\n---\n",
    ALL,
)
text(
    "a card with YAML tags of Python objects",
    "source",
    "README.md",
    "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
    ALL,
)

# ---- GGUF


def edit_gguf(folder: Path, change: Callable[[bytearray], Any]) -> None:
    blob = bytearray((folder / "model.gguf").read_bytes())
    result = change(blob)
    (folder / "model.gguf").write_bytes(result if isinstance(result, (bytes, bytearray)) else blob)


def patch(at: int, data: bytes) -> Callable[[bytearray], None]:
    def change(blob: bytearray) -> None:
        blob[at : at + len(data)] = data

    return change


def gguf_key(key: str, kind: str, value: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        blob = bytearray((folder / "model.gguf").read_bytes())
        at = blob.index(key.encode()) + len(key) + 4
        blob[at : at + struct.calcsize("<" + kind)] = struct.pack("<" + kind, value)
        (folder / "model.gguf").write_bytes(blob)

    return change


for _what, _at, _data in (
    ("version", 4, struct.pack("<I", 9)),
    ("tensor count", 8, struct.pack("<Q", 2**63)),
    ("key count", 16, struct.pack("<Q", 2**60)),
    ("key length", 24, struct.pack("<Q", 2**64 - 1)),
):
    add(f"a GGUF with a wrong {_what}", "gguf", lambda f, a=_at, d=_data: edit_gguf(f, patch(a, d)))
for _key in (
    "llama.block_count",
    "llama.embedding_length",
    "llama.attention.head_count",
    "llama.feed_forward_length",
    "llama.attention.head_count_kv",
    "llama.context_length",
    "llama.vocab_size",
):
    for _value in (0, 1, 3, 100_000, 2**31, 2**32 - 1):
        add(f"GGUF: {_key} {_value}", "gguf", gguf_key(_key, "I", _value), ALL)
add("GGUF: cut", "gguf", lambda f: edit_gguf(f, lambda b: b[: len(b) // 2]))


def gguf_of_keys(folder: Path, count: int) -> None:
    keys = b"".join(struct.pack("<Q", 7) + b"%07x" % i + b"\x00\x00\x00\x00\x01" for i in range(count))
    (folder / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, count) + keys)


def gguf_of_tensors(folder: Path, count: int) -> None:
    name = b"general.architecture"
    key = struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, 5) + b"llama"
    rows = b"".join(
        struct.pack("<Q", 7) + b"%07x" % i + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i in range(count)
    )
    blob = b"GGUF" + struct.pack("<IQQ", 3, count, 1) + key + rows
    (folder / "model.gguf").write_bytes(blob)
    os.truncate(folder / "model.gguf", len(blob) + 64 + 32 * count)


def gguf_of_strings(folder: Path, count: int) -> None:
    strings = b"".join(struct.pack("<Q", 1) + b"a" for _ in range(count))
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, count) + strings
    (folder / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)


def gguf_of_a_long_key(folder: Path) -> None:
    key = struct.pack("<Q", 15_000_000) + b"k" * 15_000_000 + struct.pack("<I", 77)
    (folder / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)


add("GGUF: 5 million keys", "gguf", lambda f: gguf_of_keys(f, 5_000_000))
add("GGUF: 2 million tensors", "gguf", lambda f: gguf_of_tensors(f, 2_000_000))
add("GGUF: 3.9 million strings", "gguf", lambda f: gguf_of_strings(f, 3_900_000))
add("GGUF: a very long key", "gguf", gguf_of_a_long_key)
