"""Predicted against real memory, for every version of a model on the CPU.

    python -m lowmem.benchmarks.experiments.full_size.peak_memory [MODEL…] [--layers N] [--out FILE]

Each version is loaded in a process of its own, which first loads and runs the embedded model in the same
version, so that libraries are loaded and warm. The peak resident memory of the load, a prefill of the whole
context and a few decoded tokens, less the memory before, is compared with the planner's prediction (without
the process's own memory). Linux's high-water mark is reset before the load.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.experiments.common import origin_here, say, table, write

from lowmem.plan.request import ModelRequest, plan_for

TOLERANCE = 64 << 20
SHARE = 0.05
NEW_TOKENS = 6
MODULE = "lowmem.benchmarks.experiments.full_size.peak_memory"


@dataclass(frozen=True)
class Measured:
    """One version; bytes."""

    model: str
    label: str
    context: int
    weights: int
    """Predicted, like the next two."""
    kv_cache: int
    workspace: int
    load: int
    """Peak while loading."""
    peak: int
    """Peak of everything."""
    own: int
    """Resident before the load."""

    @property
    def predicted(self) -> int:
        """The planner's prediction."""
        return self.weights + self.kv_cache + self.workspace

    @property
    def error(self) -> int:
        """Predicted less measured."""
        return self.predicted - self.peak

    @property
    def within(self) -> bool:
        """Within 5 % or 64 MiB, whichever is larger."""
        return abs(self.error) <= max(SHARE * self.peak, TOLERANCE)


@dataclass(frozen=True)
class MemoryRecord:
    """The file of --out. results/memory.json holds the rows of three commands."""

    origin: Origin
    rows: tuple[Measured, ...]


def measure(model: str, context: int | None = None, only: set[str] | None = None) -> list[Measured]:
    """Every version of `model` on the CPU, or those with the labels `only`, each in a process of its own."""
    plan = plan_for(ModelRequest(model, device="cpu", context=context))
    found = []
    for option in plan.options:
        candidate, need = option.candidate, option.need
        if only is not None and candidate.label not in only:
            continue
        words = [str(candidate.path), candidate.form.method, candidate.form.dtype, str(plan.context)]
        command = [sys.executable, "-m", MODULE, "--child", *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{candidate.label} of {model} failed:\n{result.stderr}")
        figures = json.loads(result.stdout.splitlines()[-1])
        sizes = (need.weights, need.kv_cache, need.workspace)
        found.append(Measured(Path(model).name, candidate.label, plan.context, *sizes, **figures))
    return found


def child(path: str, method: str, dtype: str, context: int) -> dict[str, int]:
    """Load and run one version: the measured fields of `Measured`."""
    import gc

    import torch
    from lowmem.benchmarks.demo import embedded_model

    from lowmem.config import SamplingParams
    from lowmem.loading.loader import LoadOptions, load
    from lowmem.plan import device as machine
    from lowmem.session import Session

    on_the_fly = method if method in ("int8", "nf4") else None
    kind = getattr(torch, dtype)
    warm = Session(load(embedded_model(), LoadOptions(dtype=kind, on_the_fly=on_the_fly)))  # type: ignore[arg-type]
    warm.complete("def", SamplingParams(max_new_tokens=2, temperature=0), raw=True)
    del warm
    gc.collect()
    before = machine.host_memory_used()
    Path("/proc/self/clear_refs").write_text("5")  # Linux resets the process's high-water mark
    loaded = load(path, LoadOptions(dtype=kind, on_the_fly=on_the_fly, context=context))  # type: ignore[arg-type]
    after_load = machine.host_memory_peak() - before
    engine = Session(loaded).engine
    ids = [1 + i * 7919 % 4000 for i in range(context - NEW_TOKENS)]
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.2)
    assert len(list(engine.generate(ids, params))) > 0
    return {"load": after_load, "peak": machine.host_memory_peak() - before, "own": before}


def render(found: list[Measured]) -> str:
    """Markdown, MiB."""
    lines = []
    for row in found:
        sizes = (row.weights, row.kv_cache, row.workspace, row.predicted, row.peak)
        cells = (f"{size / 2**20:,.0f}" for size in sizes)
        error = f"{row.error / 2**20:+,.0f} ({row.error / row.peak:+.1%})"
        lines.append((row.model, row.label, str(row.context), *cells, error, "yes" if row.within else "NO"))
    heads = (
        "model",
        "version",
        "context",
        "weights",
        "KV",
        "work",
        "predicted",
        "measured",
        "error",
        "within",
    )
    return table(heads, lines)


def main() -> int:
    """The command; 1 if a prediction is not within the tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="*", help="folders or files (the embedded model)")
    parser.add_argument("--layers", type=int, metavar="N", help="also StarChat Alpha's layout with N layers")
    parser.add_argument("--context", type=int, metavar="N", help="tokens to plan for and to fill")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        path, method, dtype, context = args.child
        print(json.dumps(child(path, method, dtype, int(context))))
        return 0
    origin = origin_here("full_size.peak_memory", sys.argv[1:], "all versions on the CPU")
    found: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="lowmem-memory-") as temporary:
        models = args.model or [str(_embedded(Path(temporary) / "tiny-starchat"))]
        if args.layers:
            models.append(str(_shaped(Path(temporary) / "starchat-shaped", args.layers)))
        for model in models:
            found += measure(model, args.context)
            say(f"{model}: done")
    print(render(found))
    if args.out:
        write(MemoryRecord(origin, tuple(found)), args.out)
    return 0 if all(row.within for row in found) else 1


def _embedded(folder: Path) -> Path:
    """The embedded model with its converted versions beside it."""
    from lowmem.benchmarks.demo import embedded_model
    from lowmem.convert import convert
    from lowmem.convert.calibration import CalibrationSpec

    from lowmem.config import BITS, QuantConfig

    shutil.copytree(embedded_model(), folder)
    for bits in BITS:
        spec = CalibrationSpec(rows=4, row_length=128)
        out = folder.with_name(f"{folder.name}-{bits}bit")
        convert(folder, out, QuantConfig(bits=bits), calibration=spec)
    return folder


def _shaped(folder: Path, layers: int) -> Path:
    """StarChat Alpha's layout in all versions."""
    from lowmem.benchmarks.experiments.starchat.dimensions import WIDTHS, Dimensions
    from lowmem.benchmarks.experiments.starchat.random_weights import write_packed, write_source

    dimensions = Dimensions(layers)
    write_source(folder, dimensions)
    for bits, group_size in WIDTHS:
        write_packed(folder.with_name(f"{folder.name}-{bits}bit"), dimensions, bits, group_size)
    return folder


if __name__ == "__main__":
    sys.exit(main())
