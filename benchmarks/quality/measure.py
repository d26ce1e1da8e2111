"""Output quality of every version against the unquantized model, on the same tokens.

    texts → hidden states of the reference → of each version → divergence on each text → record

The record is written after every version. Results are also kept in a work file, so an interrupted measurement
resumes, and another version can be added to a record later.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from lowmem.benchmarks.common.lineup import Entrant, Lineup, LineupRequest, line_up
from lowmem.benchmarks.common.origin import origin_of
from lowmem.benchmarks.common.output import Output, exclusive, with_disk_space
from lowmem.benchmarks.common.progress import Progress
from lowmem.benchmarks.common.record_file import read_record, write_record
from lowmem.benchmarks.common.records import QualityRecord, SubjectQuality
from lowmem.benchmarks.common.work_file import WorkFile, digest_of
from lowmem.benchmarks.quality.allocated import read_allocated
from lowmem.benchmarks.quality.recorded import write_kld
from lowmem.benchmarks.quality.reference_states import (
    cache_folder,
    disk_needed,
    missing_texts,
    reference_states,
    state_bytes,
)
from lowmem.benchmarks.quality.scoring import Scorer, digest_of_entrant
from lowmem.benchmarks.quality.texts import ROW_LENGTH, ROWS, Text, read_texts

from lowmem import __version__
from lowmem.checkpoint.source.open import open_source
from lowmem.errors import InvalidRequestError, LowmemError, MemoryBudgetError
from lowmem.streaming.forward import StreamedModel

WORK_FILE = "quality-results.jsonl"


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    texts: tuple[str, ...]
    """Built-in texts."""
    files: tuple[str, ...] = ()
    """Text files of the user."""
    rows: int = ROWS
    row_length: int = ROW_LENGTH
    dtype: str | None = "float32"
    """Arithmetic of quantized versions; None is the one in which `lowmem run` would run them."""
    reference_dtype: str = "float32"
    device: str = "cpu"
    kernels: bool = False
    """Load versions and run the kernels that answer, instead of streaming them."""
    greedy: bool = True
    """Measure greedy answers, too."""
    record: bool = True
    """Write the divergence into the manifests of folders that lowmem converted."""
    cache: bool = True
    """Keep the reference's hidden states."""

    def key(self) -> dict[str, object]:
        """The settings that results depend on, besides tokens and weights."""
        used = ("dtype", "reference_dtype", "device", "kernels", "greedy")
        return {name: value for name, value in asdict(self).items() if name in used}


def measure(
    lineup: Lineup, settings: Settings, output: Output, argv: Sequence[str], progress: Progress
) -> QualityRecord:
    """Measure every version of `lineup`, and write the record.

    Results of an earlier run with the same settings and tokens are kept. argv: the words after `lowmem`.
    Raises LowmemError.
    """
    source = open_source(lineup.source, offline=True)
    reference = StreamedModel(
        source, getattr(torch, settings.reference_dtype), device=torch.device(settings.device)
    )
    positions = getattr(reference.config.get_text_config(), "max_position_embeddings", None)
    if positions and settings.row_length > positions:
        raise InvalidRequestError(
            f"--row-length {settings.row_length} is longer than the model's {positions} positions",
            f"Use {positions} or less",
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
        progress.note(line)
    entrants = _with_noise_floor(lineup, settings)
    with contextlib.ExitStack() as stack:
        if settings.cache:
            folder = cache_folder(reference)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lowmem-quality-")))
        stack.enter_context(exclusive(output.folder, "quality"))
        stack.enter_context(with_disk_space(folder, _disk_needed(reference, entrants, texts, folder)))
        progress.begin(f"reference, {settings.reference_dtype}")
        kept = reference_states(reference, texts, folder, progress.update, progress.note)
        if not kept.seconds:
            progress.note(f"the reference is cached in {folder}")
        scorer = Scorer(
            reference,
            kept,
            texts,
            folder,
            settings.device,
            progress,
            kernels=settings.kernels,
            greedy=settings.greedy,
        )
        record = QualityRecord(
            origin=origin_of(argv, lineup.source, str(reference.key["source"]), settings.device),
            reference_dtype=settings.reference_dtype,
            reference_seconds=kept.seconds,
            reference_peak_bytes=kept.peak_bytes,
            reference_cache_bytes=kept.cache_bytes,
            subjects=(),
        )
        return _score_all(scorer, entrants, settings, output, _with_reference_cost(record, output))


def _with_reference_cost(record: QualityRecord, output: Output) -> QualityRecord:
    """Time and memory of the reference from an earlier record, if it was computed for that."""
    earlier = None
    with contextlib.suppress(LowmemError):
        earlier = read_record(QualityRecord, output.folder)
    same = earlier and earlier.origin.source_digest == record.origin.source_digest
    if not earlier or not same or record.reference_seconds or output.fresh:
        return record
    return replace(
        record,
        reference_seconds=earlier.reference_seconds,
        reference_peak_bytes=earlier.reference_peak_bytes,
    )


def _disk_needed(
    reference: StreamedModel, entrants: Sequence[tuple[Entrant, bool]], texts: Sequence[Text], folder: Path
) -> int:
    """Bytes on disk at most: the reference, and a version's states before and after the last norm."""
    missing = missing_texts(reference, texts, folder)
    values = state_bytes(reference, texts) // reference.dtype.itemsize
    widest: int = max(getattr(torch, entrant.subject.dtype).itemsize for entrant, _ in entrants)
    return max(disk_needed(reference, missing), state_bytes(reference, missing) + 2 * values * widest)


def _score_all(
    scorer: Scorer,
    entrants: Sequence[tuple[Entrant, bool]],
    settings: Settings,
    output: Output,
    record: QualityRecord,
) -> QualityRecord:
    """The record with every version, written after each."""
    tokens = {text.name: text.digest for text in scorer.texts}
    key = [__version__, scorer.reference.key, settings.key(), tokens]
    work = WorkFile(output.folder / WORK_FILE, SubjectQuality, digest_of(key))
    if output.fresh:
        work.remove()
    known = work.read()
    places = {
        entrant.subject.label: (entrant.subject.label, digest_of_entrant(entrant)) for entrant, _ in entrants
    }
    # Versions of earlier runs that are not requested now stay in the record, after the others.
    others = {place[0]: result for place, (result, _) in known.items() if place[0] not in places}
    found: dict[str, SubjectQuality] = {}
    for label, place in places.items():
        if place in known:
            found[label] = known[place][0]
    for entrant, is_floor in entrants:
        label = entrant.subject.label
        if label in found:
            scorer.progress.note(f"{label} was measured before (--fresh measures it again)")
        else:
            scorer.progress.begin(label)
            try:
                found[label] = scorer.score(entrant, is_floor)
            except MemoryBudgetError as error:
                scorer.progress.note(f"{label} is left out: {error}")
                continue
            work.add(places[label], found[label], found[label].seconds)
        if entrant.subject.method == "gptq":  # also of a version that was measured before it was known
            found[label] = replace(found[label], allocated=read_allocated(entrant.candidate.path))
        ordered = [found[name] for name in places if name in found]
        record = replace(record, subjects=(*ordered, *others.values()))
        write_record(record, output.folder)
        if settings.record:
            _record_divergence(entrant, found[label], scorer)
    return record


def _with_noise_floor(lineup: Lineup, settings: Settings) -> list[tuple[Entrant, bool]]:
    """(version, whether it is the noise floor), the noise floor first: the unquantized model in bfloat16.

    Quantized versions get the dtype of the settings.
    """
    floors = line_up(LineupRequest((lineup.source,), versions=("bfloat16",), dtype="bfloat16")).entrants
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


def _record_divergence(entrant: Entrant, quality: SubjectQuality, scorer: Scorer) -> None:
    """Write the mean KL divergence into the manifest of a folder that lowmem converted."""
    if entrant.subject.method != "gptq" or scorer.kernels:
        return
    text = next((t for t in quality.texts if t.text == "code"), quality.texts[0])
    rows, length = next(one.rows for one in scorer.texts if one.name == text.text).shape
    what = f"{text.text}, {rows} rows of {length} tokens, {entrant.subject.dtype}"
    if line := write_kld(entrant.candidate.path, text.kld.mean, what):
        scorer.progress.note(line)
