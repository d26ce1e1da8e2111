"""results/pace.json as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from lowmem.benchmarks.experiments.common import made_with, spread, table
from lowmem.benchmarks.experiments.pace.load import Load
from lowmem.benchmarks.experiments.pace.record import Goal, PaceRecord, goals, rows_ratio, whole_model

LAYERS = 40
"""StarChat Alpha's."""
MB, GB = 1e-6, 1e-9


def render(record: PaceRecord) -> str:
    """All tables, and what they were measured with."""
    parts: list[str] = []
    if record.timings or record.loads:
        parts.append(table(("", "goal", "found", ""), map(_goal, goals(record)), numbers=False))
    if record.models:
        parts.append(_models(record))
    if whole := whole_model(record, LAYERS):
        title = f"{LAYERS} layers and StarChat's vocabulary, by arithmetic"
        rows = ((label, f"{1e3 * seconds:.0f}", f"{1 / seconds:.2f}") for label, seconds in whole.items())
        parts.append(table((title, "decode 512, ms", "tokens/s"), rows))
    if record.shares:
        parts.append(_shares(record))
    for layers in sorted({load.layers for load in record.loads}):
        parts.append(_loads([load for load in record.loads if load.layers == layers]))
    parts.append(
        made_with(record.origin, [("llama-cpp-python", record.llama)] if record.llama else [])
        + f" {record.threads} threads, {record.layers} layers. Median of the rounds (lowest to highest)."
    )
    return "\n\n".join(parts)


def _goal(goal: Goal) -> tuple[str, ...]:
    word = {None: "not measured", True: "met", False: "missed"}[goal.met]
    sign = "≥" if goal.least else "≤"
    bound, form = (f"{goal.bound:.0%}", "{:.1%}") if goal.bound < 1 else (f"{goal.bound:g} ×", "{:.2f} ×")
    return goal.name, f"{sign} {bound}", spread(goal.found.values, form) if goal.found else "", word


def _models(record: PaceRecord) -> str:
    whats = [what for what in ("decode 512", "decode 8128") if any(t.what == what for t in record.timings)]
    heads = ["", "reads a token, MB: layers + head"]
    for what in whats:
        heads += [f"{what}, ms", "GB/s"]
    heads += ["prefill 512, tokens/s", "4 rows / 1 row", "kernel"]
    rows = []
    for model in record.models:
        found = dict(model.bytes)
        layers = sum(found.get(name, 0) for name in ("packed", "scales", "vectors"))
        cells = [model.label, f"{layers * MB:.0f} + {found.get('head', 0) * MB:.0f}"]
        for what in whats:
            timing = record.timing(model.label, what)
            cells.append(spread([1e3 * seconds for seconds in timing.seconds.values]) if timing else "")
            cells.append(f"{timing.bytes / timing.seconds.median * GB:.1f}" if timing else "")
        prefill, ratio = record.timing(model.label, "prefill 512"), rows_ratio(record, model.label)
        cells.append(f"{prefill.rate:.0f}" if prefill else "")
        cells.append(f"{ratio.median:.2f}" if ratio else "")
        rows.append([*cells, model.failure or model.kernel])
    return table(heads, rows)


def _shares(record: PaceRecord) -> str:
    rows = []
    for share in record.shares:
        decoding = median(share.bytes / median(batch.seconds) for batch in share.batches)
        read = median((batch.before + batch.after) / 2 for batch in share.batches)
        buffer = median(batch.buffer for batch in share.batches)
        rates = [f"{rate * GB:.1f} GB/s" for rate in (decoding, read, buffer)]
        rows.append([share.model, f"{share.bytes * MB:.0f} MB", *rates, spread(share.shares(), "{:.1%}")])
    heads = (
        "decode between reads", "bytes a token", "decoding", "its weights read", "a buffer read", "share",
    )  # fmt: skip
    return table(heads, rows)


def _loads(loads: Sequence[Load]) -> str:
    def row(title: str, values: Iterator[float]) -> tuple[str, str]:
        return title, spread(list(values), "{:.3f}")

    title = f"load of {loads[0].layers} layers, 4-bit g128, StarChat's vocabulary, page cache warm"
    rows = (
        row(f"read() of its {loads[0].bytes * MB:.0f} MB into one buffer", (x.read_seconds for x in loads)),
        row("the kernels' read loop over a new mapping", (x.mapped for x in loads)),
        row("the same again, all pages mapped", (x.mapped_again for x in loads)),
        row("load", (x.load for x in loads)),
        row("load to first token", (x.whole for x in loads)),
        row("repacking all weights, between the next tokens", (x.repacking for x in loads)),
        row("load to first token, with process start and imports", (x.start + x.whole for x in loads)),
    )
    peak, libraries = max(x.peak for x in loads) * MB, max(x.libraries for x in loads) * MB
    memory = f"Peak resident memory: {peak:.0f} MB, {libraries:.0f} MB of it Python and libraries."
    return f"{table((title, 'seconds'), rows)}\n\n{memory}"
