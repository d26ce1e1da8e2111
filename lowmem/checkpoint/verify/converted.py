"""Verify a checkpoint of safetensors files, one tensor at a time: `lowmem verify DIR`.

Compares digests with the manifest, the index with the shards' headers, and every tensor that the model needs
with its expected name, shape, dtype and values. All problems are collected, not only the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowmem.checkpoint.dequantize import PackedWeight
from lowmem.checkpoint.files.links import check_folder
from lowmem.checkpoint.files.shards import INDEX_FILE, SINGLE_FILE, Shards, read_shards
from lowmem.checkpoint.foreign import refuse_foreign
from lowmem.checkpoint.formats import QUANT_PARTS, LinearFormat, QuantizationFormat
from lowmem.checkpoint.headers.folder import read_config_json, tensor_headers
from lowmem.checkpoint.manifest import MANIFEST_FILE, checkpoint_files, find_quantization
from lowmem.checkpoint.packed_headers import packed_linears
from lowmem.checkpoint.packed_values import groups_in_order
from lowmem.checkpoint.packing import stored_shapes
from lowmem.checkpoint.source.base import FLOATS
from lowmem.checkpoint.source.fitted import fitted
from lowmem.checkpoint.source.model_tensors import integer_buffers, meta_model, misfit, unique_tensors
from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.values import all_finite
from lowmem.checkpoint.verify.digests import known_digests
from lowmem.checkpoint.verify.report import Progress, Verification, VerifyReport
from lowmem.checkpoint.verify.source import verify_source
from lowmem.errors import ForeignError, LowmemError, VerifyError

# Tensors of old checkpoints that current models compute: masks and rotary tables.
_LEGACY = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def verify(folder: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Check the checkpoint in `folder`; problems are in the report, none is raised.

    Without a manifest, files are compared with the hub's digests where these are known, and the notes say so.
    Pickle shards and GGUF files are checked by `verify_source`. Raises VerifyError only when there is nothing
    to check, and ForeignError for a checkpoint in a format that lowmem does not read.
    """
    folder = Path(folder)
    if not folder.is_dir() and not (folder.is_file() and folder.suffix in (".gguf", ".safetensors")):
        raise VerifyError(f"{folder} is not a folder", "Give the folder that lowmem convert wrote")
    if folder.is_dir():
        check_folder(folder)
    if folder.is_file() or not (folder / MANIFEST_FILE).is_file():
        _refuse_foreign(folder)
    whole = (SINGLE_FILE, INDEX_FILE, MANIFEST_FILE)
    if folder.is_file() or (not any((folder / name).is_file() for name in whole) and _other_weights(folder)):
        return verify_source(folder, progress)
    if not (folder / MANIFEST_FILE).is_file() and _needs_fitting(folder):
        return verify_source(folder, progress)
    return _ConvertedVerification(folder, progress).run()


def _refuse_foreign(path: Path) -> None:
    """Raise ForeignError for a checkpoint that lowmem does not read; any other fault is reported later."""
    try:
        refuse_foreign(path, read_config_json(path))
        headers, format = tensor_headers(path), find_quantization(path)
        if format is None:
            packed_linears(headers, None)
    except ForeignError:
        raise
    except LowmemError:
        return


def _needs_fitting(folder: Path) -> bool:
    """Whether transformers renames or merges the tensors of a whole checkpoint, or unties its head."""
    try:
        source = open_source(folder, offline=True)
        return fitted(source) is not source
    except LowmemError:  # the verification names every problem, not only the first
        return False


def _other_weights(folder: Path) -> bool:
    """Whether the folder holds weights of another layout."""
    return any(path.suffix in (".bin", ".gguf", ".safetensors") for path in folder.iterdir())


class _ConvertedVerification(Verification):
    def __init__(self, folder: Path, progress: Progress | None) -> None:
        super().__init__(folder, checkpoint_files(folder), progress)
        self.ours = (folder / MANIFEST_FILE).is_file()

    def run(self) -> VerifyReport:
        shards = read_shards(self.folder)
        self.problems += shards.problems
        self.total = shards.nbytes + (self.size_of(self.names) if self.ours else 0)
        self._digests(self.names)
        format, linears = self._model(shards)
        return self.report(len(shards.tensors), linears, format, self.ours)

    def _digests(self, names: list[str]) -> None:
        try:
            digests = known_digests(self.folder)
        except VerifyError as error:
            return self.fault(MANIFEST_FILE, "", error.message)
        if not digests.ours:
            self.notes.append(digests.note(names))
            names = [name for name in names if name in digests.files]
            self.total += self.size_of(names)
        known = {problem.file for problem in self.problems if "missing" in problem.what}
        for name in sorted(set(digests.files) | set(names)):
            if name not in names:
                if name not in known:
                    self.fault(name, "", "the file is missing")
            elif name not in digests.files:
                self.fault(name, "", f"the file is not listed in {MANIFEST_FILE}")
            else:
                self.compare(digests, [name])
        return None

    def _model(self, shards: Shards) -> tuple[QuantizationFormat | None, int]:
        """Check the tensors against the model of config.json; the format, and how many linears are packed."""
        from torch import nn

        format: QuantizationFormat | None = None
        try:
            format = find_quantization(self.folder)
        except LowmemError as error:
            self.fault("config.json", "", error.message)
        if format is None:
            self.notes.append("config.json has no usable quantization_config")
        try:
            model = meta_model(self.folder)
        except VerifyError as error:
            self.fault("config.json", "", error.message.removeprefix("config.json "))
            return format, 0
        unclaimed = set(shards.tensors)
        linears = 0
        dense = dict(unique_tensors(model))
        integers = integer_buffers(model)
        for name, module in model.named_modules():
            parts = [f"{name}.{part}" for part in QUANT_PARTS]
            if isinstance(module, nn.Linear) and any(self._expected_name(shards, part) for part in parts):
                linears += 1
                unclaimed.difference_update(parts)
                dense.pop(f"{name}.weight", None)
                if format is None:
                    self.fault(
                        shards.promised.get(parts[0], ""),
                        name,
                        "is packed, and there is no quantization_config",
                    )
                elif (own := format.of(name)) is None:
                    what = "is packed, but quantization_config excludes it (dynamic)"
                    self.fault(shards.promised.get(parts[0], ""), name, what)
                else:
                    self._linear(shards, name, module, own, format)
        for name, (aliases, shape) in dense.items():
            stored = [alias for alias in aliases if alias in shards.tensors]
            unclaimed.difference_update(stored)
            if not stored and not any(self._lost(shards, alias) for alias in aliases):
                self.fault(shards.promised.get(name, ""), name, "the tensor is missing")
            for alias in stored:
                self._dense(shards, alias, shape, name in integers)
        if format is not None and not linears and shards.tensors:
            self.fault("config.json", "", "declares a quantized model, but no tensor is quantized")
        self._unclaimed(shards, unclaimed)
        return format, linears

    def _expected_name(self, shards: Shards, name: str) -> bool:
        return name in shards.tensors or name in shards.promised

    def _lost(self, shards: Shards, name: str) -> bool:
        """The tensor is missing and already reported, alone or with its file."""
        return name in shards.promised and name not in shards.tensors

    def _linear(
        self, shards: Shards, name: str, module: Any, own: LinearFormat, format: QuantizationFormat
    ) -> None:
        """Check the tensors of a packed linear; its bias is a dense tensor."""
        headers = {
            part: shards.header(f"{name}.{part}")
            for part in QUANT_PARTS
            if f"{name}.{part}" in shards.tensors
        }
        file = next((header.file for header in headers.values()), "")
        try:
            shapes = stored_shapes(module.in_features, module.out_features, own.bits, own.group_size)
        except ValueError as error:
            return self.fault(file, name, f"cannot be packed to {own.bits} bits: {error}")
        values: dict[str, torch.Tensor] = {}
        for part in QUANT_PARTS:
            tensor, header, shape = f"{name}.{part}", headers.get(part), tuple(getattr(shapes, part))
            if header is None:
                in_order = not own.desc_act or shapes.groups == 1
                if part == "g_idx" and in_order and not self.ours:  # some tools omit it
                    values[part] = groups_in_order(module.in_features, own.group_size)
                elif not self._lost(shards, tensor):
                    self.fault(file, tensor, "the tensor is missing")
            elif header.shape != shape:
                self.fault(
                    header.file,
                    tensor,
                    f"has shape {list(header.shape)}; {own.bits} bits in groups of {own.group_size} "
                    f"of {module.in_features} to {module.out_features} need {list(shape)}",
                )
            elif header.dtype not in (FLOATS if part == "scales" else ("int32",)):
                self.fault(header.file, tensor, f"has dtype {header.dtype}")
            elif (found := self._read(shards, tensor)) is not None:
                values[part] = found
        if len(values) == len(QUANT_PARTS):
            packed = PackedWeight(own, *(values[part] for part in QUANT_PARTS))
            self.packed_values(name, packed, format, lambda tensor: shards.tensors[tensor].path.name)
        return None

    def _dense(self, shards: Shards, name: str, shape: tuple[int, ...], integers: bool) -> None:
        stored, file = shards.stored(name), shards.tensors[name].path.name
        if what := misfit(stored.shape, stored.dtype, shape, integers=integers):
            self.fault(file, name, what)
            return
        values = self._read(shards, name)
        if values is not None and not all_finite(values):
            self.fault(file, name, "has values that are not finite")

    def _read(self, shards: Shards, name: str) -> torch.Tensor | None:
        try:
            values = shards.read(name)
        except LowmemError as error:
            self.fault(shards.tensors[name].path.name, name, error.message)
            return None
        self.advance(values.nbytes)
        return values

    def _unclaimed(self, shards: Shards, names: set[str]) -> None:
        """Report tensors that the model does not have: a problem in lowmem's checkpoints, else a note."""
        for name in sorted(names):
            packed = name.rpartition(".")[2] in QUANT_PARTS
            if packed or (self.ours and not name.endswith(_LEGACY)):
                self.fault(shards.tensors[name].path.name, name, "is not a tensor of this model")
            else:
                self.notes.append(f"{name} is not a tensor of this model, and is not used")
