"""Predicted against real memory, for every form of a model on the CPU: `python -m lowmem.benchmarks.experiments.full_size.memory MODEL`.

Each form is loaded in a process of its own, which first loads and runs the embedded model in the same form,
so that libraries are there and warm. What is measured then is the most resident memory from the load over a
prefill of the whole context to a few decoded tokens, less what was resident before: Linux's high-water mark,
reset in between. It is compared with what the planner says the form needs, the process's own context left
out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from lowmem.benchmarks.common.processes import hardware

from lowmem.plan.request import ModelRequest, plan_for

TOLERANCE = 64 << 20
SHARE = 0.05
NEW_TOKENS = 6


@dataclass(frozen=True)
class Measured:
    """One form; bytes. load: the most while loading; peak: the most at all; own: resident before it began."""

    model: str
    label: str
    context: int
    weights: int
    kv_cache: int
    workspace: int
    load: int
    peak: int
    own: int

    @property
    def predicted(self) -> int:
        """What the planner says."""
        return self.weights + self.kv_cache + self.workspace

    @property
    def error(self) -> int:
        """Predicted less measured."""
        return self.predicted - self.peak

    @property
    def within(self) -> bool:
        """Within 5 % or 64 MiB, whichever is larger."""
        return abs(self.error) <= max(SHARE * self.peak, TOLERANCE)


def measure(model: str, context: int | None = None, only: set[str] | None = None) -> list[Measured]:
    """Every form of `model` on the CPU (or those with the labels in `only`), each in a process of its own."""
    plan = plan_for(ModelRequest(model, device="cpu", context=context))
    found = []
    for option in plan.options:
        if only is not None and option.candidate.label not in only:
            continue
        candidate, need = option.candidate, option.need
        command = [
            sys.executable,
            "-m",
            "lowmem.benchmarks.experiments.full_size.memory",
            "--child",
            str(candidate.path),
        ]
        command += [candidate.form.method, candidate.form.dtype, str(plan.context)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{candidate.label} of {model} failed:\n{result.stderr}")
        numbers = json.loads(result.stdout.splitlines()[-1])
        found.append(
            Measured(
                Path(model).name,
                candidate.label,
                plan.context,
                need.weights,
                need.kv_cache,
                need.workspace,
                **numbers,
            )
        )
    return found


def child(path: str, method: str, dtype: str, context: int) -> dict[str, int]:
    """Load and run one form, and tell what it took."""
    import gc

    import torch
    from lowmem.benchmarks.demo import embedded_model

    from lowmem.config import SamplingParams
    from lowmem.loading.loader import load
    from lowmem.plan import device as machine
    from lowmem.session import Session

    on_the_fly = method if method in ("int8", "nf4") else None
    kind = getattr(torch, dtype)
    warm = Session(load(embedded_model(), dtype=kind, on_the_fly=on_the_fly))  # type: ignore[arg-type]
    warm.complete("def", SamplingParams(max_new_tokens=2, temperature=0), raw=True)
    del warm
    gc.collect()
    before = machine.host_memory_used()
    _reset_peak()
    loaded = load(path, dtype=kind, on_the_fly=on_the_fly, context=context)  # type: ignore[arg-type]
    after_load = machine.host_memory_peak() - before
    engine = Session(loaded).engine
    ids = [1 + i * 7919 % 4000 for i in range(context - NEW_TOKENS)]
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.2)
    assert len(list(engine.generate(ids, params))) > 0
    return {"load": after_load, "peak": machine.host_memory_peak() - before, "own": before}


def _reset_peak() -> None:
    """Have Linux forget the process's high-water mark."""
    Path("/proc/self/clear_refs").write_text("5")


def print_table(rows: list[Measured]) -> None:
    """Markdown, MiB."""
    print("| model | form | context | weights | KV | work | predicted | measured | error | within |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|---|")
    for row in rows:
        sizes = (row.weights, row.kv_cache, row.workspace, row.predicted, row.peak)
        cells = " | ".join(f"{size / 2**20:,.0f}" for size in sizes)
        error = f"{row.error / 2**20:+,.0f} ({row.error / row.peak:+.1%})"
        verdict = "yes" if row.within else "NO"
        print(f"| {row.model} | {row.label} | {row.context} | {cells} | {error} | {verdict} |")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="*", help="folders or files; the embedded model when left out")
    parser.add_argument("--layers", type=int, metavar="N", help="also StarChat Alpha's layout with N layers")
    parser.add_argument("--context", type=int, metavar="N", help="tokens to plan for and to fill")
    parser.add_argument("--out", metavar="FILE", help="write the figures there, as JSON")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        path, method, dtype, context = args.child
        print(json.dumps(child(path, method, dtype, int(context))))
        return 0
    rows: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="lowmem-memory-") as temporary:
        models = args.model or [str(_embedded(Path(temporary) / "tiny-starchat"))]
        if args.layers:
            models.append(str(_shaped(Path(temporary) / "starchat-shaped", args.layers)))
        for model in models:
            rows += measure(model, args.context)
            for row in rows[-1:]:
                print(f"{row.model}: done", file=sys.stderr)
    print_table(rows)
    if args.out:
        data = {"machine": hardware(), "command": sys.argv[1:], "rows": [asdict(row) for row in rows]}
        Path(args.out).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row.within for row in rows) else 1


def _embedded(folder: Path) -> Path:
    """The embedded model with its converted forms beside it."""
    import shutil

    from lowmem.benchmarks.demo import embedded_model
    from lowmem.convert import convert
    from lowmem.convert.calibration import CalibrationSpec

    from lowmem.config import BITS, QuantConfig

    shutil.copytree(embedded_model(), folder)
    for bits in BITS:
        spec = CalibrationSpec(rows=4, row_length=128)
        convert(
            folder, folder.with_name(f"{folder.name}-{bits}bit"), QuantConfig(bits=bits), calibration=spec
        )
    return folder


def _shaped(folder: Path, layers: int) -> Path:
    """StarChat Alpha's layout in all forms."""
    from lowmem.benchmarks.experiments.full_size.shaped import Dimensions, write_packed, write_source

    dimensions = Dimensions(layers)
    write_source(folder, dimensions)
    for bits, group_size in ((8, 128), (4, 128), (3, 64), (2, 32)):
        write_packed(folder.with_name(f"{folder.name}-{bits}bit"), dimensions, bits, group_size)
    return folder


if __name__ == "__main__":
    sys.exit(main())
