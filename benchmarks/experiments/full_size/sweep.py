"""How time and memory of a conversion grow with layers and with calibration tokens.

    python -m lowmem.benchmarks.experiments.full_size.sweep           writes conversion_sweep.json and .svg
    python -m lowmem.benchmarks.experiments.full_size.sweep --show    the committed measurement as a table

Narrow gpt_bigcode layers with made-up weights (`starchat/plausible.py`) are converted by `lowmem convert` in
processes of their own: 2 to 16 layers on the same tokens, then the same layers on 4,096 to 32,768 tokens.
A least-squares line through the times shows how linear they are. Takes a few minutes.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, made_with, origin_here, say, table
from lowmem.benchmarks.experiments.processes import Usage, run_process
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions

LAYERS = (2, 4, 8, 16)
ROWS = (8, 16, 32, 64)
ROW_LENGTH = 512
USUAL_LAYERS, USUAL_ROWS = 4, 16
SCALE = 16
"""All dimensions are StarChat Alpha's over this."""
PHASES = ("forward", "hessian", "factor", "quantize", "tune", "pack", "read", "write")


@dataclass(frozen=True)
class Point:
    """One conversion."""

    layers: int
    tokens: int
    seconds: float
    phases: tuple[float, ...]
    """Seconds by PHASES."""
    planned_bytes: int
    hidden_bytes: int
    """Hidden states between two layers, where they fit in memory: linear in tokens by design."""
    usage: Usage


@dataclass(frozen=True)
class Sweep:
    """`conversion_sweep.json`."""

    origin: Origin
    by_layers: tuple[Point, ...]
    by_tokens: tuple[Point, ...]


@dataclass(frozen=True)
class Line:
    """A least-squares line."""

    offset: float
    slope: float
    farthest: float
    """The largest distance of a point, as a share of the line's value there."""


def dimensions_of(layers: int) -> Dimensions:
    """Those of the sweep."""
    return Dimensions(layers, 6144 // SCALE, 48 // SCALE, 1024, 4096)


def measure(work: Path, layers: int, rows: int, options: Sequence[str]) -> Point:
    """Convert `layers` layers with `rows` calibration rows, in `work`."""
    source = work / f"source{layers}"
    if not source.exists():
        from lowmem.benchmarks.experiments.starchat.plausible import write_plausible

        write_plausible(source, dimensions_of(layers))
    log = work / "log"
    command = [sys.executable, "-m", "lowmem", "convert", str(source), str(work / "out"), "--force", "--json"]
    command += ["--device", "cpu", "--rows", str(rows), "--row-length", str(ROW_LENGTH), *options]
    usage = run_process(command, log)
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"event"')]
    plan = next(event for event in events if event["event"] == "started")["plan"]
    finished = next(event for event in events if event["event"] == "finished")
    point = Point(
        layers=layers,
        tokens=rows * ROW_LENGTH,
        seconds=finished["total_seconds"],
        phases=tuple(round(finished["seconds"].get(name, 0.0), 3) for name in PHASES),
        planned_bytes=plan["host_peak"],
        hidden_bytes=plan["hidden_bytes"] * plan["keep_hidden"],
        usage=usage,
    )
    say(f"{layers} layers, {point.tokens} tokens: {point.seconds:.1f} s, {_mib(point)} MiB")
    return point


def line_through(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Fit a line to the points by least squares; also returns the largest relative error."""
    slope, offset = np.polyfit(xs, ys, 1)
    there = offset + slope * np.asarray(xs)
    return Line(offset, slope, float(np.max(np.abs(np.asarray(ys) - there) / np.maximum(there, 1e-9))))


def _mib(point: Point) -> str:
    return f"{point.usage.peak_bytes / 2**20:.0f}"


def render(record: Sweep) -> str:
    """The measurement as Markdown."""
    rows = [
        [str(p.layers), f"{p.tokens:,}", *(f"{x:.1f}" for x in (p.seconds, *p.phases)), f"{_mib(p)} MiB"]
        for p in (*record.by_layers, *record.by_tokens)
    ]
    layers = line_through([p.layers for p in record.by_layers], [p.seconds for p in record.by_layers])
    tokens = line_through([p.tokens for p in record.by_tokens], [p.seconds for p in record.by_tokens])
    peaks = [point.usage.peak_bytes for point in record.by_layers]
    return "\n\n".join(
        (
            table(("layers", "tokens", "seconds", *PHASES, "peak memory"), rows),
            f"A layer takes {layers.slope:.2f} s, 1,000 tokens {1000 * tokens.slope:.2f} s; no time is more "
            f"than {layers.farthest:.0%} (layers) and {tokens.farthest:.0%} (tokens) from a straight line. "
            f"Peak memory differs by {(max(peaks) - min(peaks)) / 2**20:.0f} MiB between {min(LAYERS)} and "
            f"{max(LAYERS)} layers.",
            made_with(record.origin),
        )
    )


def draw(record: Sweep) -> str:
    """Seconds and peak memory against layers and tokens, as SVG; readable on light and dark backgrounds."""
    import matplotlib
    from matplotlib.figure import Figure

    def seconds(point: Point) -> float:
        return point.seconds

    def memory(point: Point) -> float:
        return point.usage.peak_bytes / 2**20

    grey, colors = "#808080", ("#3987e5", "#d95926")
    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "sweep",
        "text.color": grey,
        "axes.edgecolor": grey,
    }
    settings |= {"axes.labelcolor": grey, "xtick.color": grey, "ytick.color": grey, "axes.titlesize": 11}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, 6), layout="constrained")
        grid = figure.subplots(2, 2, sharey="row")
        for row, (title, value) in enumerate((("seconds", seconds), ("peak memory, MiB", memory))):
            layers = [(float(point.layers), value(point)) for point in record.by_layers]
            tokens = [(point.tokens / 1000, value(point)) for point in record.by_tokens]
            found: list[tuple[float, float]]
            for axes, along, found in zip(
                grid[row], ("layers", "1,000 tokens"), (layers, tokens), strict=True
            ):
                xs, ys = [x for x, _ in found], [y for _, y in found]
                line = line_through(xs, ys)
                axes.plot([0, max(xs)], [line.offset, line.offset + line.slope * max(xs)], "--", color=grey)
                axes.plot(xs, ys, "o", color=colors[row])
                axes.set(title=f"{title}, by {along}", xlim=(0, None), ylim=(0, None), xticks=xs)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code. Further options are those of `lowmem convert`."""
    experiment = Experiment("full_size.sweep", Sweep, RESULTS / "conversion_sweep.json", render)
    words = list(sys.argv[1:] if argv is None else argv)
    args, options = experiment.parser(__doc__).parse_known_args(words)

    def sweep() -> Sweep:
        name = f"StarChat Alpha's dimensions over {SCALE}, made-up weights"
        origin = origin_here("full_size.sweep", words, name)
        with tempfile.TemporaryDirectory(prefix="conversion-sweep-") as folder:
            work = Path(folder)
            by_layers = tuple(measure(work, n, USUAL_ROWS, options) for n in LAYERS)
            by_tokens = tuple(measure(work, USUAL_LAYERS, n, options) for n in ROWS)
        record = Sweep(origin, by_layers, by_tokens)
        args.out.with_suffix(".svg").write_text(draw(record), encoding="utf-8")
        return record

    return experiment.run(args, sweep)


if __name__ == "__main__":
    raise SystemExit(main())
