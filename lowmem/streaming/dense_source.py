"""Any checkpoint on this machine as a source of dense tensors, a quantized one too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowmem.checkpoint.files.reading import one_line
from lowmem.checkpoint.files.shards import read_shards
from lowmem.checkpoint.formats import QuantizationFormat
from lowmem.checkpoint.manifest import find_quantization
from lowmem.checkpoint.source.base import FLOATS
from lowmem.checkpoint.source.open import Source, TensorInfo, open_source
from lowmem.checkpoint.source.safetensors import SafetensorsHeader, SafetensorsSource, read_tensor
from lowmem.errors import SourceError
from lowmem.kernels.quant_linear import QuantLinear

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqSource(SafetensorsSource):
    """A GPTQ folder of any maker, read as if it were dense: `x.weight` is dequantized from its parts.

    A dequantized weight is float32 [out, in], the numbers that the packed integers stand for. Raises
    SourceError for shards that are not whole, and for parts that are not of the format's shapes and dtypes.
    """

    def __init__(self, path: Path, display: str, format: QuantizationFormat) -> None:
        shards = read_shards(path)
        if shards.problems:
            raise SourceError(
                f"{path}: {shards.problems[0]}", "See all that is wrong with: lowmem verify DIR"
            )
        if (path / "adapter_config.json").is_file():
            raise SourceError(f"{path} holds an adapter, not a model", "Give the folder of the whole model")
        headers: dict[str, SafetensorsHeader] = dict(shards.tensors)
        super().__init__(path, display, headers)
        self.format = format
        infos = dict(self.infos)
        self._packed = {name.removesuffix(".qweight") for name in infos if name.endswith(".qweight")}
        for base in self._packed:
            words = infos[f"{base}.qweight"]
            if len(words.shape) != 2 or words.dtype != "int32":
                raise SourceError(f"{words.file}: tensor {base}.qweight is no matrix of int32 words")
            shape = (words.shape[1], words.shape[0] * 32 // format.of_packed(base).bits)
            infos[f"{base}.weight"] = TensorInfo(shape, "float32", words.file)
        if not self._packed:
            raise SourceError(f"{path} says that it is quantized, and no tensor is", "Convert it again")
        self.infos: Mapping[str, TensorInfo] = infos

    def config(self) -> Any:
        """The model's config without its quantization_config, which is this class's to act on."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the values are anyone's, and each config class fails its own way
            raise SourceError(
                f"{self.path / 'config.json'} is not a usable config: {one_line(error)}"
            ) from error
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def read(self, name: str, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        """See Source.read; a packed linear's weight is dequantized whole, and then cut."""
        base = name.removesuffix(".weight")
        if base not in self._packed or base == name:
            return super().read(name, rows)
        weight = self._dequantized(base)
        return weight if rows is None else weight[rows]

    def _dequantized(self, base: str) -> torch.Tensor:
        format = self.format.of_packed(base)
        out, inputs = self.infos[f"{base}.weight"].shape
        try:
            linear = QuantLinear(
                inputs,
                out,
                bits=format.bits,
                group_size=format.group_size,
                bias=False,
                zeros_v2=format.zeros_v2,
                device="meta",
            )
        except ValueError as error:
            raise SourceError(f"{base}: {error}", "The quantization_config does not fit the model") from None
        for part in PARTS:
            name, expected = f"{base}.{part}", tuple(linear.get_buffer(part).shape)
            info = self.infos.get(name)
            if info is None:
                raise SourceError(f"the checkpoint holds no tensor {name!r}", "It is not whole")
            kinds = FLOATS if part == "scales" else ("int32",)
            if info.shape != expected or info.dtype not in kinds:
                raise SourceError(
                    f"{info.file}: tensor {name!r} is {info.dtype} of shape {list(info.shape)}, "
                    f"not {kinds[0]} of {list(expected)}",
                    "The quantization_config and the tensors do not belong together",
                )
            # Not through Source.read, which takes no integer matrix: in a source that is damage.
            header = self.headers[name]
            setattr(linear, part, read_tensor(header.path, name, header.tensors[name]))
        low, high = (int(edge) for edge in linear.g_idx.aminmax())
        if not 0 <= low <= high < linear.scales.shape[0]:
            raise SourceError(f"tensor {base}.g_idx names groups {low} to {high}, which are not there")
        return linear.dequantize()


def open_any(model: str | Path) -> Source:
    """Open a checkpoint on this machine, quantized or not; SourceError where it cannot be read."""
    path = Path(model).expanduser()
    format = find_quantization(path) if path.is_dir() else None
    return GptqSource(path, str(model), format) if format else open_source(str(model), offline=True)
