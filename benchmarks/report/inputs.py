"""The records that a report is made of, read and made safe to print."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from lowmem.benchmarks.common.record_file import FILES, FOLDER, read_record
from lowmem.benchmarks.common.records import HumanEvalRecord, LatencyRecord, QualityRecord, Subject
from lowmem.benchmarks.report.numbers import clean

from lowmem.errors import SourceError

T = TypeVar("T")


@dataclass(frozen=True)
class Records:
    """The records of one folder; a kind that was not measured is None."""

    quality: QualityRecord | None = None
    latency: LatencyRecord | None = None
    humaneval: HumanEvalRecord | None = None

    @property
    def present(self) -> tuple[QualityRecord | LatencyRecord | HumanEvalRecord, ...]:
        """The records that exist."""
        return tuple(one for one in (self.quality, self.latency, self.humaneval) if one is not None)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """Every measured version once; of two with one label, the first."""
        found: dict[str, Subject] = {}
        for record in self.present:
            for entry in record.subjects:
                found.setdefault(entry.subject.label, entry.subject)
        return tuple(found.values())

    @property
    def one_model(self) -> bool:
        """Whether all records measure the same weights, so that their figures can be combined."""
        return len({record.origin.source_digest for record in self.present}) == 1


def read_records(folder: Path) -> Records:
    """Read the records in `folder`. Raises SourceError if there are none, or if one is damaged."""
    records = Records(
        read_record(QualityRecord, folder),
        read_record(LatencyRecord, folder),
        read_record(HumanEvalRecord, folder),
    )
    if not records.present:
        option = "" if str(folder) == FOLDER else f" --out {folder}"
        raise SourceError(
            f"{folder} has no record ({', '.join(sorted(FILES.values()))})",
            f"Measure first: `lowmem bench quality MODEL{option}` or `lowmem bench latency MODEL{option}`",
        )
    return records


def cleaned(value: T, keep_newlines: bool = False) -> T:
    """Copy a value, with texts made safe for any document (see `clean`) and integers that fit a float.

    Commands keep their line breaks.
    """
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
