"""lowmem's GGUF files in llama.cpp, beside llama.cpp's own quantization to the same type.

    python -m lowmem.benchmarks.experiments.peers.exported           measures; writes results/export.json
    python -m lowmem.benchmarks.experiments.peers.exported --show    the committed measurement as a table

Four versions of each width: the converted checkpoint in float32 arithmetic; the exported file, dequantized
by the gguf package, in the same arithmetic, which must give the same figures; the exported file in llama.cpp,
whose activations have 8 bits; and llama.cpp's own file of the same type. The figures are those of `peers`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, made_with, origin_here, table
from lowmem.benchmarks.experiments.peers.__main__ import shown
from lowmem.benchmarks.experiments.peers.record import PeersRecord, Version
from lowmem.benchmarks.experiments.peers.run import Run, measure_versions
from lowmem.benchmarks.experiments.workers.interpreters import find_peers

from lowmem.errors import InvalidRequestError

WIDTHS = ((8, 128, "Q8_0"), (5, 128, "Q5_0"), (4, 128, "Q4_0"))
"""(bits, group size, ggml's type)."""


def render(record: PeersRecord) -> str:
    """The table, and what it was measured with."""
    texts = [text.text for text in record.versions[0].texts]
    heads = [
        "",
        "bits a weight",
        *(part for text in texts for part in (f"KL divergence: {text}", "same top-1")),
    ]
    lines = []
    for version in record.versions:
        cells = [version.subject.label, f"{version.subject.bits_per_weight:.2f}"]
        for text in version.texts:
            cells += [f"{text.kld.mean:.6f}", f"{text.same_top1:.2%}"]
        lines.append([*cells, *[f"failed: {version.failure}"] * bool(version.failure)])
    return f"{table(heads, lines)}\n\n{made_with(record.origin, record.peer_versions)}"


EXPORTED = Experiment("peers.exported", PeersRecord, RESULTS / "export.json", render)


def versions() -> tuple[Version, ...]:
    """Four versions of each width."""
    found = []
    for bits, group, kind in WIDTHS:
        checkpoint = f"lowmem-{bits}"
        label = f"{bits}-bit g{group}"
        file = f"export-{bits}"
        found += [
            Version(checkpoint, "lowmem", label, bits, group),
            Version(f"unpacked-{bits}", "none", f"its {kind} file, dequantized", of=file),
            Version(file, "llama.cpp", f"its {kind} file in llama.cpp", of=checkpoint),
            Version(f"llama-{kind}", "llama.cpp", kind),
        ]
    return tuple(found)


def measure(args: argparse.Namespace, words: Sequence[str]) -> PeersRecord:
    """Convert, export and measure. Raises LowmemError for what the user can correct."""
    peers = find_peers(args.llama_python)
    if "llama.cpp" not in peers.names:
        raise InvalidRequestError(
            "llama.cpp is missing", "Give --llama-python PYTHON that has llama-cpp-python"
        )
    source = str(embedded_model() if args.model is None else Path(args.model).expanduser().resolve())
    run = Run(source, args.work.resolve(), peers, 0, args.only, args.threads)
    run.begin(())
    prepared = run.prepare()
    origin = origin_here(EXPORTED.name, words, shown(source), prepared.fingerprint)
    # A file is made before it is dequantized.
    order = sorted(versions(), key=lambda version: version.method == "unpacked")
    found = {result.subject.label: result for result in measure_versions(run, order)}
    kept = tuple(found[version.label] for version in versions() if version.label in found)
    return PeersRecord(
        origin, prepared.calibration, 0, (("llama-cpp-python", peers.llama_version()),), (), kept
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = EXPORTED.parser(__doc__)
    add = parser.add_argument
    add("model", nargs="?", help="an unquantized model (the embedded one)")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-exported", metavar="DIR",
        help="where steps are kept (%(default)s)")  # fmt: skip
    add(
        "--only",
        type=lambda text: tuple(text.split(",")),
        metavar="LIST",
        help="versions whose names begin so",
    )
    add("--llama-python", metavar="PYTHON", help="the interpreter that has llama-cpp-python")
    add("--threads", type=int, default=2, metavar="N", help="of llama.cpp's logits (%(default)s)")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return EXPORTED.run(args, lambda: measure(args, words))


if __name__ == "__main__":
    raise SystemExit(main())
