"""gpu_day.json as one page of Markdown."""

from __future__ import annotations

from lowmem.benchmarks.experiments.common import made_with, table
from lowmem.benchmarks.experiments.gpu_day.record import GpuDay, Product

from lowmem.text.units import format_bytes

_LINES = 40
"""Lines of a step's output that are shown."""


def render(day: GpuDay) -> str:
    """The whole page."""
    parts = [
        f"# {day.device}",
        f"A copy within its memory reads and writes {day.bandwidth / 1e9:.0f} GB/s. {made_with(day.origin)}",
        "## Steps",
        table(
            ("step", "result", "seconds"),
            [(step.name, step.status, f"{step.seconds:.0f}") for step in day.steps],
        ),
    ]
    if day.products:
        parts += ["## Products", *_products(day)]
    if day.models:
        parts += ["## Models", _models(day)]
    for step in day.steps:
        text = "\n".join(step.text.splitlines()[-_LINES:]).replace("```", "'''")
        parts += [f"## Output of {step.name}", f"```text\n{text}\n```"]
    return "\n\n".join(parts)


def _products(day: GpuDay) -> list[str]:
    """A table for each shape: microseconds by rows, and the share of the bandwidth of one row."""
    parts = []
    for shape in dict.fromkeys((p.inputs, p.outputs) for p in day.products):
        own = [p for p in day.products if (p.inputs, p.outputs) == shape]
        rows = sorted({p.rows for p in own if p.rows})
        lines = []
        for version, kernel in dict.fromkeys((p.version, p.kernel) for p in own):
            found = [p for p in own if (p.version, p.kernel) == (version, kernel)]
            lines.append(
                (version, kernel, *(_microseconds(found, count) for count in rows), _share(found, day))
            )
        heads = ("weight", "kernel", *(f"{count} rows, µs" for count in rows), "GB/s, 1 row (share)")
        parts += [f"{shape[0]} inputs, {shape[1]} outputs:", table(heads, lines)]
    return parts


def _microseconds(found: list[Product], rows: int) -> str:
    product = next((p for p in found if p.rows in (rows, 0)), None)
    if product is None:
        return ""
    return product.problem or f"{product.seconds * 1e6:.0f}"


def _share(found: list[Product], day: GpuDay) -> str:
    one = next((p for p in found if p.rows == 1 and not p.problem), None)
    return f"{one.rate / 1e9:.3g} ({one.rate / day.bandwidth:.0%})" if one and day.bandwidth else ""


def _models(day: GpuDay) -> str:
    heads = (
        "version",
        "kernel",
        "layers",
        "context",
        "planned",
        "peak",
        "decode, tokens/s",
        "prefill, tokens/s",
    )
    return table(
        heads,
        [
            (
                run.version,
                run.kernel,
                str(run.layers),
                str(run.context),
                format_bytes(run.planned),
                format_bytes(run.peak),
                f"{run.decode:.1f}",
                f"{run.prefill:.0f}",
            )
            for run in day.models
        ],
    )
