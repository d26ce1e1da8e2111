"""What every source checkpoint offers, and what all kinds do alike: config, tokenizer, side files."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem.checkpoint.files.links import leads_outside
from lowmem.checkpoint.files.patterns import (
    CODE_SUFFIXES,
    LICENCE_PATTERNS,
    SETTINGS_PATTERNS,
    TOKENIZER_PATTERNS,
    VOCABULARIES,
    WEIGHT_SUFFIXES,
)
from lowmem.checkpoint.files.reading import one_line, update_with_bytes, update_with_sample
from lowmem.checkpoint.headers.folder import read_config_json
from lowmem.checkpoint.headers.tokenizer import check_tokenizer_files
from lowmem.errors import SourceError
from lowmem.text.tokenizing import decode, encode

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FLOATS = ("float32", "float16", "bfloat16")
MAX_CARD = 4_000_000
MAX_LICENCE = 4096


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    shape: as `read` returns it. dtype: of what `read` returns, as torch spells it ("float16").
    file: the name of the file inside the folder, for messages.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes `read` returns."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.numel * dtype.itemsize


class Source(ABC):
    """A checkpoint to read from, one tensor at a time.

    path: the folder (of a GGUF: the folder that the file is in). display: what the user typed.
    kind: "safetensors", "bin" or "gguf". infos: every tensor by its stored name, from headers alone.
    """

    kind: str

    def __init__(self, path: Path, display: str, infos: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.display = display
        self.infos = infos

    @abstractmethod
    def read(self, name: str, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        """One tensor, or some rows of a 2-D tensor, in CPU memory of its own.

        float64 comes as float32. Raises SourceError when the file is shorter than its header says,
        or when a 2-D tensor is not of float32, float16 or bfloat16; KeyError for an unknown name.
        """

    @abstractmethod
    def shards(self) -> list[tuple[Path, bytes]]:
        """Every weight file in a fixed order, with the bytes of its header."""

    def read_overhead(self, numel: int) -> int:
        """Bytes that reading one tensor of `numel` values takes at most, the tensor itself included."""
        return 4 * numel

    def release(self) -> None:
        """Drop what is mapped or cached (call it after each decoder layer)."""
        return

    def config(self) -> PretrainedConfig:
        """The model's config; SourceError in one line when transformers cannot make one of it."""
        from transformers import CONFIG_MAPPING, AutoConfig
        from transformers import __version__ as version

        path = self.path / "config.json"
        stored = read_config(self.path)
        model_type = stored.get("model_type")
        if not isinstance(model_type, str):
            raise SourceError(f"{path} does not say its model_type", "It is not a transformers checkpoint")
        if model_type not in CONFIG_MAPPING:
            raise SourceError(
                f"{path} has model_type {model_type!r}, which transformers {version} does not know",
                "A newer transformers may; code that comes with a checkpoint is never run",
            )
        check_keys(stored, CONFIG_MAPPING[model_type], path)
        try:
            config = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the values are anyone's, and each config class fails its own way
            raise SourceError(f"{path} is not a usable config: {one_line(error)}") from error
        return config  # type: ignore[no-any-return]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer; SourceError when there is none, it cannot be read, or names other places."""
        names = [path.name for path in self._files(VOCABULARIES)]
        if not names:
            raise SourceError(
                f"{self.path} has no tokenizer", "Put the model's tokenizer.json beside its weights"
            )
        return self._load_tokenizer()

    def _load_tokenizer(self, **options: Any) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        check_tokenizer_files(self.path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False, **options
            )
            # Settings of a wrong kind are taken as they are, and met by the first text.
            decode(tokenizer, encode(tokenizer, "a"), skip_special_tokens=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a damaged file: bare Exceptions of the Rust code, and its panics
            raise SourceError(f"the tokenizer in {self.path} cannot be read: {one_line(error)}") from error
        if not tokenizer.is_fast:
            raise SourceError(
                f"{self.path} has only a slow tokenizer ({type(tokenizer).__name__})",
                "Put the model's tokenizer.json beside its weights",
            )
        return tokenizer

    def side_files(self) -> list[Path]:
        """Tokenizer, template, generation and licence files that belong to a copy of this model.

        Plain files of the folder only: no weights, no code, no link that leads out of the folder
        (the hub cache's own links into its blobs are followed).
        """
        return self._files(TOKENIZER_PATTERNS + SETTINGS_PATTERNS + LICENCE_PATTERNS)

    def license_name(self) -> str | None:
        """The licence that the model card's front matter names, or None."""
        card = self.path / "README.md"
        return None if leads_outside(card) else license_of_card(card)

    def fingerprint(self) -> str:
        """A sha256 by which a changed source is noticed; cheap at any size.

        Over the kind, config.json, the side files, which shard holds which tensor, and each shard's
        name, size, header and a sample of its bytes. The folder's name and the times do not matter.
        """
        digest = hashlib.sha256()
        update_with_bytes(digest, "kind", self.kind.encode())
        config = self.path / "config.json"
        try:
            for path in ([config] if self.kind != "gguf" else []) + self.side_files():
                update_with_bytes(digest, path.name, path.read_bytes())
            for name in sorted(self.infos):
                update_with_bytes(digest, name, repr(self.infos[name]).encode())
            for path, header in self.shards():
                update_with_bytes(digest, path.name, header)
                update_with_sample(digest, path)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error}") from error
        return digest.hexdigest()

    def _files(self, patterns: tuple[str, ...]) -> list[Path]:
        found = []
        for path in sorted(self.path.iterdir()):
            if path.suffix.lower() in CODE_SUFFIXES + WEIGHT_SUFFIXES or not path.is_file():
                continue
            if not any(fnmatchcase(path.name, pattern) for pattern in patterns):
                continue
            if not leads_outside(path):
                found.append(path)
        return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a source folder, checked to be there, to be JSON, and not to be quantized."""
    config = read_config_json(folder)
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise SourceError(
                f"{folder} is already quantized ({_describe(config[key])})",
                "Convert the 16-bit original instead",
            )
    return config


def check_keys(config: Mapping[str, Any], kind: type, file: Path) -> None:
    """SourceError where a key of config.json, which becomes an attribute, takes the place of a method."""
    key = next((key for key in config if callable(getattr(kind, key, None))), None)
    if key is not None:
        raise SourceError(f"{file} has the key {key!r}, which is no setting", "Download it again")


def _describe(quantization: object) -> str:
    """`gptq, 4 bits`, of any quantization_config."""
    if not isinstance(quantization, Mapping):
        return "unknown method"
    method = quantization.get("quant_method")
    bits = quantization.get("bits") or quantization.get("w_bit")
    if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
        method, bits = method or "bitsandbytes", 4
    elif quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        method, bits = method or "bitsandbytes", 8
    name = method if isinstance(method, str) and method.isprintable() else "unknown method"
    return f"{name[:40]}, {bits} bits" if type(bits) is int else name[:40]


def license_of_card(card: Path) -> str | None:
    """`license` (or the `license_name` of "other") in the YAML front matter of a model card."""
    import yaml

    try:
        with card.open("rb") as stream:
            text = stream.read(MAX_CARD).decode("utf-8", errors="replace")
    except OSError:
        return None
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return None
    # Of front matter only what is said of the licence: parsing a megabyte of results takes long.
    said, wanted = [], False
    for line in lines[1:end]:
        if not line.startswith((" ", "-", "#")):
            wanted = line.startswith(("license:", "license_name:"))
        if wanted:
            said.append(line)
    text = "\n".join(said)
    if len(text) > MAX_LICENCE:
        return None
    try:
        front = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(front, dict):
        return None
    license = front.get("license")
    if license == "other" and front.get("license_name"):
        license = front["license_name"]
    if isinstance(license, list) and license:
        license = license[0]
    if not isinstance(license, str) or not license.strip() or not license.isprintable():
        return None
    return license.strip()[:100]


def check_readable(name: str, info: TensorInfo) -> None:
    """SourceError for a 2-D tensor whose dtype is no weight's."""
    if len(info.shape) == 2 and info.dtype not in FLOATS:
        raise SourceError(
            f"{info.file}: tensor {name!r} is {info.dtype}, not float32, float16 or bfloat16",
            "Convert the 16-bit original instead",
        )


def check_rows(name: str, info: TensorInfo) -> None:
    """ValueError when rows are asked of what is not 2-D."""
    if len(info.shape) != 2:
        raise ValueError(f"rows of {name!r}, which has shape {info.shape}")
