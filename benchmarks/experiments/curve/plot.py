"""The measurement as an image: KL divergence against stored bits, readable on light and dark backgrounds."""

from __future__ import annotations

import io
from typing import Any

from lowmem.benchmarks.experiments.curve.arithmetic import line
from lowmem.benchmarks.experiments.curve.record import (
    AUTOSCHEME,
    I_QUANT,
    K_QUANT,
    MIXED,
    UNIFORM,
    CurveRecord,
)

GREY = "#808080"
LOOKS = {
    MIXED: ("lowmem, mixed widths", {"color": "#3987e5", "marker": "o", "linestyle": "-"}),
    UNIFORM: ("lowmem, one width", {"color": "#3987e5", "marker": "s", "markerfacecolor": "none"}),
    K_QUANT: ("llama.cpp, K-quants", {"color": "#d95926", "marker": "^"}),
    I_QUANT: ("llama.cpp, I-quants", {"color": "#d95926", "marker": "v", "markerfacecolor": "none"}),
    AUTOSCHEME: ("AutoRound, AutoScheme", {"color": "#3a9a5b", "marker": "D"}),
}
"""By family: the name in the legend, and matplotlib's keywords."""


def draw(record: CurveRecord) -> str:
    """One panel for each text, as SVG; the same record gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    texts = record.texts()
    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "curve", "text.color": GREY}
    settings |= {"axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(12, 5), layout="constrained")
        grid = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
        for axes, text in zip(grid, texts, strict=True):
            for family, (name, look) in LOOKS.items():
                points = line(record.of(family), text)
                style = {"linestyle": "none", "markersize": 5, **look}
                axes.plot([x for x, _ in points], [y for _, y in points], label=name, **style)
            axes.set_yscale("log")
            axes.grid(color=GREY, alpha=0.25)
            axes.xaxis.set_major_locator(MultipleLocator(1))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set(title=text, xlabel="stored bits per weight")
        grid[0].set_ylabel("KL divergence, nats")
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()
