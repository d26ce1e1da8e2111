"""results/pace.json as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from lowmem.benchmarks.common.records import Repeated
from lowmem.benchmarks.experiments.pace.linears import LinearTimes
from lowmem.benchmarks.experiments.pace.load import Load
from lowmem.benchmarks.experiments.pace.record import (
    Goal,
    ModelFacts,
    PaceRecord,
    Share,
    goals,
    rows_ratio,
    whole_model,
)

LAYERS = 40
"""StarChat Alpha's."""


def render(record: PaceRecord) -> str:
    """All tables, and what they were measured with."""
    lines: list[str] = []
    if record.timings or record.loads:
        lines += [*_goals(record), ""]
    if record.models:
        lines += [*_models(record), ""]
    if whole := whole_model(record, LAYERS):
        lines += [*_whole(whole), ""]
    if record.shares:
        lines += [*_shares(record.shares), ""]
    for layers in sorted({load.layers for load in record.loads}):
        lines += [*_loads(tuple(load for load in record.loads if load.layers == layers)), ""]
    if record.linears:
        lines += [*_linears(record.linears), ""]
    origin = record.origin
    versions = dict(origin.versions) | ({"llama-cpp-python": record.llama} if record.llama else {})
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines.append(
        f"`{origin.command}`, {origin.date[:10]}, {origin.machine.cpu}, {record.threads} threads, "
        f"{record.layers} layers; {named}. Median of the rounds (lowest to highest)."
    )
    return "\n".join(lines)


def _goals(record: PaceRecord) -> Iterator[str]:
    yield "| | goal | found | |"
    yield "|---|---|---|---|"
    for goal in goals(record):
        word = {None: "not measured", True: "met", False: "missed"}[goal.met]
        sign = "≥" if goal.least else "≤"
        if goal.bound < 1:
            yield f"| {goal.name} | {sign} {goal.bound:.0%} | {_percent(goal.found)} | {word} |"
        else:
            yield f"| {goal.name} | {sign} {goal.bound:g} × | {_times(goal)} | {word} |"


def _times(goal: Goal) -> str:
    found = goal.found
    return f"{found.median:.2f} × ({found.low:.2f} to {found.high:.2f})" if found else ""


def _percent(found: Repeated | None) -> str:
    return f"{found.median:.1%} ({found.low:.1%} to {found.high:.1%})" if found else ""


def _models(record: PaceRecord) -> Iterator[str]:
    whats = [what for what in ("decode 512", "decode 8128") if any(t.what == what for t in record.timings)]
    yield (
        "| | reads a token, MB: layers + head | "
        + " | ".join(f"{what}, ms | GB/s" for what in whats)
        + " | prefill 512, tokens/s | 4 rows / 1 row | kernel |"
    )
    yield "|---" * (5 + 2 * len(whats)) + "|"
    for model in record.models:
        cells = [_bytes(model)]
        for what in whats:
            timing = record.timing(model.label, what)
            cells.append(_ms(timing.seconds) if timing else "")
            cells.append(f"{timing.bytes / timing.seconds.median * 1e-9:.1f}" if timing else "")
        prefill = record.timing(model.label, "prefill 512")
        cells.append(f"{prefill.rate:.0f}" if prefill else "")
        rows = rows_ratio(record, model.label)
        cells.append(f"{rows.median:.2f}" if rows else "")
        yield f"| {model.label} | {' | '.join(cells)} | {model.failure or model.kernel} |"


def _whole(found: dict[str, float]) -> Iterator[str]:
    yield f"| {LAYERS} layers and StarChat's vocabulary, by arithmetic | decode 512, ms | tokens/s |"
    yield "|---|---|---|"
    for label, seconds in found.items():
        yield f"| {label} | {1e3 * seconds:.0f} | {1 / seconds:.2f} |"


def _bytes(model: ModelFacts) -> str:
    found = dict(model.bytes)
    layers = sum(found.get(name, 0) for name in ("packed", "scales", "vectors"))
    return f"{layers * 1e-6:.0f} + {found.get('head', 0) * 1e-6:.0f}"


def _ms(found: Repeated) -> str:
    return f"{1e3 * found.median:.2f} ({1e3 * found.low:.2f} to {1e3 * found.high:.2f})"


def _shares(shares: tuple[Share, ...]) -> Iterator[str]:
    yield "| decode between reads | bytes a token | decoding | its weights read | a buffer read | share |"
    yield "|---|---|---|---|---|---|"
    for share in shares:
        values = sorted(share.shares())
        decoding = median(share.bytes / median(batch.seconds) for batch in share.batches)
        read = median((batch.before + batch.after) / 2 for batch in share.batches)
        buffer = median(batch.buffer for batch in share.batches)
        yield (
            f"| {share.model} | {share.bytes * 1e-6:.0f} MB | {decoding * 1e-9:.1f} GB/s "
            f"| {read * 1e-9:.1f} GB/s | {buffer * 1e-9:.1f} GB/s | {median(values):.1%} "
            f"({values[0]:.1%} to {values[-1]:.1%}) |"
        )


def _loads(loads: tuple[Load, ...]) -> Iterator[str]:
    def middle(values: list[float]) -> str:
        return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    layers = loads[0].layers
    yield f"| load of {layers} layers, 4-bit g128, StarChat's vocabulary, page cache warm | seconds |"
    yield "|---|---|"
    size = f"{loads[0].bytes * 1e-6:.0f} MB"
    yield f"| read() of its {size} once, into one buffer | {middle([x.read_seconds for x in loads])} |"
    yield f"| the read loop over a new mapping | {middle([x.mapped for x in loads])} |"
    yield f"| the same again, all pages mapped | {middle([x.mapped_again for x in loads])} |"
    yield f"| load | {middle([x.load for x in loads])} |"
    yield f"| load to first token | {middle([x.whole for x in loads])} |"
    yield f"| all weights into order, between the next tokens | {middle([x.ordered for x in loads])} |"
    yield f"| with process start and imports | {middle([x.start + x.whole for x in loads])} |"
    yield ""
    peak, libraries = (max(getattr(x, name) for x in loads) * 1e-6 for name in ("peak", "libraries"))
    yield f"The most that was resident then: {peak:.0f} MB, {libraries:.0f} of it Python and libraries."


def _linears(linears: tuple[LinearTimes, ...]) -> Iterator[str]:
    yield "| linear | rows | ms | GB/s | read, GB/s | share | GFLOP/s | time / 1 row | torch's operator, ms |"
    yield "|---|---|---|---|---|---|---|---|---|"
    ones = {(x.bits, x.inputs, x.outputs): x.seconds for x in linears if x.rows == 1}
    for x in linears:
        one = ones.get((x.bits, x.inputs, x.outputs))
        rival = f"{x.torch_name} {1e3 * x.torch_seconds:.2f}" if x.torch_seconds else ""
        yield (
            f"| {x.bits}-bit g{x.group} {x.inputs}→{x.outputs} | {x.rows} | {1e3 * x.seconds:.3f} "
            f"| {x.bytes / x.seconds * 1e-9:.1f} | {x.read * 1e-9:.1f} "
            f"| {x.share:.0%} ({x.share_low:.0%} to {x.share_high:.0%}) | {x.flops * 1e-9:.0f} "
            f"| {f'{x.seconds / one:.2f}' if one else ''} | {rival} |"
        )
