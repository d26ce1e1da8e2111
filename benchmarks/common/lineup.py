"""What is measured against what: the models that a user names → the reference and the forms beside it.

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

from lowmem.errors import InvalidRequestError, LowmemError, SourceError

if TYPE_CHECKING:
    from lowmem.plan.candidates import Candidate

LABELS = {"int8": "int8", "nf4": "NF4"}
"""What reports call bitsandbytes' methods."""
FORMS = ("dense", "float32", "bfloat16", "float16", "int8", "nf4", "gptq")
"""What --forms knows, beside widths such as "4-bit" or "4-bit g128"."""


@dataclass(frozen=True)
class Entrant:
    """One form to be measured. candidate: its folder or file, its form and its shape."""

    subject: Subject
    candidate: Candidate


@dataclass(frozen=True)
class Lineup:
    """source: the unquantized model that all entrants are forms of, for `open_source`. entrants: in the
    order of quality that the planner expects, and of the models as given."""

    source: str
    entrants: tuple[Entrant, ...]


def add_lineup_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare MODEL…, --reference and --forms: what `line_up` takes."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="an unquantized model with all of its forms here (as stored, bitsandbytes' int8 and NF4, "
        "converted ones), or GPTQ folders of any maker",
    )
    parser.add_argument(
        "--reference",
        metavar="SOURCE",
        help="the unquantized model that GPTQ folders were made of (what their report names)",
    )
    parser.add_argument(
        "--forms",
        type=lambda text: text.split(","),
        metavar="LIST",
        help=f"only these, parted by commas: {', '.join(FORMS)}, or labels such as 4-bit (all)",
    )


def line_up(
    models: Sequence[str],
    *,
    reference: str | None = None,
    forms: Sequence[str] | None = None,
    dtype: str | None = None,
    cuda: bool = False,
    reference_needed: bool = True,
) -> Lineup:
    """Find the forms to be measured, and the unquantized model that they are forms of.

    models: folders, weight files, hub ids or names from `lowmem list`. One of them may be unquantized and
    then brings every form of it on this machine; a GPTQ folder brings itself. reference: the unquantized
    model where none is among them; else what the first folder's lowmem-report.json names, if that is here.
    reference_needed: False where GPTQ folders whose source is gone can be measured alone; the first of them
    then is the source. forms: see FORMS; None or nothing is all. dtype: of activations, as `lowmem run
    --dtype`. Raises SourceError or InvalidRequestError saying what to type.
    """
    from lowmem.plan.candidates import find_candidates, ranked

    found: list[Candidate] = []
    source: tuple[str, Candidate] | None = None
    for model in models:
        candidates = find_candidates(model, cuda=cuda, dtype=dtype)
        dense = next((c for c in candidates if c.form.method == "dense"), None)
        if dense is not None:
            if source is not None and not _same_place(source[1].path, dense.path):
                raise InvalidRequestError(
                    f"{source[0]} and {model} are both unquantized", "Measure one model at a time"
                )
            source = (_name(model, dense), dense)
        found += candidates
    own = source
    if reference is not None:
        source = _unquantized(reference, cuda)
    elif source is None:
        try:
            source = _reported(found, cuda)
        except SourceError:
            if reference_needed:
                raise
            source = (str(found[0].path), found[0])
    found = _distinct(ranked(found))
    for candidate in found:
        _check_same_model(candidate, source[1], source[0])
    wanted = _wanted(found, forms)
    entrants = tuple(_entrants(wanted))
    if not entrants:
        there = ", ".join(dict.fromkeys(_label(c) for c in found))
        what = f"none of {own[0] if own else models[0]}'s forms is one of {','.join(forms or ())}"
        raise InvalidRequestError(what, f"There are {there}")
    return Lineup(source[0], entrants)


def _name(model: str, dense: Candidate) -> str:
    """What to open the unquantized model by: the hub id as typed, or its path."""
    from lowmem.checkpoint.files.reading import is_hub_id

    return model if is_hub_id(model) and not Path(model).expanduser().exists() else str(dense.path)


def _unquantized(reference: str, cuda: bool) -> tuple[str, Candidate]:
    from lowmem.plan.candidates import find_candidates

    for candidate in find_candidates(reference, cuda=cuda):
        if candidate.form.method == "dense":
            return _name(reference, candidate), candidate
    raise SourceError(
        f"{reference} is quantized: nothing can be measured against it",
        "Give the unquantized original: --reference SOURCE",
    )


def _reported(found: Iterable[Candidate], cuda: bool) -> tuple[str, Candidate]:
    """The unquantized model that a folder's own report, or lowmem's cache, says it was made of."""
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
    what = f"the unquantized {named} that it was made of" if named else "what the checkpoint was made of"
    raise SourceError(
        f"{what} is not known to be on this machine, and there is nothing to measure against",
        "Give the unquantized model with --reference SOURCE",
    )


def _base_model(folder: Path) -> str:
    from lowmem.checkpoint.files.reading import read_json
    from lowmem.plan.candidates import REPORT_FILE

    try:
        name = read_json(folder / REPORT_FILE).get("base_model")
    except LowmemError:
        return ""
    return name if isinstance(name, str) and name.isprintable() else ""


def _check_same_model(candidate: Candidate, reference: Candidate, name: str) -> None:
    """SourceError unless both are the same layers over the same vocabulary."""
    one, other = candidate.shape, reference.shape
    parts: tuple[tuple[str, object, object], ...] = (
        ("decoder layers", one.layers, other.layers),
        ("hidden features", one.hidden, other.hidden),
        ("tokens", one.vocab, other.vocab),
        ("shapes of linears", one.linears, other.linears),
    )
    for what, found, expected in parts:
        if found != expected:
            counts = f"{found} {what}, not {expected}" if isinstance(found, int) else f"other {what}"
            raise SourceError(
                f"{candidate.path} is not a form of {name}: it has {counts}",
                "Give the model that it was made of with --reference SOURCE",
            )


def _wanted(found: list[Candidate], forms: Sequence[str] | None) -> list[Candidate]:
    asked = [form.strip().lower() for form in forms or () if form.strip()]
    for form in asked:
        if form not in FORMS and not form[:1].isdigit():
            raise InvalidRequestError(
                f"--forms {form} is not known", f"Known are {', '.join(FORMS)}, 4-bit …"
            )
    return [c for c in found if not asked or any(_is_form(c, form) for form in asked)]


def _is_form(candidate: Candidate, form: str) -> bool:
    names = {candidate.form.method, _label(candidate).lower()}
    if candidate.shape.format is not None:
        names.add(f"{candidate.bits}-bit")
    return form in names


def _distinct(found: Iterable[Candidate]) -> list[Candidate]:
    """Each form of each place once, in the order given."""
    kept: dict[tuple[Path, object], Candidate] = {}
    for candidate in found:
        kept.setdefault((candidate.path.resolve(), candidate.form), candidate)
    return list(kept.values())


def _same_place(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _label(candidate: Candidate) -> str:
    """What reports call it: "4-bit g128", "bfloat16", "int8", "NF4"."""
    if candidate.shape.format is not None:
        return candidate.shape.format.label
    return LABELS.get(candidate.form.method, candidate.form.dtype)


def _entrants(found: Sequence[Candidate]) -> list[Entrant]:
    """The candidates as entrants; what is called alike gets as much of its path as tells it apart."""
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


def _as_seen_from_here(path: Path) -> str:
    """A path below the working folder by what lies below it: a record is read on other machines, too."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def subject_of(candidate: Candidate, label: str) -> Subject:
    """A candidate as records name it, with its sizes from headers."""
    from lowmem.plan.memory import weights_bytes

    shape, form = candidate.shape, candidate.form
    linears = tuple(t for t in shape.tensors if t.linear or (t.packed and t.layer >= 0))
    count = sum(t.numel for t in linears if t.linear)
    if shape.format is not None:
        packed = [t for t in linears if t.name.endswith(".qweight")]
        formats = [shape.format.of_packed(t.name.removesuffix(".qweight")) for t in packed]
        count += sum(t.numel * 32 // f.bits for t, f in zip(packed, formats, strict=True))
    nbytes = weights_bytes(replace(shape, tensors=linears), form)
    return Subject(
        label=label,
        method=form.method,
        dtype=form.dtype,
        path=_as_seen_from_here(candidate.path),
        bits_per_weight=8 * nbytes / max(1, count),
        weight_bytes=weights_bytes(shape, form),
    )
