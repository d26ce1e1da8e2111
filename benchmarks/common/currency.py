"""Whether a record's figures are of today's code: which kernels ran, and which recipe converted a folder.

A committed page must be of the code that it stands beside. `outdated` compares what a record says it was made
with to what lowmem has now; without a difference the figures are current.
"""

from __future__ import annotations

from pathlib import Path

from lowmem.benchmarks.common.records import HumanEvalRecord, LatencyRecord, MadeWith, QualityRecord
from lowmem.convert.recipe import RECIPE_VERSION

from lowmem.checkpoint.files.reading import read_json
from lowmem.checkpoint.manifest import REPORT_FILE
from lowmem.errors import LowmemError

KERNELS = 6
"""The version of our C kernels that a figure is of. Raise it when their results or their speed change; that
of the headers (LM_CONTRACT) also changes when only a structure does."""
OURS = "lowmem "
"""How the names of lowmem's own C kernels begin, before the instruction set."""


def made_with(folder: Path, kernel: str = "") -> MadeWith:
    """Describe the kernels and recipe that a version in `folder` is measured with now.

    kernel: the kernel's name, or "" if linears are dequantized.
    """
    ours = kernel.startswith(OURS)
    return MadeWith(kernel, KERNELS if ours else 0, recipe_version(folder))


def recipe_version(folder: Path) -> int:
    """Read the recipe version from the report of a converted folder; 0 if it has no report."""
    try:
        recipe = read_json(folder / REPORT_FILE).get("recipe")
    except LowmemError:
        return 0
    version = recipe.get("recipe version", 1) if isinstance(recipe, dict) else None
    return version if isinstance(version, int) and not isinstance(version, bool) else 0


def outdated(record: QualityRecord | HumanEvalRecord | LatencyRecord) -> tuple[str, ...]:
    """Return a line for each version that was measured with kernels or a recipe that lowmem has since
    replaced.
    """
    found = []
    for subject in (entry.subject for entry in record.subjects):
        known = subject.made_with
        if known is None:
            found.append(f"{subject.label}: the record does not say what it was measured with")
            continue
        if subject.method == "gptq" and known.recipe != RECIPE_VERSION:
            found.append(f"{subject.label}: converted by recipe {known.recipe}, now {RECIPE_VERSION}")
        if known.kernel_contract and known.kernel_contract != KERNELS:
            found.append(f"{subject.label}: ran kernels {known.kernel_contract}, now {KERNELS}")
    return tuple(found)


def is_current(record: QualityRecord | HumanEvalRecord | LatencyRecord) -> bool:
    """Whether every figure of the record was measured with the current kernels and recipe."""
    return not outdated(record)
