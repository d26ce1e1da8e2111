"""Results of a measurement that is not finished, so that an interrupted one resumes.

Every line is a JSON object with one result and the digest of all that the result depends on. Lines are only
appended: lines of other settings do no harm, and a damaged line, as a power cut leaves it, is skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from lowmem.benchmarks.common.record_file import from_json, to_json

from lowmem.checkpoint.files.whole import as_output_error

Place = tuple[str | int, ...]
"""What a result is of, such as (round, label) or (task, sample)."""
T = TypeVar("T")


def digest_of(key: object) -> str:
    """Compute a short digest of a JSON value."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class WorkFile(Generic[T]):
    """The results of one measurement in its work file."""

    file: Path
    kind: type[T]
    """Of a result: a dataclass."""
    key: str
    """Digest of all that results depend on; results with another key are ignored."""
    max_age: float = math.inf
    """Seconds after which a result is ignored."""
    clock: Callable[[], float] = time.time

    def read(self) -> dict[Place, tuple[T, float]]:
        """Read the results: a mapping from place to (result, seconds that it took)."""
        found: dict[Place, tuple[T, float]] = {}
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return {}
        for line in lines:
            try:
                data = json.loads(line)
                if data["key"] == self.key and 0 <= self.clock() - data["time"] <= self.max_age:
                    value: T = from_json(self.kind, data["result"])
                    found[tuple(data["place"])] = value, float(data["seconds"])
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def add(self, place: Place, result: T, seconds: float) -> None:
        """Append one result and flush it to disk. Raises OutputError if that fails."""
        line = {"key": self.key, "time": self.clock(), "seconds": seconds, "place": place}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a+b") as stream:
                if stream.tell():
                    stream.seek(-1, os.SEEK_END)
                    if stream.read(1) != b"\n":  # half a line of an interrupted run
                        stream.write(b"\n")
                stream.write(json.dumps({**line, "result": to_json(result)}).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise as_output_error(error, self.file) from error

    def remove(self) -> None:
        """Delete the file."""
        self.file.unlink(missing_ok=True)
