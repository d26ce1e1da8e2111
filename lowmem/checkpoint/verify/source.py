"""Is a checkpoint whole that lowmem did not write: pickle shards, a GGUF, single safetensors files.

A pickle shard is a zip, which has a checksum of every tensor's bytes; the hub's digests are compared where
they are known. All else is what `verify` looks at: names, shapes and values of every tensor that the model
needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from lowmem.checkpoint.files.shards import Problem
from lowmem.checkpoint.headers.model_tensors import integer_buffers, misfit, model_of, unique_tensors
from lowmem.checkpoint.manifest import checkpoint_files
from lowmem.checkpoint.source.bin import BinSource
from lowmem.checkpoint.source.open import Source, open_source, resolve_names
from lowmem.checkpoint.values import all_finite
from lowmem.checkpoint.verify.bin_checksums import checksum_faults
from lowmem.checkpoint.verify.converted import Progress, VerifyReport
from lowmem.checkpoint.verify.digests import difference, known_digests
from lowmem.errors import LowmemError

_SLICE_VALUES = 1 << 24  # of a tensor, read at a time


def verify_source(path: Path, progress: Progress | None = None) -> VerifyReport:
    """Check a folder's weights, or a weight file; problems are in the report, nothing is raised for them."""
    run = _Verification(path, progress)
    tensors = 0
    try:
        source = open_source(str(path), offline=True)
        tensors = len(source.infos)
        run.check(source)
    except LowmemError as error:
        run.problems.append(Problem("", "", error.message))
    return VerifyReport(
        folder=run.folder,
        ours=False,
        format=None,
        files=len(run.names),
        tensors=tensors,
        linears=0,
        bytes=sum((run.folder / name).stat().st_size for name in run.names),
        problems=tuple(run.problems),
        notes=tuple(run.notes),
    )


class _Verification:
    """One run: what it has found so far, and how far it is."""

    def __init__(self, path: Path, progress: Progress | None) -> None:
        self.folder = path if path.is_dir() else path.parent
        self.names = checkpoint_files(path) if path.is_dir() else [path.name]
        self.progress = progress
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.done = self.total = 0

    def check(self, source: Source) -> None:
        """Digests, checksums, names, shapes and values, in this order. Raises LowmemError."""
        digests = known_digests(self.folder)
        listed = sorted(name for name in self.names if name in digests.files)
        shards = [path for path, _ in source.shards()] if isinstance(source, BinSource) else []
        files = [self.folder / name for name in listed] + shards
        self.total = sum(file.stat().st_size for file in files) + sum(i.nbytes for i in source.infos.values())
        self.notes.append(digests.note(self.names))
        for name in listed:
            if fault := difference(self.folder / name, digests.files[name], digests.origin, self.advance):
                self.problems.append(Problem(name, "", fault))
        for shard in shards:
            faults = checksum_faults(shard, self.advance)
            self.problems += [Problem(shard.name, tensor, what) for tensor, what in faults]
        self.tensors(source)

    def advance(self, count: int) -> None:
        """So many bytes more."""
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)

    def tensors(self, source: Source) -> None:
        """What the model of the config needs, against what is stored. Raises LowmemError."""
        shapes: dict[str, tuple[int, ...]] = {}
        model = model_of(source.config())
        integers = integer_buffers(model)
        for name, (aliases, shape) in unique_tensors(model):
            shapes[next((alias for alias in aliases if alias in source.infos), name)] = shape
        stored_names = resolve_names(source.infos, list(shapes))
        order = sorted(stored_names.items(), key=lambda item: (source.infos[item[1]].file, item[1]))
        for name, stored in order:
            info = source.infos[stored]
            dtype = getattr(torch, info.dtype)
            if what := misfit(info.shape, dtype, shapes[name], integers=name in integers):
                self.problems.append(Problem(info.file, stored, what))
            elif not all(all_finite(part) for part in self.parts(source, stored)):
                self.problems.append(Problem(info.file, stored, "has values that are not finite"))
        source.release()
        for name in sorted(set(source.infos) - set(stored_names.values())):
            self.notes.append(f"{name} is no tensor of this model, and is not used")

    def parts(self, source: Source, name: str) -> Iterator[torch.Tensor]:
        """A tensor some rows at a time, where it can be read so."""
        info = source.infos[name]
        sliced = len(info.shape) == 2 and source.kind != "gguf" and info.numel > _SLICE_VALUES
        step = max(1, _SLICE_VALUES // info.shape[1]) if sliced else 1
        for rows in (slice(i, i + step) for i in range(0, info.shape[0], step)) if sliced else (None,):
            part = source.read(name, rows)
            self.advance(part.nbytes)
            yield part
