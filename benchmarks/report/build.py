"""Records → Report: the sections in their order, and where the figures come from."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.benchmarks.common.record_file import FILES
from lowmem.benchmarks.common.records import HumanEvalRecord, LatencyRecord, Origin, QualityRecord, Subject
from lowmem.benchmarks.report.allocation_sections import allocation_sections
from lowmem.benchmarks.report.document import Column, Provenance, Report, Section, Table
from lowmem.benchmarks.report.inputs import Records, cleaned
from lowmem.benchmarks.report.latency_sections import latency_sections
from lowmem.benchmarks.report.numbers import (
    NOTHING,
    clean,
    duration,
    percent,
    plural,
    rate,
    significant,
    size,
    spread,
)
from lowmem.benchmarks.report.quality_sections import humaneval_sections, quality_sections
from lowmem.benchmarks.report.story import Headline, make_story, make_tiles
from lowmem.benchmarks.report.svg import styles_of


def make_report(records: Records, command: str) -> Report:
    """Create the report on `records`. command: the command line that produces the pages again."""
    records = cleaned(records)
    floors = [s.subject.label for s in records.quality.subjects if s.noise_floor] if records.quality else []
    styles = styles_of([subject.label for subject in records.subjects], floors)
    sections: list[Section] = []
    if records.quality:
        sections += quality_sections(records.quality, styles)
        sections += allocation_sections(records.quality)
    if records.humaneval:
        sections += humaneval_sections(records.humaneval)
    if records.latency:
        sections += latency_sections(records.latency, styles)
    origins = [record.origin for record in records.present]
    # One model may have been measured under several names, such as two paths to it.
    named = origins[:1] if records.one_model else origins
    devices = dict.fromkeys(device_of(origin) for origin in origins)
    days = sorted({origin.date[:10] for origin in origins})
    headline = Headline.of(records)
    return Report(
        title=", ".join(dict.fromkeys(short_name(origin.source) for origin in named)),
        subtitle=" · ".join(("lowmem bench", *devices, " to ".join(dict.fromkeys((days[0], days[-1]))))),
        tiles_of=headline.title if headline else "",
        tiles=make_tiles(headline) if headline else (),
        story=make_story(headline, records),
        warnings=records.latency.warnings if records.latency else (),
        commands=tuple(dict.fromkeys([*(origin.command for origin in origins), clean(command, True)])),
        sections=(*sections, versions_section(records.subjects)),
        provenance=tuple(provenance_of(record) for record in records.present),
    )


def short_name(source: str) -> str:
    """Shorten a model's name for a heading: a hub id is unchanged, a path becomes its last folder."""
    if source.count("/") <= 1 and not source.startswith(("/", ".", "~")):
        return source or NOTHING
    return source.rstrip("/").rpartition("/")[2] or source


def device_of(origin: Origin) -> str:
    """Describe the device of a measurement: the card and its memory, or the processor and its cores."""
    machine = origin.machine
    if machine.device != "cpu":
        return f"{machine.device}, {size(machine.device_memory_bytes)}"
    return f"{machine.cpu}, {plural(machine.cores, 'core')}"


def versions_section(subjects: Sequence[Subject]) -> Section:
    """Create the section that lists every measured version of the model."""
    columns = (
        Column("Version", number=False),
        Column("Method", "How its linears are stored: dense is unquantized.", False),
        Column("Arithmetic", "The dtype of the activations.", False),
        Column("Bits per weight", "All stored bits of the linears, scales included, per weight."),
        Column("Size", "Weights of the whole model in memory, embeddings included."),
        Column("From", number=False),
        Column("Made with", "Converter recipe of a folder that lowmem converted; kernels that ran.", False),
    )
    rows = tuple(
        (
            s.label,
            s.method,
            s.dtype,
            significant(s.bits_per_weight),
            size(s.weight_bytes),
            s.path,
            s.made_with.describe() if s.made_with else NOTHING,
        )
        for s in subjects
    )
    return Section("versions", "What was compared", (), (Table("Versions of the model", columns, rows),))


def provenance_of(record: QualityRecord | HumanEvalRecord | LatencyRecord) -> Provenance:
    """Return command, date, hardware and software of a record, and details of its kind."""
    own: tuple[tuple[str, str], ...]
    if isinstance(record, QualityRecord):
        peak = "taken from the cache"
        if record.reference_peak_bytes:
            peak = size(record.reference_peak_bytes)
        computed = duration(record.reference_seconds)
        name, own = "Quality", (
            ("Reference", f"logits in {record.reference_dtype}, computed in {computed}"),
            ("Memory of the reference", f"{peak}; {size(record.reference_cache_bytes)} cached on disk"),
            ("Time for all versions", duration(sum(s.seconds for s in record.subjects))),
        )  # fmt: skip
    elif isinstance(record, HumanEvalRecord):
        name, own = "HumanEval", (("Time", duration(sum(s.seconds for s in record.subjects))),)
    else:
        roof = record.roofline
        flops = rate(roof.matmul_flops_per_second.median, "FLOP")
        name, own = "Latency", (
            ("Rounds", f"{record.rounds}, versions interleaved; {plural(record.threads, 'thread')}"),
            ("Memory bandwidth", f"{spread(roof.read_bytes_per_second, 1e-9)} GB/s"),
            ("Matrix products", f"{flops} in {roof.matmul_dtype}"),
            ("Drift", f"memory bandwidth differed by up to {percent(record.drift)} between rounds"),
        )  # fmt: skip
    origin, machine = record.origin, record.origin.machine
    device = device_of(origin) if machine.device != "cpu" else "CPU"
    flags = f" ({', '.join(machine.flags)})" if machine.flags else ""
    facts = (
        ("Command", origin.command),
        ("Date", origin.date),
        ("Model", origin.source),
        ("Model's fingerprint", origin.source_digest),
        ("Device", device),
        ("Processor", f"{machine.cpu}{flags}, {plural(machine.cores, 'core')} used"),
        ("Memory", size(machine.memory_bytes)),
        ("Load before", significant(origin.load_average)),
        ("Software", ", ".join(f"{package} {version}" for package, version in origin.versions)),
        *own,
    )
    return Provenance(f"{name} ({FILES[type(record)]})", facts)
