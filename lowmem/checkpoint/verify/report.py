"""What a verification has found, and how far it is: shared by all kinds of checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lowmem.checkpoint.dequantize import PackedLinear
from lowmem.checkpoint.files.shards import Problem
from lowmem.checkpoint.formats import QuantizationFormat
from lowmem.checkpoint.packed_values import examine
from lowmem.checkpoint.verify.digests import Digests, difference
from lowmem.errors import VerifyError

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and what was found."""

    folder: Path
    ours: bool
    """There is a manifest, so all files were compared."""
    format: QuantizationFormat | None
    """Of quantized linears; None for a dense checkpoint."""
    files: int
    tensors: int
    linears: int
    """Number of quantized linears."""
    bytes: int
    """Of all files."""
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    """Worth knowing, and not damage."""

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def check(self) -> None:
        """Raise VerifyError, naming the first problem's file and tensor and the number of other problems."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise VerifyError(f"{self.problems[0]}{more}", "Convert it again, or download it again")


class Verification:
    """A verification in progress: the problems and notes so far, and the bytes that were read."""

    def __init__(self, folder: Path, names: list[str], progress: Progress | None) -> None:
        self.folder = folder
        self.names = names
        """Of the files that belong to the checkpoint."""
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.done = self.total = 0
        self.ours = False
        """There is a manifest of lowmem's."""
        self._progress = progress

    def advance(self, count: int) -> None:
        """Count bytes that were read."""
        self.done += count
        if self._progress:
            self._progress(self.done, self.total)

    def fault(self, file: str, tensor: str, what: str) -> None:
        """Record a problem."""
        self.problems.append(Problem(file, tensor, what))

    def packed_values(
        self, linear: str, packed: PackedLinear, format: QuantizationFormat, file: Callable[[str], str]
    ) -> None:
        """Check the values of a packed linear. file: from a tensor's name to that of its file."""
        found = examine(linear, packed, format)
        for fault in found.faults:
            self.fault(file(fault.tensor), fault.tensor, fault.what)
        qzeros = f"{linear}.qzeros"
        if found.note and self.ours:  # our converter writes no such zero-points
            self.fault(file(qzeros), qzeros, found.note)
        elif found.note:
            self.notes.append(f"{qzeros}: {found.note}")

    def compare(self, digests: Digests, names: Iterable[str]) -> None:
        """Record every file of `names` that differs from its digest."""
        for name in names:
            if what := difference(self.folder / name, digests.files[name], digests.origin, self.advance):
                self.fault(name, "", what)

    def size_of(self, names: Iterable[str]) -> int:
        """Bytes of these files."""
        return sum((self.folder / name).stat().st_size for name in names)

    def report(
        self, tensors: int, linears: int = 0, format: QuantizationFormat | None = None, ours: bool = False
    ) -> VerifyReport:
        """The result."""
        return VerifyReport(
            folder=self.folder,
            ours=ours,
            format=format,
            files=len(self.names),
            tensors=tensors,
            linears=linears,
            bytes=self.size_of(self.names),
            problems=tuple(self.problems),
            notes=tuple(self.notes),
        )
