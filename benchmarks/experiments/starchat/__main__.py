"""Write a checkpoint in StarChat Alpha's exact layout and size, with made-up weights: 31.65 GB.

    python -m lowmem.benchmarks.experiments.starchat OUT               40 layers in 4 pickle shards
    python -m lowmem.benchmarks.experiments.starchat OUT --layers 4    3.8 GiB in one shard

As published are: every tensor's name, shape, dtype and shard, the copy of the tied head, config.json in its
old spelling, a byte-level BPE of 49156 entries with StarChat's special tokens at StarChat's ids. The values
are made up (`plausible.py`); linears that write to the residual stream are scaled down with the depth as in
GPT-2's initialization, so that activations stay finite and no layer drowns the others.

A tensor depends only on its name and the seed, so a model of fewer layers has the same first layers. Two
tensors are in memory at once, never a shard: torch.save writes a shard without data (`replicas.py`), and
torch's own writer copies it entry by entry with the values in their places.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lowmem.benchmarks.experiments.starchat.dimensions import VOCAB, Dimensions, nbytes_of
from lowmem.benchmarks.experiments.starchat.plausible import make_weight
from lowmem.benchmarks.experiments.starchat.replicas import starchat_header_replica

from lowmem.errors import LowmemError, OutputError

BYTE_BPE = 49152
"""Entries before the four dialogue tokens."""
SPECIAL_TOKENS = (
    "<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<empty_output>", "<commit_before>", "<commit_msg>",
    "<commit_after>", "<reponame>",
)  # fmt: skip
"""StarCoder's, from id 0."""
DIALOGUE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
DEPTH = 40
"""Of the real model; residual weights are scaled by it however few layers are written."""
EMBEDDING_SCALE = 0.1
"""Makes the tied head's logits about as wide as a trained model's."""
_TRAINING_CHARACTERS = 24_000_000  # of source code; fills the vocabulary long before the end
_MARGIN = 64 << 20


def write_starchat_shaped(folder: Path, *, seed: int = 0, **dimensions: int) -> Path:
    """Write the whole checkpoint; returns `folder`, which gets this name when it is complete.

    dimensions: of `Dimensions`. Raises OutputError, before anything is written, if the folder is not empty
    or the disk has too little room.
    """
    need = nbytes_of(Dimensions(**dimensions).tensors()) + _MARGIN
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
    """Replace a shard that torch.save wrote without data by the same one with values."""
    from lowmem.checkpoint.headers.bin import read_bin_header

    names = {tensor.key: (name, tensor.shape) for name, tensor in read_bin_header(path).items()}
    filled = path.parent / "filled" / path.name  # the archive's name is in its entries
    filled.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path) as archive:
        entries = [name.partition("/")[2] for name in archive.namelist()]
        tensors = [names[entry.removeprefix("data/")] for entry in entries if entry.startswith("data/")]
        values = _made(tensors, seed)
        writer: Any = torch._C.PyTorchFileWriter(str(filled))  # also takes storages, unlike its stub
        for name, entry in zip(archive.namelist(), entries, strict=True):
            if entry.startswith("data/"):
                tensor = next(values)
                writer.write_record(entry, tensor.untyped_storage(), tensor.nbytes)  # type: ignore[arg-type]
            elif entry not in ("version", ".data/serialization_id"):  # the writer adds these at the end
                data = archive.read(name)
                writer.write_record(entry, data, len(data))
        writer.write_end_of_file()
    filled.replace(path)
    filled.parent.rmdir()


def make_values(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """The float16 tensor of this name."""
    source = EMBEDDING if name == HEAD else name
    values = make_weight(source, tuple(shape), zlib.crc32(f"{seed}/{source}".encode()))
    if "c_proj" in name:
        return values.mul_((2 * DEPTH) ** -0.5)
    return values.mul_(EMBEDDING_SCALE) if values.ndim == 2 and ".h." not in name else values


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


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with single digits, like StarCoder's, trained on Python's standard library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from lowmem.checkpoint.files.whole import write_json

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_BPE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_source_code(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in DIALOGUE_TOKENS])
    if tokenizer.get_vocab_size() != VOCAB:
        raise OutputError(
            f"the standard library of this Python gives {tokenizer.get_vocab_size()} tokens of {VOCAB}",
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
    """Source files of the standard library, sorted by name, up to _TRAINING_CHARACTERS."""
    rest = _TRAINING_CHARACTERS
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if rest <= 0:
            return
        if "site-packages" not in path.parts:
            text = path.read_text("utf-8", errors="replace")
            rest -= len(text)
            yield text


def main() -> int:
    """The command; exit code 0, or 2 for what the user can correct."""
    parser = argparse.ArgumentParser(
        prog="python -m lowmem.benchmarks.experiments.starchat",
        description="Write a checkpoint of StarChat Alpha's layout and size, with made-up weights.",
    )
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--layers", type=int, default=DEPTH, help="decoder layers (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (%(default)s)")
    args = parser.parse_args()
    if args.layers < 1:
        parser.error("--layers must be 1 or more")
    try:
        write_starchat_shaped(args.out.expanduser().absolute(), seed=args.seed, layers=args.layers)
    except LowmemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
