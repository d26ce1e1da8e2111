"""A checkpoint in StarChat Alpha's exact layout and size, with made-up weights: 4 pickle shards, 31.65 GB.

    python -m lowmem.benchmarks.experiments.full_size.make_starchat_shaped OUT               as published: 40 layers, 31.65 GB
    python -m lowmem.benchmarks.experiments.full_size.make_starchat_shaped OUT --layers 4    3.8 GiB in one shard

What is true of it: every tensor's name, shape, dtype and shard, the copy of the tied head, config.json in its
old spelling, a byte-level BPE of 49156 entries with StarChat's special tokens at StarChat's ids. What is not:
the values. They are those of lowmem.benchmarks.experiments.peers.starchat_layer (normal, with heavy-tailed input columns and with loud
channels), and what writes to the residual stream is scaled down with the depth as GPT-2's initialization
does, so that activations stay finite and no layer drowns the others.

A tensor is a function of its name and the seed: a model of fewer layers has the same first ones. Two tensors
are in memory at once, never a shard. torch.save writes the shards' frames (`replicas.py`), the values are put
into them, and the zip's checksums are mended, so that every tool sees what torch.save would have written.
"""

from __future__ import annotations

import argparse
import math
import shutil
import struct
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.benchmarks.experiments.full_size.replicas import (
    STARCHAT_VOCAB,
    starchat_config,
    starchat_header_replica,
    starchat_shapes,
)

from lowmem.errors import LowmemError, OutputError

if TYPE_CHECKING:
    import torch

BYTE_BPE = 49152
"""Entries before the four dialogue tokens."""
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<reponame>",
)
"""StarCoder's, from id 0."""
DIALOGUE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
DEPTH = 40
"""Of the real model, by which what writes to the residual stream is scaled, however few layers there are."""
EMBEDDED = 0.1
"""Of starchat_layer's embeddings, so that the tied head's logits are about as wide as a trained model's."""
_TRAINING_BYTES = 24_000_000
"""Of source code; the vocabulary is full long before."""
_MARGIN = 64 << 20


def write_starchat_shaped(folder: Path, *, seed: int = 0, **dimensions: int) -> Path:
    """The whole checkpoint; returns `folder`.

    dimensions: of `starchat_config`, if not the real ones. OutputError if the folder is not empty or the disk
    has too little room; then nothing was written. The folder has this name when it is whole, not before.
    """
    config = starchat_config(**dimensions)
    need = _bytes_of(config) + _MARGIN
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not an empty folder", "Name another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise OutputError(
            f"the checkpoint takes {need / 1e9:.2f} GB, and {folder.parent} has {free / 1e9:.2f} GB free",
            "Free some, name a folder on another disk, or make fewer layers with --layers",
        )
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        starchat_header_replica(part, **dimensions)
        _write_tokenizer(part)
        for shard in sorted(part.glob("pytorch_model-*.bin")):
            fill_shard(shard, seed)
            print(f"{shard.name}: {shard.stat().st_size / 1e9:.2f} GB", flush=True)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def fill_shard(path: Path, seed: int) -> None:
    """Put values into the holes of a shard that torch.save wrote without data, and their CRC-32 too."""
    from lowmem.checkpoint.headers.bin import read_bin_header

    names = {tensor.key: (name, tensor.shape) for name, tensor in read_bin_header(path).items()}
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        directory = archive.start_dir
    wanted = [(entry, *names[entry.filename.rpartition("/")[2]]) for entry in entries]
    checksums: dict[str, int] = {}
    with path.open("r+b") as stream:
        for (entry, _, _), values in zip(
            wanted, _made(((name, shape) for _, name, shape in wanted), seed), strict=True
        ):
            data = memoryview(values.numpy().data).cast("B")
            stream.seek(entry.header_offset + 26)
            skipped = sum(struct.unpack("<HH", stream.read(4)))  # the entry's name, and its padding
            stream.seek(entry.header_offset + 30 + skipped)
            stream.write(data)
            checksum = checksums[entry.filename] = zlib.crc32(data)
            # Bit 3 of torch's flags: the checksum follows the data, behind a signature.
            if stream.read(4) != b"PK\x07\x08":
                raise OutputError(f"{path.name}: torch.save writes another zip than this knows")
            stream.write(struct.pack("<I", checksum))
        _mend_directory(path, directory, checksums)


def make_values(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """The float16 tensor of this name."""
    from lowmem.benchmarks.experiments.peers.starchat_layer import make_weight

    source = EMBEDDING if name == HEAD else name
    values = make_weight(source, tuple(shape), zlib.crc32(f"{seed}/{source}".encode()))
    if "c_proj" in name:
        return values.mul_((2 * DEPTH) ** -0.5)
    return values.mul_(EMBEDDED) if values.ndim == 2 and ".h." not in name else values


def _made(wanted: Iterable[tuple[str, Sequence[int]]], seed: int) -> Iterator[torch.Tensor]:
    """Each tensor in turn; the next one is made while this one is written."""
    with ThreadPoolExecutor(2) as pool:
        ahead: list[Future[torch.Tensor]] = []
        for name, shape in wanted:
            ahead.append(pool.submit(make_values, name, shape, seed))
            if len(ahead) == 2:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()


def _mend_directory(path: Path, start: int, checksums: dict[str, int]) -> None:
    """Write the checksums into the zip's central directory, which begins at `start`."""
    with path.open("r+b") as stream:
        stream.seek(start)
        directory = stream.read()
        at = 0
        while directory[at : at + 4] == b"PK\x01\x02":
            name_length, extra, comment = struct.unpack_from("<HHH", directory, at + 28)
            name = directory[at + 46 : at + 46 + name_length].decode()
            if name in checksums:
                stream.seek(start + at + 16)
                stream.write(struct.pack("<I", checksums[name]))
            at += 46 + name_length + extra + comment


def _bytes_of(config: dict[str, object]) -> int:
    return sum(2 * math.prod(shape) for shape in starchat_shapes(config).values())


# --- the tokenizer ----------------------------------------------------------------------------------------


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with single digits, as StarCoder's, trained on Python's standard library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from lowmem.checkpoint.files.whole import write_json

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_BPE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_source_code(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in DIALOGUE_TOKENS])
    if tokenizer.get_vocab_size() != STARCHAT_VOCAB:
        raise OutputError(
            f"the standard library of this Python gives {tokenizer.get_vocab_size()} tokens of "
            f"{STARCHAT_VOCAB}",
            "Use a Python whose standard library is installed as source files",
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    end = SPECIAL_TOKENS[0]
    others = [*SPECIAL_TOKENS[1:], *DIALOGUE_TOKENS]
    special = {"additional_special_tokens": others, "bos_token": end, "eos_token": end, "unk_token": end}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 8192, "add_prefix_space": False}
    write_json(folder / "tokenizer_config.json", special | settings)


def _source_code() -> Iterator[str]:
    """Source files of the standard library, in the order of their names, up to _TRAINING_BYTES."""
    rest = _TRAINING_BYTES
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if rest <= 0:
            return
        if "site-packages" not in path.parts:
            text = path.read_text("utf-8", errors="replace")
            rest -= len(text)
            yield text


def main() -> int:
    """The command line; exit code 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of StarChat Alpha's layout and size.")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--layers", type=int, default=DEPTH, help="decoder layers (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (%(default)s)")
    args = parser.parse_args()
    if args.layers < 1:
        parser.error("--layers must be 1 or more")
    try:
        write_starchat_shaped(args.out.expanduser().absolute(), seed=args.seed, layers=args.layers)
    except LowmemError as error:
        print(f"make_starchat_shaped: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
