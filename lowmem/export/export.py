"""Export a checkpoint: what goes into the GGUF file, where it goes, and what the user is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowmem.checkpoint.files.whole import require_room
from lowmem.checkpoint.source.fitted import fitted
from lowmem.checkpoint.source.gguf import GgufSource
from lowmem.checkpoint.source.open import open_source
from lowmem.errors import OutputError, SourceError
from lowmem.export.families import family_of, notes_on
from lowmem.export.metadata import add_all, model_name
from lowmem.export.tensors import bits_per_weight, kinds_of, main_kind, plan_tensors
from lowmem.export.vocabulary import read_vocabulary
from lowmem.export.write import Header, Loss, write_file
from lowmem.models.architecture import build_model, inspect


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    path: Path
    nbytes: int
    kinds: tuple[tuple[str, int], ...]
    """The types of the decoder layers' linears, and how many have each."""
    bits_per_weight: float
    """Stored bits of those linears, divided by the number of their weights."""
    license: str | None
    losses: tuple[Loss, ...]
    """Empty if every weight is the checkpoint's."""
    notes: tuple[str, ...] = field(default=())
    """What the file cannot hold."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    head: str | None = None
    """The type of embedding and head, one of HEAD_TYPES; None to keep what is stored."""
    force: bool = False
    """Replace an existing file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""


Notify = Callable[[str], None]
Progress = Callable[[int, int], None]


def export(
    model: str,
    out: Path | None = None,
    options: ExportOptions | None = None,
    notify: Notify = lambda line: None,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write the checkpoint `model` (see open_source) as a GGUF file, whole or not at all.

    out: the file; None for NAME-TYPE.gguf in the current folder. notify: receives lines about the source.
    progress: bytes written, and in all. Every slice is read back from the file and compared with the
    checkpoint's weights. Raises SourceError for a model that llama.cpp would compute differently, OutputError
    where the file exists or cannot be written.
    """
    options = options or ExportOptions()
    if out is not None:
        _check_free(out, options.force)
    opened = open_source(model, options.revision, progress=notify)
    if isinstance(opened, GgufSource):
        raise SourceError(f"{model} is a GGUF file already", "Give the folder of a checkpoint")
    family = family_of(opened.config(), opened.display)
    source = fitted(opened, build_model(opened.config(), torch.float32, buffers=False))
    for note in source.notes:
        notify(note)
    arch, tokenizer = inspect(source.config()), source.tokenizer()
    vocabulary = read_vocabulary(tokenizer, arch.shapes[arch.embedding][0], family.digits)
    plan = plan_tensors(source, arch, options.head)
    kind = main_kind(plan)
    if out is None:
        out = Path(f"{model_name(source)}-{kind}.gguf")
        _check_free(out, options.force)
    total = sum(stored.nbytes for stored in plan)
    require_room(out.absolute().parent, total, "the export", "give another OUT")

    def add_keys(writer: Any) -> None:
        add_all(writer, source, tokenizer, vocabulary, kind)

    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    losses = write_file(out, source, plan, Header(family.architecture, add_keys), advance)
    return Exported(
        out,
        out.stat().st_size,
        tuple(kinds_of(plan)),
        bits_per_weight(plan),
        source.license_name(),
        tuple(losses),
        (*notes_on(source.config()), *vocabulary.notes),
    )


def _check_free(out: Path, force: bool) -> None:
    if out.is_dir():
        raise OutputError(f"{out} is a folder", "Give the name of the file, such as model.gguf")
    if out.exists() and not force:
        raise OutputError(f"{out} exists", "Give another name, or --force to replace it")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"the folder {out.parent} does not exist", "Create it first")
