"""A report as a value: what the Markdown page and the HTML page both say, computed from records alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from lowmem.benchmarks.common.records import (
    FILES,
    FOLDER,
    HumanEvalRecord,
    LatencyRecord,
    Origin,
    QualityRecord,
    Subject,
    read_record,
)
from lowmem.benchmarks.report.numbers import (
    NOTHING,
    clean,
    count,
    duration,
    percent,
    rate,
    significant,
    size,
    spread,
)
from lowmem.benchmarks.report.plots import Drawn, styles_of

from lowmem.errors import SourceError

T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """meaning: a sentence for who does not know the word; number: set to the right."""

    heading: str
    meaning: str = ""
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of ready texts. folded: shown when asked for."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False

    @property
    def name_column(self) -> int:
        """The column that names its row: the first of words."""
        return next((i for i, column in enumerate(self.columns) if not column.number), 0)


@dataclass(frozen=True)
class Section:
    """key: its id in the page. notes: below the tables."""

    key: str
    heading: str
    text: tuple[str, ...]
    tables: tuple[Table, ...]
    plot: Drawn | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tile:
    """A figure that sums up: `26 %`, what it is, and a remark."""

    figure: str
    name: str
    remark: str = ""


@dataclass(frozen=True)
class Provenance:
    """Where a record comes from: facts as (name, value)."""

    heading: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Report:
    """commands: that make the records and these pages again. tiles_of: the form that the tiles are about.
    story: sentences."""

    title: str
    subtitle: str
    tiles_of: str
    tiles: tuple[Tile, ...]
    story: tuple[str, ...]
    warnings: tuple[str, ...]
    commands: tuple[str, ...]
    sections: tuple[Section, ...]
    provenance: tuple[Provenance, ...]


@dataclass(frozen=True)
class Records:
    """What there is to report on."""

    quality: QualityRecord | None = None
    latency: LatencyRecord | None = None
    humaneval: HumanEvalRecord | None = None

    @property
    def present(self) -> tuple[QualityRecord | LatencyRecord | HumanEvalRecord, ...]:
        """Those that are there."""
        return tuple(one for one in (self.quality, self.latency, self.humaneval) if one is not None)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """Every form that was measured, once; of two by one name the first."""
        found = [entry.subject for record in self.present for entry in record.subjects]
        return tuple({subject.label: subject for subject in reversed(found)}[s] for s in _labels(found))

    @property
    def one_model(self) -> bool:
        """All records are of the same weights, so that their figures may stand in one sentence."""
        return len({record.origin.source_digest for record in self.present}) == 1


def _labels(subjects: Sequence[Subject]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(subject.label for subject in subjects))


def read_records(folder: Path) -> Records:
    """The records in `folder`. SourceError where there is none, or one is damaged."""
    records = Records(
        read_record(QualityRecord, folder),
        read_record(LatencyRecord, folder),
        read_record(HumanEvalRecord, folder),
    )
    if not records.present:
        option = "" if str(folder) == FOLDER else f" --out {folder}"
        raise SourceError(
            f"there is no record in {folder} ({', '.join(sorted(FILES.values()))})",
            f"`lowmem bench quality MODEL{option}` and `lowmem bench latency MODEL{option}` write them",
        )
    return records


def make_report(records: Records, command: str) -> Report:
    """The report on `records`. command: that makes the pages again from them."""
    from lowmem.benchmarks.report.latency import latency_sections
    from lowmem.benchmarks.report.quality import humaneval_sections, quality_sections
    from lowmem.benchmarks.report.story import hero_of, make_story, make_tiles

    records = cleaned(records)
    floors = [s.subject.label for s in records.quality.subjects if s.noise_floor] if records.quality else []
    styles = styles_of([subject.label for subject in records.subjects], floors)
    sections: list[Section] = []
    if records.quality:
        sections += quality_sections(records.quality, styles)
    if records.humaneval:
        sections += humaneval_sections(records.humaneval)
    if records.latency:
        sections += latency_sections(records.latency, styles)
    origins = [record.origin for record in records.present]
    # One model may have been measured under several names, such as two paths to it.
    named = origins[:1] if records.one_model else origins
    models = list(dict.fromkeys(short_name(origin.source) for origin in named))
    devices = list(dict.fromkeys(device_of(origin) for origin in origins))
    days = sorted({origin.date[:10] for origin in origins})
    hero = hero_of(records)
    return Report(
        title=", ".join(models),
        subtitle=" · ".join(("lowmem bench", *devices, " to ".join(dict.fromkeys((days[0], days[-1]))))),
        tiles_of=f"{hero.label}, at {significant(hero.bits_per_weight)} bits per weight" if hero else "",
        tiles=make_tiles(records),
        story=make_story(records),
        warnings=records.latency.warnings if records.latency else (),
        commands=tuple(dict.fromkeys([*(origin.command for origin in origins), clean(command, True)])),
        sections=(*sections, forms_section(records.subjects)),
        provenance=provenance_of(records),
    )


def cleaned(value: T, keep_newlines: bool = False) -> T:
    """The same value with every text in it fit for any document (see `clean`), and every whole number one
    that floats can be made of; commands keep their lines."""
    changed: Any = value
    if isinstance(value, str):
        changed = clean(value, keep_newlines)
    elif isinstance(value, int) and not isinstance(value, bool):
        changed = max(min(value, 1 << 62), -1 << 62)
    elif isinstance(value, tuple):
        changed = tuple(cleaned(one) for one in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (f.name for f in dataclasses.fields(value))
        changed = dataclasses.replace(
            value, **{name: cleaned(getattr(value, name), name == "command") for name in names}
        )
    return cast(T, changed)


def short_name(source: str) -> str:
    """A model's name for a heading: a hub id whole, of a path the last folder."""
    if source.count("/") <= 1 and not source.startswith(("/", ".", "~")):
        return source or NOTHING
    return source.rstrip("/").rpartition("/")[2] or source


def device_of(origin: Origin) -> str:
    """What it was measured on, in a few words."""
    machine = origin.machine
    if machine.device != "cpu":
        return f"{machine.device}, {size(machine.device_memory_bytes)}"
    return f"{machine.cpu}, {machine.cores} core{'s' * (machine.cores != 1)}"


def forms_section(subjects: Sequence[Subject]) -> Section:
    """Every form, and where it lies."""
    columns = (
        Column("Form", number=False),
        Column("Made by", "How its linears are stored: dense is unquantized.", False),
        Column("Arithmetic", "The dtype of the activations.", False),
        Column("Bits per weight", "All stored bits of the linears, scales included, over their weights."),
        Column("Size", "Weights of the whole model as they are held, embeddings included."),
        Column("From", number=False),
    )
    rows = tuple(
        (s.label, s.method, s.dtype, significant(s.bits_per_weight), size(s.weight_bytes), s.path)
        for s in subjects
    )
    return Section("forms", "What was compared", (), (Table("Forms of the model", columns, rows),))


def provenance_of(records: Records) -> tuple[Provenance, ...]:
    """Command, date, hardware, versions and model of every record, and what else belongs to it alone."""
    found: list[Provenance] = []
    own: tuple[tuple[str, str], ...]
    if q := records.quality:
        peak = size(q.reference_peak_bytes) if q.reference_peak_bytes else "taken from the cache"
        own = (
            ("Reference", f"logits in {q.reference_dtype}, computed in {duration(q.reference_seconds)}"),
            ("Reference's host memory", f"{peak}; its cache on disk {size(q.reference_cache_bytes)}"),
            ("Time of the forms", duration(sum(s.seconds for s in q.subjects))),
        )
        found.append(_provenance("Quality", q, own))
    if h := records.humaneval:
        own = (("Time", duration(sum(s.seconds for s in h.subjects))),)
        found.append(_provenance("HumanEval", h, own))
    if r := records.latency:
        roof = r.roofline
        own = (
            ("Rounds", f"{r.rounds}, the forms taking turns; {r.threads} thread{'s' * (r.threads != 1)}"),
            ("Memory reads", f"{spread(roof.read_bytes_per_second, 1e-9)} GB/s"),
            (
                "Matrix products",
                f"{rate(roof.matmul_flops_per_second.median, 'FLOP')} in {roof.matmul_dtype}",
            ),
            ("Drift", f"memory was read up to {percent(r.drift)} faster in one round than in another"),
        )
        found.append(_provenance("Latency", r, own))
    return tuple(found)


def _provenance(
    name: str, record: QualityRecord | HumanEvalRecord | LatencyRecord, own: Sequence[tuple[str, str]]
) -> Provenance:
    origin, machine = record.origin, record.origin.machine
    device = "CPU"
    if machine.device != "cpu":
        device = f"{machine.device}, {size(machine.device_memory_bytes)}"
    flags = f" ({', '.join(machine.flags)})" if machine.flags else ""
    facts = (
        ("Command", origin.command),
        ("Date", origin.date),
        ("Model", origin.source),
        ("Model's fingerprint", origin.source_digest),
        ("Device", device),
        ("Processor", f"{machine.cpu}{flags}, {count(machine.cores)} cores used"),
        ("Memory", size(machine.memory_bytes)),
        ("Load before", significant(origin.load_average)),
        ("Versions", ", ".join(f"{package} {version}" for package, version in origin.versions)),
        *own,
    )
    return Provenance(f"{name} ({FILES[type(record)]})", facts)
