"""Verify a checkpoint that lowmem did not write: pickle shards, a GGUF, single safetensors files.

A pickle shard is a zip, which holds a checksum of every tensor's bytes; files are compared with the hub's
digests where these are known. Then names, shapes and values of every tensor that the model needs are checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from lowmem.checkpoint.manifest import checkpoint_files
from lowmem.checkpoint.source.model_tensors import expected_shapes, integer_buffers, misfit, model_of
from lowmem.checkpoint.source.open import Source, open_source
from lowmem.checkpoint.values import all_finite
from lowmem.checkpoint.verify.bin_checksums import checksum_faults
from lowmem.checkpoint.verify.digests import known_digests
from lowmem.checkpoint.verify.report import Progress, Verification, VerifyReport
from lowmem.errors import LowmemError

_SLICE_VALUES = 1 << 24
"""Values of a tensor that are read at a time."""


def verify_source(path: Path, progress: Progress | None = None) -> VerifyReport:
    """Check a folder's weights, or a weight file; problems are in the report, none is raised."""
    folder = path if path.is_dir() else path.parent
    run = _SourceVerification(folder, checkpoint_files(path) if path.is_dir() else [path.name], progress)
    tensors = 0
    try:
        source = open_source(path, offline=True, quantized=False)
        tensors = len(source.infos)
        run.check(source)
    except LowmemError as error:
        run.fault("", "", error.message)
    return run.report(tensors)


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
        integers = integer_buffers(model)
        shapes = expected_shapes(model, source.infos)
        names = source.resolve(shapes)
        for name, stored in sorted(names.items(), key=lambda item: (source.infos[item[1]].file, item[1])):
            info = source.infos[stored]
            dtype = getattr(torch, info.dtype)
            if what := misfit(info.shape, dtype, shapes[name], integers=name in integers):
                self.fault(info.file, stored, what)
            elif not all(all_finite(part) for part in self._parts(source, stored)):
                self.fault(info.file, stored, "has values that are not finite")
        source.release()
        for name in sorted(set(source.infos) - set(names.values())):
            self.notes.append(f"{name} is not a tensor of this model, and is not used")

    def _parts(self, source: Source, name: str) -> Iterator[torch.Tensor]:
        """A tensor, some rows at a time where a source reads rows."""
        info = source.infos[name]
        sliced = len(info.shape) == 2 and source.reads_rows and info.numel > _SLICE_VALUES
        step = max(1, _SLICE_VALUES // info.shape[1]) if sliced else 1
        for rows in (slice(i, i + step) for i in range(0, info.shape[0], step)) if sliced else (None,):
            part = source.read(name, rows)
            self.advance(part.nbytes)
            yield part
