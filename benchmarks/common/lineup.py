"""The models that a user names → the versions to measure, and the unquantized model that they came from.

Only headers and configs are read here.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.benchmarks.common.records import Subject

from lowmem.checkpoint.files.home import typed_path
from lowmem.errors import InvalidRequestError, LowmemError, SourceError

if TYPE_CHECKING:
    from lowmem.plan.candidates import Candidate

LABELS = {"int8": "int8", "nf4": "NF4"}
"""Names of bitsandbytes' methods in reports."""
VERSIONS = ("dense", "float32", "bfloat16", "float16", "int8", "nf4", "gptq")
"""Values of --versions, beside labels such as "4-bit" or "4-bit g128"."""


@dataclass(frozen=True)
class Entrant:
    """One version to measure."""

    subject: Subject
    candidate: Candidate
    """Where it is, how it is loaded, and its shape."""


@dataclass(frozen=True)
class Lineup:
    """All versions to measure."""

    source: str
    """The unquantized model that all versions were made from, for `open_source`."""
    entrants: tuple[Entrant, ...]
    """Best expected quality first."""


@dataclass(frozen=True)
class LineupRequest:
    """A user's choice of versions to measure."""

    models: tuple[str, ...]
    """Folders, weight files, hub ids, or names from `lowmem list`. At most one is unquantized: all of its
    versions on this machine are measured. A GPTQ folder is one version."""
    reference: str | None = None
    """The unquantized model, if none of `models` is. By default the one that a GPTQ folder's report names."""
    versions: tuple[str, ...] = ()
    """Measure only these: VERSIONS or labels. Empty for all."""
    dtype: str | None = None
    """Of activations, as `lowmem run --dtype`."""
    cuda: bool = False
    reference_needed: bool = True
    """False if GPTQ folders may be measured without their source; the first folder then is the source."""


def add_lineup_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare MODEL…, --reference and --versions."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="an unquantized model, measured with all of its versions on this machine (as published, "
        "bitsandbytes' int8 and NF4, converted), or GPTQ folders",
    )
    parser.add_argument(
        "--reference",
        metavar="SOURCE",
        help="the unquantized model that GPTQ folders were converted from (default: the one "
        "named in their report)",
    )
    parser.add_argument(
        "--versions",
        "--forms",
        dest="versions",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="LIST",
        help=f"measure only these, separated by commas: {', '.join(VERSIONS)}, or labels such as 4-bit "
        "(default: all)",
    )


def lineup_of(
    args: argparse.Namespace, *, cuda: bool, dtype: str | None = None, reference_needed: bool = True
) -> LineupRequest:
    """Convert command-line arguments to a request."""
    return LineupRequest(tuple(args.models), args.reference, args.versions, dtype, cuda, reference_needed)


def line_up(request: LineupRequest) -> Lineup:
    """Find the versions to measure and their source. Raises SourceError or InvalidRequestError."""
    from lowmem.plan.candidates import find_candidates, ranked

    found: list[Candidate] = []
    source: tuple[str, Candidate] | None = None
    for model in request.models:
        candidates = find_candidates(model, cuda=request.cuda, dtype=request.dtype)
        dense = next((c for c in candidates if c.form.method == "dense"), None)
        if dense is not None:
            if source is not None and source[1].path.resolve() != dense.path.resolve():
                raise InvalidRequestError(
                    f"{source[0]} and {model} are both unquantized", "Measure one model at a time"
                )
            source = (_name(model, dense), dense)
        found += candidates
    named = source[0] if source else request.models[0]
    if request.reference is not None:
        source = _unquantized(request.reference, request.cuda)
    elif source is None:
        try:
            source = _reported(found, request.cuda)
        except SourceError:
            if request.reference_needed:
                raise
            source = (str(found[0].path), found[0])
    found = _distinct(ranked(found))
    for candidate in found:
        _check_same_model(candidate, source[1], source[0])
    entrants = tuple(_entrants(_wanted(found, request.versions)))
    if not entrants:
        raise InvalidRequestError(
            f"{named} has no version {','.join(request.versions)}",
            f"Available are {', '.join(dict.fromkeys(map(_label, found)))}",
        )
    return Lineup(source[0], entrants)


def _name(model: str, dense: Candidate) -> str:
    """The name to open an unquantized model by: the hub id as typed, or its path."""
    from lowmem.checkpoint.files.reading import is_hub_id

    return model if is_hub_id(model) and not typed_path(model).exists() else str(dense.path)


def _unquantized(reference: str, cuda: bool) -> tuple[str, Candidate]:
    from lowmem.plan.candidates import find_candidates

    for candidate in find_candidates(reference, cuda=cuda):
        if candidate.form.method == "dense":
            return _name(reference, candidate), candidate
    raise SourceError(
        f"{reference} is quantized and cannot be the reference",
        "Name the unquantized model with --reference SOURCE",
    )


def _reported(found: Iterable[Candidate], cuda: bool) -> tuple[str, Candidate]:
    """The source that a folder's report or lowmem's cache names. Raises SourceError if it is not here."""
    from lowmem.checkpoint import cache

    origins = {entry.path.resolve(): entry.source for entry in cache.entries()}
    named = ""
    for candidate in found:
        path = candidate.path.resolve()
        base = _base_model(path)
        named = named or base
        for place in (origins.get(path), str(path.parent / base) if base else None, base):
            if not place:
                continue
            try:
                return _unquantized(place, cuda)
            except LowmemError:
                continue
    raise SourceError(
        f"the reference, the unquantized model {named or 'of this checkpoint'}, was not found here",
        "Name it with --reference SOURCE",
    )


def _base_model(folder: Path) -> str:
    from lowmem.checkpoint.files.reading import read_json
    from lowmem.checkpoint.manifest import REPORT_FILE

    try:
        name = read_json(folder / REPORT_FILE).get("base_model")
    except LowmemError:
        return ""
    return name if isinstance(name, str) and name.isprintable() else ""


def _check_same_model(candidate: Candidate, reference: Candidate, name: str) -> None:
    """Raise SourceError unless layers, widths and vocabulary are the same."""
    one, other = candidate.shape, reference.shape
    parts: tuple[tuple[str, object, object], ...] = (
        ("decoder layers", one.layers, other.layers),
        ("hidden features", one.hidden, other.hidden),
        ("tokens", one.vocab, other.vocab),
        ("shapes of linears", one.linear_sizes, other.linear_sizes),
    )
    for what, found, expected in parts:
        if found != expected:
            counts = f"{found} {what}, not {expected}" if isinstance(found, int) else f"different {what}"
            raise SourceError(
                f"{candidate.path} was not converted from {name}: it has {counts}",
                "Name its unquantized model with --reference SOURCE",
            )


def _wanted(found: list[Candidate], versions: Sequence[str]) -> list[Candidate]:
    asked = {version.strip().lower() for version in versions if version.strip()}
    for version in asked:
        if version not in VERSIONS and not version[:1].isdigit():
            raise InvalidRequestError(
                f"--versions {version} is not known", f"Use {', '.join(VERSIONS)}, or a label such as 4-bit"
            )
    return [c for c in found if not asked or asked & _names(c)]


def _names(candidate: Candidate) -> set[str]:
    """The values of --versions that choose it."""
    names = {candidate.form.method, _label(candidate).lower()}
    # "4-bit" of "4-bit g128"; the average of a mixed version keeps its decimal, as in "4.0-bit".
    return names if candidate.shape.format is None else names | {candidate.label.partition(" ")[0]}


def _distinct(found: Iterable[Candidate]) -> list[Candidate]:
    """Each version at each place once, in the order given."""
    kept: dict[tuple[Path, object], Candidate] = {}
    for candidate in found:
        kept.setdefault((candidate.path.resolve(), candidate.form), candidate)
    return list(kept.values())


def _label(candidate: Candidate) -> str:
    """`4-bit g128`, `3.5-bit mixed`, `bfloat16`, `int8`, `NF4`."""
    if candidate.shape.format is not None:
        return candidate.label
    return LABELS.get(candidate.form.method, candidate.form.dtype)


def _entrants(found: Sequence[Candidate]) -> list[Entrant]:
    """Entrants with unique labels: equal ones get as much of their path as tells them apart."""
    labels = [_label(c) for c in found]
    ways: tuple[Callable[[Path], str], ...] = (
        lambda path: path.name,
        lambda path: str(Path(path.parent.name) / path.name),
        str,
    )
    for way in ways:
        counts = Counter(labels)
        labels = [
            label if counts[label] == 1 else f"{_label(c)} ({way(c.path.resolve())})"
            for label, c in zip(labels, found, strict=True)
        ]
    return [Entrant(subject_of(c, label), c) for label, c in zip(labels, found, strict=True)]


def _relative(path: Path) -> str:
    """A path relative to the working folder if it is below it: records are read on other machines."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def subject_of(candidate: Candidate, label: str) -> Subject:
    """Convert a candidate to a record's Subject; sizes are computed from the checkpoint's headers."""
    from lowmem.plan.memory import weights_bytes

    shape, form = candidate.shape, candidate.form
    linears = tuple(t for t in shape.tensors if t.linear or (t.packed and t.layer >= 0))
    nbytes = weights_bytes(replace(shape, tensors=linears), form)
    return Subject(
        label=label,
        method=form.method,
        dtype=form.dtype,
        path=_relative(candidate.path),
        bits_per_weight=8 * nbytes / max(1, shape.linear_weights),
        weight_bytes=weights_bytes(shape, form),
    )
