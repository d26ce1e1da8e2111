"""Output quality of every form against the unquantized model, on the same tokens.

    texts → reference (benchmarks/quality/reference.py) → each form's last hidden states → divergence, text by text →
    record

A form is streamed like the reference (lowmem/streaming/forward.py), so a model of any size is measured in a few GiB; or
it is loaded as `lowmem run` loads it, and the kernels that answer are measured with it. The record is
written after every form, and an interrupted measurement goes on with the one that was not finished.
"""

from __future__ import annotations

import contextlib
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lowmem.benchmarks.common import output
from lowmem.benchmarks.common.lineup import Entrant, Lineup, line_up
from lowmem.benchmarks.common.origin import origin_of
from lowmem.benchmarks.common.record_file import read_record, write_record
from lowmem.benchmarks.common.records import GreedyAgreement, QualityRecord, SubjectQuality, TextQuality
from lowmem.benchmarks.quality.agreement import agreement
from lowmem.benchmarks.quality.divergence import compare, summarize
from lowmem.benchmarks.quality.reference import (
    Reference,
    cache_folder,
    disk_needed,
    missing_texts,
    reference_states,
    state_bytes,
)
from lowmem.benchmarks.quality.texts import Text, read_texts

from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.files.whole import write_json
from lowmem.checkpoint.source.open import open_source
from lowmem.errors import InvalidRequestError, LowmemError, MemoryBudgetError
from lowmem.streaming.dense_source import open_any
from lowmem.streaming.forward import StreamedModel, head_of
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.pass_folder import working

SETTINGS_FILE = "quality.settings.json"
"""Beside the record: what it was measured with, so that an interrupted measurement can go on."""
_VALUES_AT_A_TIME = 1 << 22
"""Logits compared at a time, in float64."""
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """Hidden states from the row `first` on."""

    states: HiddenStates
    first: int = 0

    def row(self, row: int) -> torch.Tensor:
        """[row_length, hidden]."""
        return self.states.read(self.first + row, self.first + row + 1)[0]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    texts: built-in ones. files: of the user's. dtype: arithmetic of quantized forms; None is that in which
    `lowmem run` would run them. reference_dtype: of the reference. kernels: load the forms and run the
    kernels that answer, instead of streaming them. greedy: measure the greedy answers too. record: write the
    divergence into the manifests of folders that lowmem made. cache: keep the reference. force: forget what
    an earlier run has measured.
    """

    texts: tuple[str, ...]
    files: tuple[str, ...] = ()
    rows: int = 24
    row_length: int = 512
    dtype: str | None = "float32"
    reference_dtype: str = "float32"
    device: str = "cpu"
    kernels: bool = False
    greedy: bool = True
    record: bool = True
    cache: bool = True
    force: bool = False


class Listener:
    """Hears what happens; this one says nothing."""

    def note(self, line: str) -> None:
        """Something that a person should know."""

    def begins(self, what: str) -> None:
        """The next form, or the reference."""

    def layers(self, done: int, count: int) -> None:
        """Decoder layers that all rows have passed."""

    def close(self) -> None:
        """No more will come."""


def measure(
    lineup: Lineup, settings: Settings, out: Path, argv: Sequence[str], listener: Listener
) -> QualityRecord:
    """Measure every form of `lineup`, and write the record to `out`.

    Forms that an earlier run has measured with the same settings, on the same tokens, are kept. Raises
    LowmemError for what the user can mend.
    """
    source = open_source(lineup.source, offline=True)
    reference = StreamedModel(
        source, getattr(torch, settings.reference_dtype), device=torch.device(settings.device)
    )
    positions = getattr(reference.config.get_text_config(), "max_position_embeddings", None)
    if positions and settings.row_length > positions:
        raise InvalidRequestError(
            f"a row has {settings.row_length} tokens, and the model has {positions} positions",
            f"Use --row-length {positions} or less",
        )
    texts = read_texts(
        settings.texts,
        settings.files,
        source.tokenizer(),
        reference.vocabulary,
        rows=settings.rows,
        row_length=settings.row_length,
    )
    for line in (note for text in texts for note in text.notes):
        listener.note(line)
    entrants = _with_noise_floor(lineup, settings)
    with contextlib.ExitStack() as stack:
        if settings.cache:
            folder = cache_folder(reference)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lowmem-quality-")))
        stack.enter_context(output.exclusive(out, "quality"))
        stack.enter_context(output.with_disk_space(folder, _disk_needed(reference, entrants, texts, folder)))
        listener.begins(f"reference, {settings.reference_dtype}")
        kept = reference_states(reference, texts, folder, listener.layers, listener.note)
        if not kept.seconds:
            listener.note(f"the reference was computed before, and is in {folder}")
        work = _Work(reference, kept, texts, folder, settings, listener)
        return _measure_all(work, entrants, lineup, out, argv)


def _disk_needed(
    reference: StreamedModel, entrants: Sequence[tuple[Entrant, bool]], texts: Sequence[Text], folder: Path
) -> int:
    """Bytes that the whole measurement takes at most: the reference, and beside it a form's states before and
    after the last norm."""
    missing = missing_texts(reference, texts, folder)
    values = state_bytes(reference, texts) // reference.dtype.itemsize
    widest: int = max(getattr(torch, entrant.subject.dtype).itemsize for entrant, _ in entrants)
    return max(disk_needed(reference, missing), state_bytes(reference, missing) + 2 * values * widest)


@dataclass(frozen=True)
class _Work:
    """What all forms are measured with. folder: for what is in progress."""

    reference: StreamedModel
    kept: Reference
    texts: tuple[Text, ...]
    folder: Path
    settings: Settings
    listener: Listener


def _measure_all(
    work: _Work, entrants: Sequence[tuple[Entrant, bool]], lineup: Lineup, out: Path, argv: Sequence[str]
) -> QualityRecord:
    digests = {entrant.subject.label: _digest(entrant) for entrant, _ in entrants}
    known, earlier = _earlier(work, out)
    record = QualityRecord(
        origin=origin_of(argv, lineup.source, str(work.reference.key["source"]), work.settings.device),
        reference_dtype=work.settings.reference_dtype,
        reference_seconds=work.kept.seconds or (earlier.reference_seconds if earlier else 0.0),
        reference_peak_bytes=work.kept.peak_bytes or (earlier.reference_peak_bytes if earlier else 0),
        reference_cache_bytes=work.kept.cache_bytes,
        subjects=(),
    )
    found: dict[str, SubjectQuality] = {}
    if earlier is not None:
        for old in earlier.subjects:
            label = old.subject.label
            if label in known and digests.get(label, known[label]) == known[label]:
                found[label] = old
    else:  # what is there is of other settings: from here on nobody takes it for what is measured now
        write_json(out / SETTINGS_FILE, {**_settings(work), "subjects": {}})
    for entrant, is_floor in entrants:
        label = entrant.subject.label
        if label in found:
            work.listener.note(f"{label} was measured before (--force measures it again)")
        else:
            work.listener.begins(label)
            try:
                found[label] = _measure(work, entrant, is_floor)
            except MemoryBudgetError as error:  # of loading it for its kernels
                work.listener.note(f"{label} is left out: {error}")
                continue
        order = [e.subject.label for e, _ in entrants if e.subject.label in found]
        order += [name for name in found if name not in order]
        record = replace(record, subjects=tuple(found[name] for name in order))
        write_record(record, out)
        write_json(
            out / SETTINGS_FILE,
            {**_settings(work), "subjects": {name: digests.get(name, known.get(name)) for name in found}},
        )
        if work.settings.record:
            record_divergence(entrant, found[label], work)
    return record


def _measure(work: _Work, entrant: Entrant, is_floor: bool) -> SubjectQuality:
    """One form on every text."""
    started = time.perf_counter()
    subject, settings = entrant.subject, work.settings
    with _opened(work, entrant) as (states, logits):
        qualities = [
            _quality(work, text, Rows(work.kept.states[text.name]), states[text.name], logits)
            for text in work.texts
        ]
    greedy = _greedy(work, entrant) if settings.greedy else None
    seconds = time.perf_counter() - started
    return SubjectQuality(subject, is_floor, tuple(qualities), greedy, seconds)


def _quality(work: _Work, text: Text, reference: Rows, states: Rows, logits: Logits) -> TextQuality:
    """One form on one text. Both heads are in memory meanwhile."""
    step = max(16, _VALUES_AT_A_TIME // work.reference.vocabulary)
    with work.reference.head() as expected:

        def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for row in range(len(text.rows)):
                parts = zip(reference.row(row).split(step), states.row(row).split(step), strict=True)
                for ours, theirs in parts:
                    yield expected(ours), logits(theirs)

        return summarize(text.name, compare(text.rows, pairs()))


@contextlib.contextmanager
def _opened(work: _Work, entrant: Entrant) -> Iterator[tuple[dict[str, Rows], Logits]]:
    """A form's last hidden states on each text, and its head; its files are removed at the end.

    What was computed stays when the work on it is interrupted.
    """
    settings, candidate = work.settings, entrant.candidate
    method = candidate.form.method
    folder = work.folder / f"{_digest(entrant)[:24]}-{entrant.subject.dtype}{method}.partial"
    rows = torch.cat([text.rows for text in work.texts])
    if settings.kernels and method != "dense":  # torch's own product is a dense form's kernel either way
        loaded = _load(work, entrant)
        with working(folder):
            states = _loaded_states(loaded, rows, folder / "last", work.reference.hidden)
            with head_of(loaded.model, loaded.device) as logits:
                yield _of_texts(states, work.texts), logits
        del loaded
        gc.collect()
    else:
        model = StreamedModel(
            open_any(candidate.path),
            getattr(torch, entrant.subject.dtype),
            on_the_fly=method if method in ("int8", "nf4") else None,
            device=work.reference.device,
        )
        if model.key == work.reference.key:
            with model.head() as logits:
                yield {name: Rows(states) for name, states in work.kept.states.items()}, logits
            return
        with model.passed(rows, folder, work.listener.layers) as states, model.head() as logits:
            yield _of_texts(states, work.texts), logits


def _of_texts(states: HiddenStates, texts: Sequence[Text]) -> dict[str, Rows]:
    """The rows of each text, out of those of all."""
    found, first = {}, 0
    for text in texts:
        found[text.name] = Rows(states, first)
        first += len(text.rows)
    return found


def _load(work: _Work, entrant: Entrant, context: int | None = None) -> Any:
    """The form as `lowmem run` loads it; MemoryBudgetError where it does not fit."""
    from lowmem.loading.opening import load_option
    from lowmem.plan.request import ModelRequest, plan_for

    form = entrant.candidate.form
    dtype = entrant.subject.dtype if work.settings.kernels else form.dtype
    wanted = context or work.settings.row_length
    request = ModelRequest(
        str(entrant.candidate.path),
        context=min(wanted, entrant.candidate.shape.positions or wanted),
        method=form.method,
        device=work.settings.device,
        dtype=dtype,
    )
    plan = plan_for(request)
    return load_option(plan.chosen, plan, request)


def _loaded_states(loaded: Any, rows: torch.Tensor, path: Path, hidden: int) -> HiddenStates:
    """The last hidden states that a loaded model gives, a row at a time."""

    def chunks() -> Iterator[torch.Tensor]:
        for row in rows.split(1):
            with torch.no_grad():
                output = loaded.model.base_model(input_ids=row.to(loaded.device), use_cache=False)
            yield output.last_hidden_state.cpu()

    shape = (rows.shape[0], rows.shape[1], hidden)
    return HiddenStates.create(path, shape, loaded.dtype, chunks(), keep=False)


def _greedy(work: _Work, entrant: Entrant) -> GreedyAgreement | None:
    """The greedy answers of the form as it runs; None, and a note, where it does not fit this machine."""
    from lowmem.benchmarks.quality.agreement import NEW_TOKENS

    label = entrant.subject.label
    try:
        loaded = _load(work, entrant, context=4 * NEW_TOKENS)
    except MemoryBudgetError as error:
        work.listener.note(f"{label} does not fit here, so it gives no greedy answers: {error.message}")
        return None
    except LowmemError as error:
        work.listener.note(f"{label} gives no greedy answers: {error.message}")
        return None
    folder = work.folder / f"greedy-{_digest(entrant)[:24]}-{entrant.candidate.form.method}.partial"
    return agreement(work.reference, loaded, folder, work.listener.layers)


def _with_noise_floor(lineup: Lineup, settings: Settings) -> list[tuple[Entrant, bool]]:
    """(form, whether it is the noise floor), the unquantized model in bfloat16 first.

    Quantized forms are computed in the dtype of the settings, dense ones in their own.
    """
    floors = line_up([lineup.source], forms=["bfloat16"], dtype="bfloat16").entrants
    own = {e.candidate.path.resolve() for e in floors}
    found: list[tuple[Entrant, bool]] = []
    for entrant in lineup.entrants:
        subject = entrant.subject
        dense = subject.method == "dense"
        if dense and subject.dtype == "bfloat16" and entrant.candidate.path.resolve() in own:
            continue
        if not dense and settings.dtype:
            entrant = replace(entrant, subject=replace(subject, dtype=settings.dtype))
        found.append((entrant, False))
    floor = floors[0]
    if any(entrant.subject.label == floor.subject.label for entrant, _ in found):
        floor = replace(floor, subject=replace(floor.subject, label=f"{floor.subject.label} (reference)"))
    return [(floor, True), *found]


def _digest(entrant: Entrant) -> str:
    """Of the checkpoint that a form is made of."""
    return open_any(entrant.candidate.path).fingerprint()


def _settings(work: _Work) -> dict[str, Any]:
    """All that must agree for what was measured before to be of use."""
    settings = asdict(work.settings)
    for name in ("texts", "files", "rows", "row_length", "record", "cache", "force"):
        del settings[name]
    return {**work.reference.key, **settings, "tokens": {text.name: text.digest for text in work.texts}}


def _earlier(work: _Work, out: Path) -> tuple[dict[str, str], QualityRecord | None]:
    """(digest of each form, the record) of an earlier run with the same settings, if there is one."""
    if work.settings.force or not (out / SETTINGS_FILE).is_file():
        return {}, None
    try:
        settings = read_json(out / SETTINGS_FILE)
        subjects = settings.pop("subjects", None)
        record = read_record(QualityRecord, out)
    except LowmemError as error:
        work.listener.note(f"what was measured before is not used: {error.message}")
        return {}, None
    if record is None or not isinstance(subjects, dict):
        return {}, None
    if settings != json.loads(json.dumps(_settings(work))):
        work.listener.note("what was measured before is replaced: it is of other settings, texts or weights")
        return {}, None
    return {str(name): str(digest) for name, digest in subjects.items()}, record


def record_divergence(entrant: Entrant, quality: SubjectQuality, work: _Work) -> None:
    """Write the mean KL divergence into the manifest of a folder of ours: the planner ranks by it."""
    from lowmem.benchmarks.quality.recorded import write_kld

    if entrant.subject.method != "gptq" or work.settings.kernels:
        return
    text = next((t for t in quality.texts if t.text == "code"), quality.texts[0])
    rows, length = next(one.rows for one in work.texts if one.name == text.text).shape
    what = f"{text.text}, {rows} rows of {length} tokens, {entrant.subject.dtype}"
    line = write_kld(entrant.candidate.path, text.kld.mean, what)
    if line:
        work.listener.note(line)
