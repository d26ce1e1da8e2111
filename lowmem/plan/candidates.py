"""Every version of a model that this machine can run, best first: converted, as published, on the fly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem.checkpoint import cache
from lowmem.checkpoint.files.home import typed_path
from lowmem.checkpoint.files.reading import is_hub_id, read_json
from lowmem.checkpoint.formats import mixed_label
from lowmem.checkpoint.manifest import MANIFEST_FILE, REPORT_FILE
from lowmem.errors import LowmemError, SourceError
from lowmem.kernels.native.header import WIDTHS
from lowmem.plan.memory import ON_THE_FLY, Form, takes_8bit_head, with_head
from lowmem.plan.shape import ModelShape, as_converted, read_shape

MEASURED = "measured"
"""Key of a manifest: measurements of the checkpoint since it was made (`kld`)."""
_INT8_IS_LIKE = 5.5
"""bitsandbytes' int8 diverges as much as GPTQ between 5 and 6 bits (docs/measurements.md)."""
_NEIGHBOURS = 500
"""How many folders beside a source are searched."""


@dataclass(frozen=True)
class Candidate:
    """One version of a model."""

    label: str
    """Shown to users, as "4-bit g128"."""
    bits: float
    """Of a linear's weights; where linears differ, the average, with scales and zero-points."""
    form: Form
    path: Path
    """A folder, or a weight file."""
    shape: ModelShape
    kld: float | None = None
    """Its measured KL divergence, where the manifest has one; the predicted one of a version to be made."""
    command: str = ""
    """The command that makes it, if it does not exist yet."""
    only_to_fit: bool = False
    """It has an 8-bit head that nobody asked for: for a card on which the version does not fit without."""

    @property
    def where(self) -> str:
        """The folder, or how the version is made."""
        if self.command:
            return self.command
        return "on the fly" if self.form.method in ON_THE_FLY else str(self.path)

    def has_bits(self, bits: int) -> bool:
        """Whether every linear has this many bits: a mixed version has not, whatever its average."""
        return self.bits == bits and (self.shape.format is None or self.shape.format.uniform)


def find_candidates(model: str, *, cuda: bool, dtype: str | None = None) -> list[Candidate]:
    """All versions of `model` on this machine, in the order of `ranked`.

    model: a folder or weight file, a hub id, or a name from `lowmem list`. A quantized checkpoint has one
    version; a 16-bit one also has its conversions, in folders beside it and in lowmem's cache. Only headers
    are read. Raises SourceError with the command to use if no version is found.
    """
    path = typed_path(model)
    if _exists(path):
        found = _of_path(path, model, cuda, dtype)
    else:
        folders = [e.path for e in cache.entries() if e.complete and e.name == model]
        if not folders and is_hub_id(model):
            downloaded = _downloaded(model)
            folders = [e.path for e in cache.entries_for(model) if e.complete] + downloaded
        if not folders:
            raise _missing(model)
        found = [c for folder in folders for c in _versions(folder, cuda, dtype)]
    return ranked(found)


def convertible(model: str, candidates: Iterable[Candidate], *, cuda: bool) -> list[Candidate]:
    """The versions that `lowmem convert` could still make of a 16-bit source among `candidates`."""
    found = list(candidates)
    source = next((c for c in found if c.form.method == "dense"), None)
    if source is None or not source.shape.convertible:
        return []
    there = [c for c in found if c.form.method == "gptq"]
    made = []
    for bits in (bits for bits in offered(cuda=cuda) if not any(c.has_bits(bits) for c in there)):
        shape = as_converted(source.shape, bits)
        dtype = "float16" if cuda else "bfloat16"
        assert shape.format is not None
        command = f"lowmem convert {model} --bits {bits}"
        made.append(
            Candidate(shape.format.label, bits, Form("gptq", dtype), source.path, shape, command=command)
        )
    return made


def offered(*, cuda: bool) -> tuple[int, ...]:
    """The widths of conversions that a plan names: those for which the device has kernels of its own.

    Not 7 bits: 8 are as good for a user who has the memory, and 6 are for one who has not.
    """
    return tuple(bits for bits in WIDTHS if bits != 7 and not (cuda and bits in (6, 5)))


def with_8bit_head(candidate: Candidate, *, only_to_fit: bool = False) -> Candidate | None:
    """The version with its head and token embedding in 8 bits; None for a model that cannot have them so."""
    if not takes_8bit_head(candidate.shape):
        return None
    form = replace(candidate.form, head_bits=8)
    return replace(candidate, label=with_head(candidate.label, 8), form=form, only_to_fit=only_to_fit)


def with_spare_heads(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Each converted version, followed by itself with an 8-bit head `only_to_fit`, if it can have one."""
    found: list[Candidate] = []
    for candidate in candidates:
        found.append(candidate)
        if candidate.form.method == "gptq" and candidate.form.head_bits == 16:
            spare = with_8bit_head(candidate, only_to_fit=True)
            found += [spare] if spare else []
    return found


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Best quality first: by bits, GPTQ before bitsandbytes, small groups before large ones.

    Candidates with a measured KL divergence are then sorted by it, within the places that they hold.
    """
    order = sorted(candidates, key=by_bits)
    places = [i for i, c in enumerate(order) if c.kld is not None]
    measured = sorted((order[i] for i in places), key=lambda c: c.kld or 0.0)
    for place, candidate in zip(places, measured, strict=True):
        order[place] = candidate
    return order


def by_bits(candidate: Candidate) -> tuple[float, int, int, str]:
    """The sort key of `ranked` without measurements."""
    method = ("dense", "gptq", "int8", "nf4").index(candidate.form.method)
    format = candidate.shape.format
    group = format.default.group_size if format and format.default.group_size > 0 else 1 << 30
    bits = _INT8_IS_LIKE if candidate.form.method == "int8" else candidate.bits
    return (-bits, method, group, str(candidate.path))


def _of_path(path: Path, model: str, cuda: bool, dtype: str | None) -> list[Candidate]:
    if path.is_dir() and not (path / "config.json").is_file() and not list(path.glob("*.gguf")):
        found = [c for child in _checkpoints_in(path) for c in _versions(child, cuda, dtype)]
        if len({c.shape.signature for c in found}) > 1:
            raise SourceError(f"{model} holds checkpoints of several models", "Give one of its folders")
        if found:
            return found
    found = _versions(path, cuda, dtype)
    shape = found[0].shape
    if shape.format:
        return found
    own = path.resolve()
    for folder in [*_neighbours(own), *(e.path for e in cache.entries_for(model) if e.complete)]:
        found += _converted(folder, shape, cuda, dtype)
    return found


def _versions(path: Path, cuda: bool, dtype: str | None) -> list[Candidate]:
    """The versions of one checkpoint: one if it is quantized; else the dense ones and bitsandbytes'."""
    shape = read_shape(path)
    if shape.format:
        return [_packed(path, shape, cuda, dtype)]
    stored = _run_dtype(shape, cuda, dtype)
    short = "bfloat16" if stored == "float32" and dtype is None else stored
    dense = [
        Candidate(d, 32 if d == "float32" else 16, Form("dense", d), path, shape)
        for d in dict.fromkeys((stored, short))
    ]
    if not shape.quantizable:  # what is no linear stays in 16 bits
        return dense
    return [
        *dense,
        Candidate(ON_THE_FLY["int8"], 8, Form("int8", short), path, shape),
        Candidate(ON_THE_FLY["nf4"], 4, Form("nf4", short), path, shape),
    ]


def _packed(path: Path, shape: ModelShape, cuda: bool, dtype: str | None) -> Candidate:
    assert shape.format is not None
    form = Form("gptq", _run_dtype(shape, cuda, dtype))
    label = shape.format.label if shape.format.uniform else mixed_label(shape.bits)
    return Candidate(label, shape.bits, form, path, shape, _measured_kld(path))


def _run_dtype(shape: ModelShape, cuda: bool, dtype: str | None) -> str:
    """The requested dtype, or the stored one; float16 runs as bfloat16 on a CPU (see loader.py)."""
    return dtype or ("bfloat16" if shape.stored == "float16" and not cuda else shape.stored)


def _converted(folder: Path, source: ModelShape, cuda: bool, dtype: str | None) -> list[Candidate]:
    """A converted folder as a version of the source; none if it is of another model or cannot be read."""
    try:
        shape = read_shape(folder)
    except LowmemError:
        return []
    if shape.format is None or shape.signature != source.signature:
        return []
    # The source decides the dtype of the run; a conversion of a GGUF may be stored in another.
    return [_packed(folder, replace(shape, stored=source.stored), cuda, dtype)]


def _neighbours(source: Path) -> list[Path]:
    """Folders beside the source that were converted from it, by report or by the start of their name."""
    base = source.stem if source.is_file() else source.name
    folders = [f for f in _checkpoints_in(source.parent) if f != source]
    return [f for f in folders if _base_model(f) in (source.name, base) or f.name.startswith(base)]


def _checkpoints_in(folder: Path) -> list[Path]:
    try:
        children = sorted(folder.iterdir())[:_NEIGHBOURS]
    except OSError:
        return []
    return [child for child in children if (child / "config.json").is_file()]


def _base_model(folder: Path) -> object:
    return _report(folder).get("base_model")


def _measured_kld(folder: Path) -> float | None:
    try:
        measured = read_json(folder / MANIFEST_FILE).get(MEASURED)
    except LowmemError:
        measured = None
    value = measured.get("kld") if isinstance(measured, dict) else _report(folder).get("kld")
    # An integer may have thousands of digits, and a float may be infinite.
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= 1e6 else None


def _report(folder: Path) -> dict[str, object]:
    try:
        return read_json(folder / REPORT_FILE)
    except LowmemError:
        return {}


def _downloaded(model: str) -> list[Path]:
    """The downloaded snapshot of a hub repository, if there is one."""
    from lowmem.checkpoint.source.hub import download

    try:
        return [download(model, offline=True)]
    except SourceError:
        return []


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _missing(model: str) -> SourceError:
    if is_hub_id(model):
        return SourceError(
            f"{model} is not on this machine: neither converted nor downloaded, nor a folder of that name",
            f"To download and convert it: lowmem convert {model}",
        )
    return SourceError(
        f"{model!r} does not exist",
        "Give a folder, a weight file, a hub id such as HuggingFaceH4/starchat-alpha, or see lowmem list",
    )
