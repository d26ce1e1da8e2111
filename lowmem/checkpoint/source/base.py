"""The contract of a checkpoint on disk, and what all kinds of checkpoint share."""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem.checkpoint.dequantize import PackedWeight, dequantize
from lowmem.checkpoint.files.links import leads_outside
from lowmem.checkpoint.files.patterns import (
    CODE_SUFFIXES,
    LICENCE_PATTERNS,
    QUANTIZATION_FILES,
    SETTINGS_PATTERNS,
    TOKENIZER_PATTERNS,
    WEIGHT_SUFFIXES,
)
from lowmem.checkpoint.files.reading import read_json, update_with_bytes, update_with_sample
from lowmem.checkpoint.formats import QUANT_PARTS, QuantizationFormat
from lowmem.checkpoint.headers.tokenizer import template_files
from lowmem.checkpoint.packed_headers import packed_linears
from lowmem.checkpoint.packed_values import examine, groups_in_order
from lowmem.checkpoint.source.card import license_of_card
from lowmem.checkpoint.source.config import model_config
from lowmem.checkpoint.source.names import resolve_names
from lowmem.checkpoint.source.read_tokenizer import read_folder_tokenizer
from lowmem.errors import SourceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FLOATS = ("float32", "float16", "bfloat16")
"""The dtypes of a dense weight."""
_COMPARE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """What the headers say of one tensor."""

    shape: tuple[int, ...]
    """As `Source.read` returns it."""
    dtype: str
    """Of what `Source.read` returns, as torch spells it ("float16")."""
    file: str
    """Name of the file inside the folder, for messages."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that `Source.read` returns."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.numel * dtype.itemsize


@dataclass(frozen=True)
class ByteRange:
    """Where bytes are in a file."""

    path: Path
    begin: int
    size: int


class Source(ABC):
    """A checkpoint on disk, quantized or not, read one tensor at a time.

    Opening a source reads headers and config.json only. Names, shapes and formats come from them; the data of
    a tensor is read when `read`, `map` or `dense` asks for it, and is never held twice.
    """

    reads_rows = True
    """Reading some rows of a matrix costs those rows only; otherwise the whole tensor is read."""
    notes: tuple[str, ...] = ()
    """Lines for the user on what is not as config.json says; see `fitted`."""
    untied = False
    """The config ties the head, but the stored one has other values, and is used."""
    _kind: str
    """Part of the fingerprint."""

    def __init__(
        self,
        path: Path,
        display: str,
        infos: Mapping[str, TensorInfo],
        config_json: Mapping[str, Any],
        format: QuantizationFormat | None = None,
    ) -> None:
        """Raises SourceError where `format` is given and no linear is quantized, or not as it says."""
        self.quantized = packed_linears(infos, format)
        """The format of each quantized linear by its name (`transformer.h.0.attn.c_attn`)."""
        self._groups_in_order = {
            f"{linear}.g_idx": own for linear, own in self.quantized.items() if f"{linear}.g_idx" not in infos
        }
        """g_idx tensors that are not stored, as some tools omit them where groups are in order."""
        self.path = path
        """The folder; of a single file the folder that it is in."""
        self.display = display
        """The text by which the user named it."""
        self.infos = {
            **infos,
            **{name: _g_idx_info(infos, name, own.bits) for name, own in self._groups_in_order.items()},
        }
        """Every stored tensor by its stored name; of a quantized linear always all four tensors."""
        self._config_json = config_json
        self.format = format
        """How the linears are quantized; None for a checkpoint that is not."""
        if format is not None and not self.quantized:
            raise SourceError(
                f"the config of {display} declares a quantized model, "
                "but the checkpoint contains no quantized tensors",
                "Convert it again",
            )

    # ---- tensors

    def read(self, name: str, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        """A stored tensor, or some rows of a 2-D one, in CPU memory of its own.

        float64 is returned as float32. Raises SourceError when the file is shorter than its header says, or
        when a 2-D tensor is neither a part of a quantized linear nor float32, float16 or bfloat16; KeyError
        for an unknown name.
        """
        if (format := self._groups_in_order.get(name)) is not None:
            return groups_in_order(self.infos[name].shape[0], format.group_size)
        return self._read(name, rows)

    @abstractmethod
    def _read(self, name: str, rows: slice | torch.Tensor | None) -> torch.Tensor:
        """See read."""

    def map(self, name: str) -> torch.Tensor | None:
        """A stored tensor over the file's own pages; None where it cannot be mapped and must be read."""
        return None if name in self._groups_in_order else self._map(name)

    def _map(self, name: str) -> torch.Tensor | None:
        return None

    @abstractmethod
    def shards(self) -> list[tuple[Path, bytes]]:
        """Every weight file in a fixed order, with the bytes of its header."""

    def checksummed_shards(self) -> list[Path]:
        """The weight files that hold checksums of their own tensors."""
        return []

    def byte_ranges(self, names: Iterable[str]) -> list[ByteRange]:
        """Where the data of tensors is, to read it ahead; names as in `dense_infos`."""
        stored = [stored for name in names for stored in self._stored(name)]
        return self._byte_ranges([name for name in stored if name not in self._groups_in_order])

    def _byte_ranges(self, stored: list[str]) -> list[ByteRange]:
        return []

    def read_overhead(self, numel: int) -> int:
        """The most bytes that reading a tensor of `numel` values takes, the tensor included."""
        return 4 * numel

    def release(self) -> None:
        """Drop what is mapped or cached; call it after each decoder layer."""
        return

    # ---- tensors as a dense model has them

    @cached_property
    def dense_infos(self) -> Mapping[str, TensorInfo]:
        """What `dense` reads: `infos`, and the float32 weight [out, in] of each quantized linear."""
        infos = dict(self.infos)
        for linear, format in self.quantized.items():
            words = infos[f"{linear}.qweight"]
            shape = (words.shape[1], words.shape[0] * 32 // format.bits)
            infos[f"{linear}.weight"] = TensorInfo(shape, "float32", words.file)
        return infos

    def dense(self, name: str, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        """As `read`; the weight of a quantized linear is dequantized whole, then cut.

        Raises SourceError, too, for parts whose shape or dtype is not that of the linear's format.
        """
        if self._stored(name) == [name]:
            return self.read(name, rows)
        weight = self._dequantized(name.removesuffix(".weight"))
        return weight if rows is None else weight[rows]

    def _stored(self, name: str) -> list[str]:
        """The stored tensors that `dense(name)` reads."""
        linear = self.packed_name(name)
        return [name] if linear is None else [f"{linear}.{part}" for part in QUANT_PARTS]

    def packed_name(self, dense: str) -> str | None:
        """The quantized linear whose weight a name of `dense_infos` is; None for a tensor that is stored."""
        linear = dense.removesuffix(".weight")
        return linear if linear != dense and linear in self.quantized else None

    def packed(self, linear: str) -> PackedWeight:
        """The tensors of a quantized linear, read and not checked; without its bias."""
        parts = (self.read(f"{linear}.{part}") for part in QUANT_PARTS)
        return PackedWeight(self.quantized[linear], *parts)

    def _dequantized(self, linear: str) -> torch.Tensor:
        packed = self.packed(linear)
        assert self.format is not None
        for fault in examine(linear, packed, self.format).faults:
            raise fault.error()
        return dequantize(packed)

    # ---- names

    def resolve(self, expected: Iterable[str]) -> dict[str, str]:
        """Map a model's state-dict names to names of `dense_infos` (see `resolve_names`).

        Raises SourceError naming the first tensor that is missing.
        """
        return resolve_names(self.dense_infos, expected)

    def same_values(self, one: str, other: str) -> bool:
        """Whether two stored tensors have the same bytes; compares 16 MiB at a time."""
        first, second = self.infos[one], self.infos[other]
        if one == other:
            return True
        if first.shape != second.shape or first.dtype != second.dtype or len(first.shape) != 2:
            return False
        row_bytes = max(1, first.nbytes // max(1, first.shape[0]))
        step = max(1, _COMPARE_BYTES // row_bytes)
        for start in range(0, first.shape[0], step):
            rows = slice(start, start + step)
            # As bytes: a NaN equals itself, and -0 differs from 0.
            read = [self.read(name, rows).view(torch.uint8) for name in (one, other)]
            if not torch.equal(*read):
                return False
        return True

    def head_is_tied(self, embedding_name: str, head_name: str) -> bool:
        """Whether the output head is the input embedding: not stored, or stored with the same bytes.

        Takes stored names. Raises SourceError when the embedding is missing, or the head is although the
        config does not tie it.
        """
        embedding, head = self.infos.get(embedding_name), self.infos.get(head_name)
        if embedding is None:
            raise SourceError(f"{self.display} holds no tensor {embedding_name!r}")
        if head is None:
            if self.config().tie_word_embeddings is False:
                raise SourceError(
                    f"{self.display} holds no tensor {head_name!r}, and its config does not tie the head",
                    "Use a checkpoint of the whole language model",
                )
            return True
        return self.same_values(embedding_name, head_name)

    # ---- config, tokenizer and the files beside the weights

    @property
    def config_json(self) -> Mapping[str, Any]:
        """The object in config.json, read once and checked; of a GGUF the config that its keys make."""
        return self._config_json

    def config(self) -> PretrainedConfig:
        """A new transformers config, without a `quantization_config`.

        Raises SourceError in one line when transformers cannot make one.
        """
        return copy.deepcopy(self._config)

    @cached_property
    def _config(self) -> PretrainedConfig:
        return model_config(self.path, self._config_json)

    def generation_config(self) -> dict[str, Any]:
        """The object in generation_config.json; empty without that file."""
        file = self.path / "generation_config.json"
        return read_json(file) if file.is_file() else {}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer. Raises SourceError if its files are missing or unusable."""
        return read_folder_tokenizer(self.path)

    def side_files(self) -> list[Path]:
        """Tokenizer, template, generation and licence files that belong to a copy of this model.

        Plain files of the folder only: no weights, no code, no link that leads out of the folder (links of
        the hub cache into its blobs are followed).
        """
        return self._files(TOKENIZER_PATTERNS + SETTINGS_PATTERNS + LICENCE_PATTERNS)

    def license_name(self) -> str | None:
        """The licence that the model card's front matter names, or None."""
        card = self.path / "README.md"
        return None if leads_outside(card) else license_of_card(card)

    def _files(self, patterns: tuple[str, ...]) -> list[Path]:
        found = []
        for path in sorted(self.path.iterdir()):
            if path.suffix.lower() in CODE_SUFFIXES + WEIGHT_SUFFIXES or not path.is_file():
                continue
            if any(fnmatchcase(path.name, pattern) for pattern in patterns) and not leads_outside(path):
                found.append(path)
        return found

    # ---- identity

    def fingerprint(self) -> str:
        """A sha256 that changes with the source; cheap at any size.

        Covers the kind of files, config.json, the side files, which shard holds which tensor, and each
        shard's name, size, header and a sample of its bytes. The folder's name and times do not matter.
        """
        digest = hashlib.sha256()
        update_with_bytes(digest, "kind", self._kind.encode())
        try:
            for path in self._described_by() + self.side_files() + template_files(self.path):
                update_with_bytes(digest, path.name, path.read_bytes())
            for name in sorted(self.infos):
                update_with_bytes(digest, name, repr(self.infos[name]).encode())
            for path, header in self.shards():
                update_with_bytes(digest, path.name, header)
                update_with_sample(digest, path)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error}") from error
        return digest.hexdigest()

    def _described_by(self) -> list[Path]:
        """Files beside the weights that the config comes from."""
        files = ("config.json", *QUANTIZATION_FILES)
        return [self.path / name for name in files if (self.path / name).is_file()]

    def _check_read(self, name: str, rows: slice | torch.Tensor | None) -> TensorInfo:
        """The info of a tensor that may be read so: see `read`. ValueError for rows of what is not 2-D."""
        info = self.infos[name]
        linear, _, part = name.rpartition(".")
        packed = part in QUANT_PARTS and linear in self.quantized
        if len(info.shape) == 2 and info.dtype not in FLOATS and not packed:
            raise SourceError(
                f"{info.file}: tensor {name!r} is {info.dtype}, not float32, float16 or bfloat16",
                "Convert the 16-bit original instead",
            )
        if rows is not None and len(info.shape) != 2:
            raise ValueError(f"rows of {name!r}, which has shape {info.shape}")
        return info


def _g_idx_info(infos: Mapping[str, TensorInfo], name: str, bits: int) -> TensorInfo:
    """What a g_idx that is not stored would be."""
    words = infos[name.removesuffix("g_idx") + "qweight"]
    return TensorInfo((words.shape[0] * 32 // bits,), "int32", words.file)
