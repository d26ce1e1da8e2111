"""How time and memory of a conversion grow with layers and with calibration tokens.

    python -m lowmem.benchmarks.experiments.full_size.conversion_sweep           small layers, a few minutes; writes
                                                    results/conversion_sweep.json and .svg
    python -m lowmem.benchmarks.experiments.full_size.conversion_sweep --show    the committed measurement as a table

Layers of gpt_bigcode with made-up weights (benchmarks/experiments/peers/starchat_layer.py) are converted by `lowmem convert` in
processes of their own: 2 to 16 layers on the same tokens, then the same layers on 4,096 to 32,768 tokens. A
straight line through the times, by least squares, tells how far they are from one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common.origin import origin_of
from lowmem.benchmarks.common.processes import ROOT, run_process
from lowmem.benchmarks.report.svg import MUTED, styles_of
from lowmem.benchmarks.report.svg import draw as draw_svg

RESULTS = ROOT / "benchmarks" / "results" / "conversion_sweep.json"
LAYERS = (2, 4, 8, 16)
ROWS = (8, 16, 32, 64)
ROW_LENGTH = 512
USUAL_LAYERS, USUAL_ROWS = 4, 16
SCALE = 16
"""The layers are StarChat Alpha's with all dimensions divided by this."""
PHASES = ("forward", "hessian", "factor", "quantize", "tune", "pack", "read", "write")


def measure(work: Path, layers: int, rows: int, options: Sequence[str]) -> dict[str, Any]:
    """Convert `layers` layers with `rows` calibration rows, in `work`: what it took."""
    source = work / f"source{layers}"
    if not source.exists():
        from lowmem.benchmarks.experiments.peers.starchat_layer import make_checkpoint

        make_checkpoint(source, SCALE, layers)
    log = work / "log"
    command = [sys.executable, "-m", "lowmem", "convert", str(source), str(work / "out"), "--force", "--json",
               "--device", "cpu", "--rows", str(rows), "--row-length", str(ROW_LENGTH), *options]  # fmt: skip
    usage = run_process(command, log)
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"event"')]
    started = next(event for event in events if event["event"] == "started")
    finished = next(event for event in events if event["event"] == "finished")
    return {
        "layers": layers,
        "tokens": rows * ROW_LENGTH,
        "seconds": finished["total_seconds"],
        "phases": {name: round(finished["seconds"].get(name, 0.0), 3) for name in PHASES},
        "planned_bytes": started["plan"]["host_peak"],
        # The hidden states between two layers are in memory where they fit: linear in tokens by design.
        "hidden_bytes": started["plan"]["hidden_bytes"] * (started["plan"]["keep_hidden"]),
        **asdict(usage),
    }


def line_through(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Least squares: offset, slope, and the largest distance from the line as a share of its value there."""
    n = len(points)
    x_mean, y_mean = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0.0
    offset = y_mean - slope * x_mean
    farthest = max(abs(y - offset - slope * x) / max(offset + slope * x, 1e-9) for x, y in points)
    return {"offset": offset, "slope": slope, "farthest": farthest}


def points(data: Mapping[str, Any], sweep: str, along: str, value: str) -> list[tuple[float, float]]:
    """(layers or tokens, value) of one sweep."""
    return [(run[along], run[value]) for run in data[sweep]]


def render(data: Mapping[str, Any]) -> str:
    """The measurement as Markdown."""
    rows = ["| layers | tokens | seconds | " + " | ".join(PHASES) + " | peak memory |", "|" + " ---: |" * 12]
    for run in [*data["by_layers"], *data["by_tokens"]]:
        phases = " | ".join(f"{run['phases'][name]:.1f}" for name in PHASES)
        rows.append(
            f"| {run['layers']} | {run['tokens']:,} | {run['seconds']:.1f} | {phases} | "
            f"{run['peak_bytes'] / 2**20:.0f} MiB |"
        )
    layers = line_through(points(data, "by_layers", "layers", "seconds"))
    tokens = line_through(points(data, "by_tokens", "tokens", "seconds"))
    peaks = [run["peak_bytes"] for run in data["by_layers"]]
    rows += [
        "",
        f"A layer takes {layers['slope']:.2f} s, 1,000 tokens {1000 * tokens['slope']:.2f} s; no time is "
        f"farther than {layers['farthest']:.0%} (layers) and {tokens['farthest']:.0%} (tokens) from a "
        f"straight line. Peak memory differs by {(max(peaks) - min(peaks)) / 2**20:.0f} MiB between "
        f"{min(LAYERS)} and {max(LAYERS)} layers.",
        "",
        f"- {data['dimensions']}",
        f"- {data['origin']['date'][:10]}, {data['origin']['machine']['cpu']}, "
        f"{data['origin']['machine']['cores']} cores; `{data['command']}`",
    ]
    return "\n".join(rows)


def draw(data: Mapping[str, Any]) -> str:
    """Seconds and peak memory against layers and tokens, as an SVG file that follows light and dark."""
    panels = [
        ("seconds, by layers", "by_layers", "layers", "seconds", 1.0, 1.0),
        ("seconds, by thousands of tokens", "by_tokens", "tokens", "seconds", 1000.0, 1.0),
        ("peak memory in MiB, by layers", "by_layers", "layers", "peak_bytes", 1.0, 2.0**20),
        ("peak memory in MiB, by thousands of tokens", "by_tokens", "tokens", "peak_bytes", 1000.0, 2.0**20),
    ]
    from matplotlib.figure import Figure

    def paint(figure: Figure) -> None:
        figure.set_figheight(560 / 72)
        grid = figure.subplots(2, 2).flat
        for number, (axes, (title, sweep, along, value, by, unit)) in enumerate(zip(grid, panels, strict=True)):
            found = [(x / by, y / unit) for x, y in points(data, sweep, along, value)]
            xs, ys = zip(*found, strict=True)
            line = line_through(found)
            ends = [0.0, max(xs)]
            axes.plot(ends, [line["offset"] + line["slope"] * x for x in ends], color=MUTED, linestyle="--")
            look = list(styles_of(("seconds", "peak memory")).values())[number // 2]
            axes.plot(xs, ys, color=look.color, marker=look.marker, linestyle="none", clip_on=False)
            axes.set(xlim=(0, max(xs) * 1.04), ylim=(0, max(ys) * 1.1), xticks=xs)
            axes.set_title(title)
            axes.grid(True)

    figure = draw_svg(
        "sweep",
        "How a conversion grows",
        "Time and peak memory against layers and against calibration tokens, each with the straight line that "
        "fits best.",
        paint,
    ).wide
    css = (ROOT / "benchmarks" / "report" / "templates" / "report.css").read_text("utf-8")
    colours = [line for line in css.splitlines() if line.lstrip().startswith(("--paper", "--s1"))]
    half = len(colours) // 2
    style = (
        f"<style>svg{{{''.join(colours[:half])}background:var(--paper);font-family:system-ui,sans-serif}}"
        f"@media(prefers-color-scheme:dark){{svg{{{''.join(colours[half:])}}}}}</style>"
    )
    head, _, rest = figure.partition(">")
    return f"{head}>{style}{rest}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="lowmem.benchmarks.experiments.full_size.conversion_sweep",
        description=__doc__.split("\n")[0] if __doc__ else "",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="JSON to write (results/)")
    parser.add_argument("--show", action="store_true", help="print the committed measurement as a table")
    args, options = parser.parse_known_args(argv)
    if args.show:
        print(render(json.loads(args.out.read_bytes())))
        return 0
    from lowmem.benchmarks.experiments.peers.starchat_layer import N_EMBD, N_HEAD, N_INNER

    command = " ".join(["python -m lowmem.benchmarks.experiments.full_size.conversion_sweep", *options])
    origin = asdict(origin_of([], f"made-up weights, scale {SCALE}", ""))
    runs: dict[tuple[int, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="conversion-sweep-") as folder:
        for layers, rows in [*((n, USUAL_ROWS) for n in LAYERS), *((USUAL_LAYERS, n) for n in ROWS)]:
            if (layers, rows) not in runs:
                runs[layers, rows] = run = measure(Path(folder), layers, rows, options)
                print(
                    f"{layers} layers, {rows * ROW_LENGTH} tokens: {run['seconds']:.1f} s, "
                    f"{run['peak_bytes'] / 2**20:.0f} MiB",
                    file=sys.stderr,
                    flush=True,
                )
    data = {
        "command": command,
        "origin": origin,
        "dimensions": f"gpt_bigcode, n_embd {N_EMBD // SCALE}, n_inner {N_INNER // SCALE}, "
        f"{N_HEAD // SCALE} heads, multi-query; made-up weights in float16",
        "by_layers": [runs[n, USUAL_ROWS] for n in LAYERS],
        "by_tokens": [runs[USUAL_LAYERS, n] for n in ROWS],
    }
    args.out.write_text(json.dumps(data, indent=2) + "\n")
    args.out.with_suffix(".svg").write_text(draw(data), encoding="utf-8")
    print(render(data))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
