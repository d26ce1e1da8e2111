"""Verify a checkpoint that lowmem did not write: pickle shards, a GGUF, other tools' safetensors files.

A pickle shard is a zip, which holds a checksum of every tensor's bytes; files are compared with the hub's
digests where these are known. Then names, shapes and values of every tensor that the model needs are checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from lowmem.checkpoint.formats import QUANT_PARTS
from lowmem.checkpoint.manifest import checkpoint_files
from lowmem.checkpoint.source.fitted import fitted
from lowmem.checkpoint.source.model_tensors import expected_shapes, integer_buffers, misfit, model_of
from lowmem.checkpoint.source.open import Source, open_source
from lowmem.checkpoint.values import all_finite
from lowmem.checkpoint.verify.bin_checksums import checksum_faults
from lowmem.checkpoint.verify.digests import known_digests
from lowmem.checkpoint.verify.report import Progress, Verification, VerifyReport
from lowmem.errors import LowmemError

_SLICE_VALUES = 1 << 24
"""Values of a tensor that are read at a time."""
_LISTED = 3
"""Unused tensors that are named one by one; old checkpoints hold two masks for each layer."""


def verify_source(path: Path, progress: Progress | None = None) -> VerifyReport:
    """Check a folder's weights, or a weight file; problems are in the report, none is raised."""
    folder = path if path.is_dir() else path.parent
    run = _SourceVerification(folder, checkpoint_files(path) if path.is_dir() else [path.name], progress)
    tensors = linears = 0
    format = None
    try:
        source = open_source(path, offline=True)
        tensors, linears, format = len(source.infos), len(source.quantized), source.format
        run.check(source)
    except LowmemError as error:
        run.fault("", "", error.message)
    return run.report(tensors, linears, format)


class _SourceVerification(Verification):
    def check(self, source: Source) -> None:
        """Digests, checksums, then names, shapes and values. Raises LowmemError."""
        digests = known_digests(self.folder)
        listed = sorted(name for name in self.names if name in digests.files)
        shards = source.checksummed_shards()
        tensors = sum(info.nbytes for info in source.infos.values())
        self.total = self.size_of(listed) + sum(shard.stat().st_size for shard in shards) + tensors
        self.notes.append(digests.note(self.names))
        self.compare(digests, listed)
        for shard in shards:
            for tensor, what in checksum_faults(shard, self.advance):
                self.fault(shard.name, tensor, what)
        self._tensors(source)

    def _tensors(self, source: Source) -> None:
        """Compare the tensors that the model of the config needs with the stored ones."""
        model = model_of(source.config())
        source = fitted(source, model)
        self.notes += source.notes
        if source.untied:
            model = model_of(source.config())
        integers = integer_buffers(model)
        shapes = expected_shapes(model, source.infos)
        names = source.resolve(shapes)
        infos = source.dense_infos
        for name, stored in sorted(names.items(), key=lambda item: (infos[item[1]].file, item[1])):
            info = infos[stored]
            dtype = getattr(torch, info.dtype)
            packed = source.packed_name(stored)
            if what := misfit(info.shape, dtype, shapes[name], integers=name in integers):
                self.fault(info.file, stored, what)
            elif packed is not None:
                self._packed(source, packed)
            elif not all(all_finite(part) for part in self._parts(source, stored)):
                self.fault(info.file, stored, "has values that are not finite")
        source.release()
        parts = {f"{linear}.{part}" for linear in source.quantized for part in QUANT_PARTS}
        own, others = model.state_dict(), []
        for name in sorted(set(source.infos) - set(names.values()) - parts):
            if name in own:  # `fitted` found the same values under the other name
                self.notes.append(f"{name} is stored twice: it is tied to another tensor with its values")
            else:
                others.append(name)
        if len(others) > _LISTED:
            some = ", ".join(others[:_LISTED])
            self.notes.append(
                f"{len(others)} tensors are not of this model, and are not used, such as {some}"
            )
        else:
            self.notes += [f"{name} is not a tensor of this model, and is not used" for name in others]

    def _packed(self, source: Source, linear: str) -> None:
        """Check the values of a packed linear."""
        assert source.format is not None
        self.advance(sum(source.infos[f"{linear}.{part}"].nbytes for part in QUANT_PARTS))
        packed = source.packed(linear)
        self.packed_values(linear, packed, source.format, lambda tensor: source.infos[tensor].file)

    def _parts(self, source: Source, name: str) -> Iterator[torch.Tensor]:
        """A tensor, some rows at a time where a source reads rows."""
        info = source.infos[name]
        sliced = len(info.shape) == 2 and source.reads_rows and info.numel > _SLICE_VALUES
        step = max(1, _SLICE_VALUES // info.shape[1]) if sliced else 1
        for rows in (slice(i, i + step) for i in range(0, info.shape[0], step)) if sliced else (None,):
            part = source.read(name, rows)
            self.advance(part.nbytes)
            yield part
