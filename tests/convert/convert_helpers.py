"""A quick conversion of a tiny model, and what tests ask of its result."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from lowmem.convert.calibration import CalibrationSpec
from lowmem.convert.pipeline import convert
from lowmem.convert.recipe import Options

from lowmem.config import QuantConfig

HELDOUT = Path(__file__).parent.parent.parent / "lowmem" / "data" / "tiny-starchat" / "heldout.txt"


def calibration_file(folder: Path, characters: int = 60_000) -> Path:
    """A file of real text, enough for a few rows."""
    path = folder / "calibration.txt"
    if not path.exists():
        path.write_text(HELDOUT.read_text(encoding="utf-8")[:characters], encoding="utf-8")
    return path


def quick_convert(
    source: Path,
    out: Path,
    config: QuantConfig | None = None,
    *,
    rows: int = 8,
    row_length: int = 64,
    options: Options | None = None,
    calibration: str | None = None,
):
    """Convert with few calibration rows and at most 6 steps of tuning, in float32 on the CPU."""
    config = config or QuantConfig()
    text = calibration or str(calibration_file(out.parent))
    return convert(
        source,
        out,
        replace(config, tune_steps=min(config.tune_steps, 6)),
        calibration=CalibrationSpec(text, rows, row_length, 0),
        options=options or Options(device="cpu", compute_dtype="float32"),
    )


def digest_of(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
