"""Is a checkpoint whole? What `lowmem verify DIR` checks, one tensor at a time.

Digests against the manifest, the index against the shards' headers, every tensor that the model needs
against its name, shape, dtype and values. Every problem is collected, not only the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem.checkpoint.files.links import check_folder
from lowmem.checkpoint.files.shards import INDEX_FILE, SINGLE_FILE, Problem, Shards, read_shards
from lowmem.checkpoint.formats import LinearFormat, QuantizationFormat
from lowmem.checkpoint.headers.model_tensors import (
    QUANT_PARTS,
    integer_buffers,
    meta_model,
    misfit,
    unique_tensors,
)
from lowmem.checkpoint.manifest import MANIFEST_FILE, checkpoint_files, find_quantization
from lowmem.checkpoint.packing import stored_shapes, unpack_zeros
from lowmem.checkpoint.values import all_finite
from lowmem.checkpoint.verify.digests import difference, known_digests
from lowmem.errors import LowmemError, VerifyError

# Tensors of old checkpoints that no current model has: masks and rotary tables, computed since.
_LEGACY = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and what was found.

    ours: there is a manifest, so that all files were compared. format: of packed linears, or None. bytes: of
    all files that were read. notes: what is worth knowing and no damage.
    """

    folder: Path
    ours: bool
    format: QuantizationFormat | None
    files: int
    tensors: int
    linears: int
    bytes: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def check(self) -> None:
        """Raises VerifyError, naming the first problem's file and tensor and how many more there are."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise VerifyError(f"{self.problems[0]}{more}", "Convert it again, or download it again")


def verify(folder: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Check the checkpoint in `folder`; problems are in the report, nothing is raised for them.

    A checkpoint without our manifest is somebody else's: digests are compared where the hub's are known, and
    the notes say so. Folders of pickle shards and GGUF files are checked by verify_source.py. Raises
    VerifyError only when there is nothing to check.
    """
    folder = Path(folder)
    if not folder.is_dir() and not (folder.is_file() and folder.suffix in (".gguf", ".safetensors")):
        raise VerifyError(f"{folder} is not a folder", "Give the folder that lowmem convert wrote")
    if folder.is_dir():
        check_folder(folder)
    whole = (SINGLE_FILE, INDEX_FILE, MANIFEST_FILE)
    if folder.is_file() or (not any((folder / name).is_file() for name in whole) and _other_weights(folder)):
        from lowmem.checkpoint.verify.source import verify_source

        return verify_source(folder, progress)
    return _Verification(folder, progress).run()


def _other_weights(folder: Path) -> bool:
    """Whether there are weights, but not in our kind of files."""
    return any(path.suffix in (".bin", ".gguf", ".safetensors") for path in folder.iterdir())


class _Verification:
    """One run of `verify`: what it has found so far, and how far it is."""

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        self.folder = folder
        self.progress = progress
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.done = self.total = 0
        self.ours = (folder / MANIFEST_FILE).is_file()

    def run(self) -> VerifyReport:
        names = checkpoint_files(self.folder)
        shards = read_shards(self.folder)
        self.problems += shards.problems
        self.total = shards.nbytes + (self._sizes(names) if self.ours else 0)
        self._digests(names)
        format, linears = self._model(shards)
        return VerifyReport(
            folder=self.folder,
            ours=self.ours,
            format=format,
            files=len(names),
            tensors=len(shards.tensors),
            linears=linears,
            bytes=self._sizes(names),
            problems=tuple(self.problems),
            notes=tuple(self.notes),
        )

    def _sizes(self, names: list[str]) -> int:
        return sum((self.folder / name).stat().st_size for name in names)

    def _advance(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)

    def _fault(self, file: str, tensor: str, what: str) -> None:
        self.problems.append(Problem(file, tensor, what))

    def _digests(self, names: list[str]) -> None:
        try:
            digests = known_digests(self.folder)
        except VerifyError as error:
            return self._fault(MANIFEST_FILE, "", error.message)
        if not digests.ours:
            self.notes.append(digests.note(names))
            names = [name for name in names if name in digests.files]
            self.total += self._sizes(names)
        known = {problem.file for problem in self.problems if "missing" in problem.what}
        for name in sorted(set(digests.files) | set(names)):
            if name not in names:
                if name not in known:
                    self._fault(name, "", "the file is missing")
            elif name not in digests.files:
                self._fault(name, "", f"the file is not listed in {MANIFEST_FILE}")
            elif fault := difference(self.folder / name, digests.files[name], digests.origin, self._advance):
                self._fault(name, "", fault)
        return None

    def _model(self, shards: Shards) -> tuple[QuantizationFormat | None, int]:
        """Check the tensors against the model of config.json; the format, and how many linears are packed."""
        from torch import nn

        format: QuantizationFormat | None = None
        try:
            format = find_quantization(self.folder)
        except LowmemError as error:
            self._fault("config.json", "", error.message)
        if format is None:
            self.notes.append("config.json has no usable quantization_config")
        try:
            model = meta_model(self.folder)
        except VerifyError as error:
            self._fault("config.json", "", error.message.removeprefix("config.json "))
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
                    self._fault(shards.promised.get(parts[0], ""), name, "is packed, and nothing says how")
                elif (own := format.of(name)) is None:
                    what = "is packed, but quantization_config excludes it (dynamic)"
                    self._fault(shards.promised.get(parts[0], ""), name, what)
                else:
                    self._linear(shards, name, module, own)
        for name, (aliases, shape) in dense.items():
            stored = [alias for alias in aliases if alias in shards.tensors]
            unclaimed.difference_update(stored)
            if not stored and not any(self._lost(shards, alias) for alias in aliases):
                self._fault(shards.promised.get(name, ""), name, "the tensor is missing")
            for alias in stored:
                self._dense(shards, alias, shape, name in integers)
        if format is not None and not linears and shards.tensors:
            self._fault("config.json", "", "says that the model is quantized, and no tensor is")
        self._unclaimed(shards, unclaimed)
        return format, linears

    def _expected_name(self, shards: Shards, name: str) -> bool:
        return name in shards.tensors or name in shards.promised

    def _lost(self, shards: Shards, name: str) -> bool:
        """The tensor is missing with its file, or from it, which is reported already."""
        return name in shards.promised and name not in shards.tensors

    def _linear(self, shards: Shards, name: str, module: Any, format: LinearFormat) -> None:
        """The four tensors of a packed linear (its bias is one of the dense tensors)."""
        file = next(
            (shards.tensors[f"{name}.{p}"].path.name for p in QUANT_PARTS if f"{name}.{p}" in shards.tensors),
            "",
        )
        try:
            shapes = stored_shapes(module.in_features, module.out_features, format.bits, format.group_size)
        except ValueError as error:
            return self._fault(file, name, f"cannot be of {format.bits} bits: {error}")
        for part in QUANT_PARTS:
            tensor = f"{name}.{part}"
            if tensor not in shards.tensors:
                if not self._lost(shards, tensor):
                    self._fault(file, tensor, "the tensor is missing")
                continue
            stored, shape = shards.stored(tensor), tuple(getattr(shapes, part))
            right = stored.dtype.is_floating_point if part == "scales" else stored.dtype is torch.int32
            if stored.shape != shape:
                self._fault(
                    shards.tensors[tensor].path.name,
                    tensor,
                    f"has shape {list(stored.shape)}; {format.bits} bits in groups of {format.group_size} "
                    f"of {module.in_features} to {module.out_features} need {list(shape)}",
                )
            elif not right:
                self._fault(shards.tensors[tensor].path.name, tensor, f"has dtype {stored.dtype}")
            else:
                self._packed_values(shards, tensor, part, format, module.in_features)
        return None

    def _packed_values(
        self, shards: Shards, tensor: str, part: str, format: LinearFormat, columns: int
    ) -> None:
        """Values of a packed tensor of the right shape; any word of a qweight is valid."""
        file = shards.tensors[tensor].path.name
        values = self._read(shards, tensor)
        if values is None or part == "qweight":
            return
        if part == "scales":
            if not all_finite(values):
                self._fault(file, tensor, "has values that are not finite")
        elif part == "g_idx":
            groups = 1 if format.group_size == -1 else -(-columns // format.group_size)
            low, high = int(values.min()), int(values.max())
            expected = torch.arange(columns) // (columns if format.group_size == -1 else format.group_size)
            if low < 0 or high >= groups:
                self._fault(file, tensor, f"names groups {low} to {high}, there are 0 to {groups - 1}")
            elif not format.desc_act and not torch.equal(values.long(), expected):
                self._fault(file, tensor, "has groups out of order, and desc_act is false")
        elif part == "qzeros" and not format.zeros_v2:
            full = unpack_zeros(values, format.bits, v2=True) == 2**format.bits - 1
            if bool(full.any()):
                what = "has zero-points that readers of the format disagree about (stored as all ones)"
                if self.ours:
                    self._fault(file, tensor, what)
                else:
                    self.notes.append(f"{tensor} {what}")

    def _dense(self, shards: Shards, name: str, shape: tuple[int, ...], integers: bool) -> None:
        stored, file = shards.stored(name), shards.tensors[name].path.name
        if what := misfit(stored.shape, stored.dtype, shape, integers=integers):
            self._fault(file, name, what)
            return
        values = self._read(shards, name)
        if values is not None and not all_finite(values):
            self._fault(file, name, "has values that are not finite")

    def _read(self, shards: Shards, name: str) -> torch.Tensor | None:
        try:
            values = shards.read(name)
        except LowmemError as error:
            self._fault(shards.tensors[name].path.name, name, error.message)
            return None
        self._advance(values.nbytes)
        return values

    def _unclaimed(self, shards: Shards, names: set[str]) -> None:
        """Tensors that are no part of the model: damage in a checkpoint of ours, maybe age in another's."""
        for name in sorted(names):
            packed = name.rpartition(".")[2] in QUANT_PARTS
            if packed or (self.ours and not name.endswith(_LEGACY)):
                self._fault(shards.tensors[name].path.name, name, "is no tensor of this model")
            else:
                self.notes.append(f"{name} is no tensor of this model, and is not used")
