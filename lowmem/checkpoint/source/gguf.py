"""A GGUF file as a source, under the names and in the layouts of transformers' model.

Config, tokenizer, names and layouts (such as llama.cpp's permuted q and k rows) come from transformers' own
GGUF support, block formats from the `gguf` package; only the reading is ours.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowmem.checkpoint.files.reading import one_line, read_exact, row_numbers, runs
from lowmem.checkpoint.headers.config import MAX_COUNT
from lowmem.checkpoint.headers.gguf import GgufHeader, GgufTensor, check_whole_model, read_gguf_header
from lowmem.checkpoint.source.base import LICENCE_PATTERNS, ByteRange, Source, TensorInfo
from lowmem.checkpoint.source.read_tokenizer import read_tokenizer
from lowmem.errors import SourceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_KEPT = {"F16": torch.float16, "BF16": torch.bfloat16}
"""Types that keep their width; every other type of ggml is unpacked to float32."""
_PIECE_BYTES = 16 * 2**20
"""Stored rows are read and unpacked in pieces of about this much float32."""
_TABLES = ("token_embd.weight", "output.weight")
"""transformers does not change the layout of these, so that their rows can be read alone."""


class GgufSource(Source):
    """One GGUF file; `infos` has the state-dict names of transformers' model."""

    reads_rows = False
    _kind = "gguf"

    def __init__(self, file: Path, display: str) -> None:
        self.file = file
        self.header: GgufHeader = read_gguf_header(file)
        check_whole_model(self.header)
        self._gguf: dict[str, GgufTensor] = {}
        super().__init__(file.parent, display, {}, {})
        self._processor = self._make_processor()
        self.infos = self._map_names()

    @property
    def config_json(self) -> Mapping[str, Any]:
        """See Source.config_json."""
        found: dict[str, Any] = self.config().to_dict()
        return found

    @cached_property
    def _config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        layers = self.header.values.get(f"{self.header.values['general.architecture']}.block_count")
        if type(layers) is not int or not 0 < layers <= len(self.header.tensors):
            raise SourceError(
                f"{self.file.name} claims {layers} layers, with {len(self.header.tensors)} tensors"
            )
        for key, value in self.header.values.items():
            if key.endswith(("block_count", "expert_count")) and type(value) is int and value > MAX_COUNT:
                raise SourceError(f"{self.file.name}: {key!r} is {value}; the maximum is {MAX_COUNT}")
        try:
            config = AutoConfig.from_pretrained(
                self.path, gguf_file=self.file.name, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the keys are not trusted, and each config class fails in its own way
            raise self._not_a_model(error) from error
        return config  # type: ignore[no-any-return]

    def _not_a_model(self, error: Exception) -> SourceError:
        return SourceError(
            f"{self.file.name} cannot be read as a transformers model: {one_line(error)}",
            "Convert the original safetensors checkpoint instead",
        )

    def generation_config(self) -> dict[str, Any]:
        """See Source.generation_config: none, as the file has no such keys."""
        return {}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See Source.tokenizer: from the file's own keys."""
        return read_tokenizer(self.path, gguf_file=self.file.name)

    def side_files(self) -> list[Path]:
        """Licence files beside the file, if it is the folder's only model."""
        ggufs = [path for path in self.path.iterdir() if path.suffix == ".gguf"]
        return self._files(LICENCE_PATTERNS) if len(ggufs) <= 1 else []

    def license_name(self) -> str | None:
        """The licence of the file's own keys, else of the card beside it."""
        licence = self.header.values.get("general.license")
        if isinstance(licence, str) and licence.strip() and licence.isprintable():
            return licence.strip()[:100]
        return super().license_name()

    def shards(self) -> list[tuple[Path, bytes]]:
        """See Source.shards."""
        with self.file.open("rb") as stream:
            return [(self.file, stream.read(self.header.data_start))]

    def read_overhead(self, numel: int) -> int:
        """See Source.read_overhead; dequantizing makes float32 copies on the way."""
        return 16 * numel

    def _read(self, name: str, rows: slice | torch.Tensor | None) -> torch.Tensor:
        """See Source.read. Quantized blocks come as float32."""
        info, stored = self._check_read(name, rows), self._gguf[name]
        if rows is not None and stored.name in _TABLES and stored.shape == info.shape:
            numbers = row_numbers(rows, info.shape[0])
            return self._unpack(stored, numbers).to(getattr(torch, info.dtype))
        values = self._unpack(stored, range(stored.shape[0])).reshape(stored.shape)
        tensor = self._lay_out(stored, values)
        if tuple(tensor.shape) != info.shape:
            raise SourceError(
                f"{self.file.name}: tensor {stored.name!r} has shape {list(tensor.shape)}, the model's "
                f"{name} has {list(info.shape)}"
            )
        if rows is not None:
            tensor = tensor[torch.tensor(list(row_numbers(rows, info.shape[0])), dtype=torch.int64)]
        tensor = tensor.to(getattr(torch, info.dtype))
        # A permuted tensor is a copy already; one that numpy owns still needs torch's alignment.
        owned = tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
        return tensor if owned else tensor.clone(memory_format=torch.contiguous_format)

    def _byte_ranges(self, stored: list[str]) -> list[ByteRange]:
        return [ByteRange(self.file, self._gguf[name].begin, self._gguf[name].nbytes) for name in stored]

    def _described_by(self) -> list[Path]:
        return []

    def _unpack(self, stored: GgufTensor, numbers: range | list[int]) -> torch.Tensor:
        """Stored rows as float32 (rows of the first axis; for 1-D tensors of one element each)."""
        from gguf import GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType[stored.type_name]
        per_row = stored.shape[1:] if len(stored.shape) > 1 else ()
        if not per_row:  # 1-D: one row of all elements
            numbers, per_row, height = range(1), stored.shape, stored.nbytes
        else:
            height = stored.nbytes // stored.shape[0]
        width = int(np.prod(per_row, dtype=np.int64))
        out = torch.empty((len(numbers), width), dtype=torch.float32)
        most = max(1, _PIECE_BYTES // (4 * width))
        what = f"{self.file.name} (tensor {stored.name!r})"
        try:
            with self.file.open("rb", buffering=0) as stream:
                for position, first, count in runs(numbers):
                    for start in range(0, count, most):
                        rows = min(most, count - start)
                        packed = torch.empty(
                            (rows, height // stored.row_bytes, stored.row_bytes), dtype=torch.uint8
                        )
                        read_exact(stream, stored.begin + (first + start) * height, packed, what)
                        # Blocks never span rows, so unpacking in pieces gives the same bits.
                        values = dequantize(packed.reshape(-1, stored.row_bytes).numpy(), kind)
                        piece = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
                        out[position + start : position + start + rows] = piece.reshape(rows, width)
        except OSError as error:
            raise SourceError(f"{self.file} cannot be read: {error.strerror or error}") from error
        except NotImplementedError as error:
            raise SourceError(
                f"{self.file.name}: tensor {stored.name!r} is {stored.type_name}, which cannot be unpacked",
                "Use a GGUF of another quantization",
            ) from error
        return out

    def _lay_out(self, stored: GgufTensor, values: torch.Tensor) -> torch.Tensor:
        """Undo llama.cpp's changes of layout, with transformers' own functions."""
        parsed: dict[str, Any] = {"tensors": {}}
        try:
            result = self._processor.process(
                weights=values.numpy(), name=stored.name, tensor_key_mapping={}, parsed_parameters=parsed
            )
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise SourceError(
                f"{self.file.name}: tensor {stored.name!r} of shape {list(stored.shape)} does not fit "
                f"the model: {one_line(error)}"
            ) from error
        if result.name is None:  # the function put it where a whole-file load would collect it
            (tensor,) = parsed["tensors"].values()
            return tensor  # type: ignore[no-any-return]
        # Row permutations stay contiguous, transpositions do not; `read` copies those.
        return torch.from_numpy(np.asarray(result.weights))

    def _make_processor(self) -> Any:
        """transformers' layout functions for the file's architecture."""
        from transformers import modeling_gguf_pytorch_utils as gguf_utils

        architecture = str(self.header.values["general.architecture"])
        known = gguf_utils.GGUF_SUPPORTED_ARCHITECTURES
        if architecture not in known:
            raise SourceError(
                f"{self.file.name} is of architecture {architecture!r}, which transformers cannot read",
                "Convert the original safetensors checkpoint instead",
            )
        kind: Any = gguf_utils.TENSOR_PROCESSORS.get(architecture, gguf_utils.TensorProcessor)
        return kind(config=self.config().to_dict())

    def _map_names(self) -> dict[str, TensorInfo]:
        """The state-dict name, shape and dtype of every stored tensor that the model has."""
        from transformers import AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # for example of sizes of 0; problems are reported below
                auto: Any = AutoModelForCausalLM
                model = auto.from_config(self.config(), trust_remote_code=False)
            names: dict[str, str] = get_gguf_hf_weights_map(_Shallow(model), self._processor)
        except Exception as error:  # sizes that contradict each other fail anywhere in the model's code
            raise self._not_a_model(error) from error
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        infos: dict[str, TensorInfo] = {}
        for stored in self.header.tensors.values():
            name = names.get(stored.name)
            if name is None or name not in shapes:
                logging.getLogger(__name__).info("%s: %s is not the model's", self.file.name, stored.name)
                continue
            if name in infos:
                raise SourceError(
                    f"{self.file.name} merges several tensors in {name} (a mixture of experts)",
                    "Convert a model whose decoder layers are plain linears",
                )
            if int(np.prod(shapes[name], dtype=np.object_)) != int(np.prod(stored.shape, dtype=np.object_)):
                raise SourceError(
                    f"{self.file.name}: tensor {stored.name!r} has shape {list(stored.shape)}, the model's "
                    f"{name} has {list(shapes[name])}"
                )
            # Norms and biases are float32 whatever they are stored as: some architectures add to them.
            dtype = _KEPT.get(stored.type_name, torch.float32) if len(stored.shape) > 1 else torch.float32
            infos[name] = TensorInfo(shapes[name], str(dtype).removeprefix("torch."), self.file.name)
            self._gguf[name] = stored
        return infos


class _Shallow:
    """A model of two levels: itself and its base model, which llama.cpp's names may be relative to.

    transformers' mapping descends into every module and builds a table of names in each: for a
    30-layer model that is 400 tables and 7 s, of which the first two levels give every name.
    """

    def __init__(self, model: torch.nn.Module, depth: int = 1) -> None:
        self._model, self._depth = model, depth
        self.config = getattr(model, "config", None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._model.state_dict()

    def named_children(self) -> list[tuple[str, _Shallow]]:
        children = self._model.named_children() if self._depth else ()
        return [(name, _Shallow(child, self._depth - 1)) for name, child in children]
