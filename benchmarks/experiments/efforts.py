"""What each effort of `lowmem convert` gives: the embedded model at several widths, in one run.

    python -m lowmem.benchmarks.experiments.efforts                    writes results/efforts.json
    python -m lowmem.benchmarks.experiments.efforts --only 2bit,3bit   some widths
    python -m lowmem.benchmarks.experiments.efforts --show             the committed measurement as a table

Every version is made by `lowmem convert --effort` and measured by `lowmem bench quality`. The converter was
developed with the KL divergence on code in sight; prose, dialogues and HumanEval's solutions were only looked
at. Finished versions are kept in --work.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem.benchmarks.common.record_file import FILES, FOLDER, read
from lowmem.benchmarks.common.records import Origin, QualityRecord, SubjectQuality
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.common import (
    RESULTS,
    Experiment,
    made_with,
    origin_here,
    say,
    table,
)
from lowmem.benchmarks.experiments.reports import lowmem

from lowmem.config import EFFORTS

TEXTS = ("code", "prose", "dialogues", "humaneval")
WIDTHS = ((2, 32), (2, 64), (3, 64), (3, 128), (4, 128))
"""(bits, group size)."""
WORK = Path(tempfile.gettempdir()) / "lowmem-efforts"


@dataclass(frozen=True)
class Version:
    """One conversion."""

    effort: str
    seconds: float
    """Of the whole command."""
    quality: SubjectQuality


@dataclass(frozen=True)
class Efforts:
    """`efforts.json`."""

    origin: Origin
    versions: tuple[Version, ...]


def measured(work: Path, bits: int, group: int, effort: str) -> Version:
    """Convert and measure one version in a folder of its own, unless that is done."""
    folder = work / f"{bits}bit-g{group}-{effort}"
    record = folder / FOLDER / FILES[QualityRecord]
    if not record.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "tiny-starchat").is_dir():
            shutil.copytree(embedded_model(), folder / "tiny-starchat")
        width = ("--bits", str(bits), "--group-size", str(group))
        if not (folder / "seconds.json").is_file():
            begun = time.monotonic()
            lowmem(folder, "convert", "tiny-starchat", "version", *width, "--effort", effort, "--force")
            (folder / "seconds.json").write_text(json.dumps(time.monotonic() - begun))
        options = ("--reference", "tiny-starchat", "--texts", ",".join(TEXTS))
        lowmem(folder, "bench", "quality", "version", *options)
    seconds = json.loads((folder / "seconds.json").read_bytes())
    found: QualityRecord = read(QualityRecord, record, "lowmem.benchmarks.experiments.efforts")
    (subject,) = (one for one in found.subjects if not one.noise_floor)
    return Version(effort, seconds, subject)


def render(record: Efforts) -> str:
    """A row for each version: the divergence on each text, and how HumanEval and greedy answers move."""
    heads = ["version", "effort", *(f"KL divergence: {name}" for name in TEXTS)]
    heads += ["same top-1: code", "same top-1: humaneval", "perplexity: humaneval"]
    heads += ["greedy tokens alike", "conversion"]
    lines = []
    for one in record.versions:
        texts = {text.text: text for text in one.quality.texts}
        greedy = one.quality.greedy
        lines.append(
            [
                one.quality.subject.label,
                one.effort,
                *(f"{texts[name].kld.mean:.5f}" for name in TEXTS),
                *(f"{100 * texts[name].same_top1:.2f}%" for name in ("code", "humaneval")),
                f"{texts['humaneval'].ppl_ratio:.4f} ×",
                "" if greedy is None else f"{sum(greedy.equal_tokens)} of {sum(greedy.answer_tokens)}",
                f"{one.seconds:.0f} s",
            ]
        )
    return "\n\n".join((table(heads, lines), made_with(record.origin)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    experiment = Experiment("efforts", Efforts, RESULTS / "efforts.json", render)
    parser = experiment.parser(__doc__)
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="kept files (%(default)s)")
    parser.add_argument("--only", metavar="LIST", default="", help="beginnings of names, such as 2bit-g32")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)

    def all_of_them() -> Efforts:
        origin = origin_here("efforts", words, "tiny-starchat")
        wanted = tuple(args.only.split(","))
        found = []
        for bits, group in WIDTHS:
            for effort in EFFORTS:
                if f"{bits}bit-g{group}-{effort}".startswith(wanted):
                    say(f"{bits} bits in groups of {group}, effort {effort}")
                    found.append(measured(args.work.resolve(), bits, group, effort))
        return Efforts(origin, tuple(found))

    return experiment.run(args, all_of_them)


if __name__ == "__main__":
    sys.exit(main())
